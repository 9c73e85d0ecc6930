"""Which files a machine reads and which it writes, so that none of them is lost to a mistaken name.

A recording empties its file and a save replaces it: a disk, a kernel or another recording that has the same
name would be gone. A `MachineConfig` is `Any` here, as in `config_checks`. Any thread.

A relative name means nothing once the folder that it starts from is removed, and a shell may be in one:
`absolute` and `from_here` say so.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hvkvm.errors import ConfigError

Named = tuple[str, Path]
"""A file, and what names it: "--disk"."""

CLOUD_INIT_FILES = ("user-data", "meta-data", "network-config", "vendor-data")
"""What cloud-init looks for in its folder; of these only the first must be there."""

_SINGLE = ("restore", "warm", "kernel", "initrd", "busybox", "firmware", "firmware_vars")
_REMEDY = "whose content would be lost; name another file"


def written(config: Any) -> list[Named]:
    """What a run empties at its start: recordings, pictures and captures."""
    found = [("--record", spec.file) for spec in config.record]
    if config.timeline is not None:
        found.append(("--timeline", config.timeline))
    return [*found, *(("--net pcap=", nic.pcap) for nic in config.nets if nic.pcap is not None)]


def check_written(config: Any) -> None:
    """Raise ConfigError for a file that a run would write, and that another option names as well."""
    others = list(read(config))
    for flag, path in written(config):
        refuse(flag, path, others)
        others.append((flag, path))


def refuse(flag: str, path: Path, others: Iterable[Named]) -> None:
    """Raise ConfigError where `path`, which `flag` has written, is one of `others`, or is nowhere."""
    with from_here(said(flag, path)):
        os.path.abspath(path)
        other = _named(path, others)
    if other:
        raise ConfigError(f"{said(flag, path)}: {other} names the same file, {_REMEDY}")


@contextmanager
def from_here(named: str) -> Iterator[None]:
    """Have ConfigError raised, about `named`, where names are made absolute in a folder that is gone."""
    try:
        yield
    except FileNotFoundError:
        raise ConfigError(f"{named}: the folder that you are in is gone; cd to another") from None


def absolute(file: str) -> str:
    """What names `file` also for a process that is in another folder. ConfigError."""
    with from_here(file):
        return os.path.abspath(file)


def why_kept(path: Path, config: Any, media: Iterable[Any] = (), nets: Iterable[Any] | None = None) -> str:
    """Why a running machine must not replace or empty `path`; "" where it may.

    `media` are the disks that it has by now, beside `config`'s, `nets` all of its NICs, where they may be
    others than `config`'s. The saved machine that it went on from may be replaced: what is mapped of that
    stays. FileNotFoundError where `config` has relative names, and the folder that the run is in is gone.
    """
    others = [one for one in read(config) if one[0] not in ("--restore", "--from")]
    made = written(config if nets is None else config._replace(nets=tuple(nets)))
    other = _named(path, [*others, *made, *_images(media)])
    return f"{path}: this VM has it as {other}, {_REMEDY}" if other else ""


def said(flag: str, path: Path) -> str:
    """A flag with its file, as a user writes them."""
    return f"{flag}{path}" if flag.endswith("=") else f"{flag} {path}"


def read(config: Any) -> Iterator[Named]:
    """What a machine is made from, and what it keeps its state in."""
    for key in _SINGLE:
        if isinstance(path := getattr(config, key), Path):
            yield f"--{'from' if key == 'warm' else key.replace('_', '-')}", path
    yield from (("--file", host) for _guest, host in config.files)
    if config.cloud_init is not None:
        yield from (("--cloud-init", config.cloud_init / name) for name in CLOUD_INIT_FILES)
    yield from _images(config.media)


def _images(media: Iterable[Any]) -> Iterator[Named]:
    for spec in media:
        if spec.file and not spec.file.startswith("nbd:"):
            yield ("--disk" if hasattr(spec, "faults") else "--cdrom"), Path(spec.file)
        if getattr(spec, "faults", None) is not None:
            yield "--disk faults=", spec.faults


def _named(path: Path, others: Iterable[Named]) -> str:
    """What names the same file; "" where nothing does."""
    return next((flag for flag, other in others if _same(path, other)), "")


def _same(one: Path, other: Path) -> bool:
    """Whether both are one file or block device, there or not yet. Pipes and terminals keep nothing.

    FileNotFoundError for a relative name in a folder that is gone.
    """
    try:
        found = os.stat(one)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)
    try:
        keeps = stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode)
        return keeps and os.path.samestat(found, os.stat(other))
    except OSError:
        return False
