"""What a saved machine says of its disks, and what to ask for to have them again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hvkvm.errors import StateError
from hvkvm.machine.disk_spec import CdromSpec, DiskSpec, server_from
from hvkvm.state.manifest import SavedDisk

if TYPE_CHECKING:
    from hvkvm.machine.attached import Attached


def saved_disk(one: Attached) -> SavedDisk:
    """As it stands in the file."""
    spec, disk = one.spec, one.disk
    file = one.file
    if file:
        file = server_from("", file) if file.startswith("nbd:") else os.path.abspath(file)
    options = spec.options
    # Whoever closes a VHDX writes to it, so that its time says nothing.
    telling = disk is not None and disk.image.format == "raw" and not disk.image.read_only
    return SavedDisk(
        "disk" if isinstance(spec, DiskSpec) else "cdrom",
        file,
        "" if disk is None else disk.image.format,
        spec.readonly if isinstance(spec, DiskSpec) else True,
        options.snapshot,
        options.cache,
        spec.serial,
        options.discard,
        options.sector_size,
        one.controller,
        one.lun,
        0 if disk is None else disk.size,
        changed_at(file) if telling else 0,
        one.bus,
        one.name,
    )


def specs_of(saved: Sequence[SavedDisk]) -> tuple[tuple[DiskSpec, ...], tuple[CdromSpec, ...]]:
    """What to ask for to have these again. StateError for a kind or a name that there is not."""
    disks, cdroms = [], []
    names: set[str] = set()
    for one in saved:
        family = one.kind if one.bus == "vmbus" else one.bus
        number = one.name.removeprefix(family)
        if one.name in names or f"{family}{number}" != one.name or not _is_number(number):
            raise StateError(f"it has {one.name[:20]!r}: no name of a disk, or one of two")
        names.add(one.name)
        if one.kind == "disk":
            disks.append(
                DiskSpec(
                    one.file,
                    "" if one.file.startswith("nbd:") else one.format,
                    one.readonly,
                    one.snapshot,
                    one.cache,
                    one.serial,
                    one.discard,
                    str(one.sector or ""),
                    one.controller if one.bus == "vmbus" else 0,
                    one.lun,
                    one.bus,
                )
            )
        elif one.kind == "cdrom":
            on_vmbus = one.bus == "vmbus"
            cdroms.append(
                CdromSpec(one.file, one.serial, one.controller if on_vmbus else 0, one.lun, one.bus)
            )
        else:
            raise StateError(f"it has a {one.kind[:20]!r} for a disk, which this hvkvm does not know")
    return tuple(disks), tuple(cdroms)


def _is_number(text: str) -> bool:
    """As `Disks` writes one."""
    return text.isascii() and text.isdigit() and len(text) <= 4 and str(int(text)) == text


def changed_at(file: str) -> int:
    """When a file was last written to, in ns since the epoch; 0 for what is none."""
    try:
        return 0 if file.startswith("nbd:") else os.stat(file).st_mtime_ns
    except OSError:
        return 0
