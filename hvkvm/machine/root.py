"""The guest's root file system on a disk: found when nobody named it, and mounted when there is no initrd.

Owner: whoever makes the machine. Images are opened for reading here, before the machine opens them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvkvm.errors import ConfigError, ImageError
from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from hvkvm.boot.initramfs import RootDevice
    from hvkvm.machine.config import MachineConfig


class Found(NamedTuple):
    """`config` with the root in its command line, if one was found, and what to tell the user."""

    config: MachineConfig
    note: str


def find_root(config: MachineConfig) -> Found:
    """Look for the root file system on the disks of a Linux that was told none. May block.

    Nothing is looked for where our own init runs a command. Raises ConfigError where several could be
    the root, and for an image that cannot be read.
    """
    ours = config.command or config.awaits or config.restore is not None
    if not config.disks or config.kernel is None or ours:
        return Found(config, "")
    from hvkvm.boot.image import is_linux
    from hvkvm.boot.linux import parameter

    if parameter(config.append, "root") is not None or not is_linux(config.kernel):
        return Found(config, "")
    from hvkvm.block.open_image import open_image
    from hvkvm.block.root_search import candidates, likely

    found = []
    for spec in config.disks:
        try:
            image = open_image(spec.file, spec.options._replace(read_only=True, snapshot=False))
            try:
                found += candidates(spec.file, image)
            finally:
                image.close()
        except (OSError, ImageError) as error:
            raise ConfigError(f"--disk {spec.file}: {error}") from None
    chosen = likely(found)
    if not chosen:
        return Found(config, "no root file system on the disks: no root= is added")
    if len(chosen) > 1:
        several = ", ".join(f"{one} (UUID={one.system.uuid})" for one in chosen[:4])
        more = f" and {len(chosen) - 4} more" if len(chosen) > 4 else ""
        raise ConfigError(
            f"--disk: {len(chosen)} file systems could be the root: {several}{more};"
            " say which with --append root=UUID=..., or give a command"
        )
    (root,) = chosen
    # In front: what stands behind `--` is init's.
    line = f"root=UUID={root.system.uuid} rootfstype={root.system.kind} {config.append}".rstrip()
    return Found(config._replace(append=line), f"root file system: {root}, UUID={root.system.uuid}")


def told(config: MachineConfig) -> RootDevice | None:
    """The root that the command line names and that only an init of ours can mount; None for others.

    The kernel alone knows neither UUID= nor LABEL=, nor any disk while hv_storvsc is a module.
    """
    if config.command or config.awaits or config.initrd is not None:
        return None
    from hvkvm.boot.initramfs import RootDevice
    from hvkvm.boot.linux import last_word, parameter

    append = config.append
    root = parameter(append, "root") or ""
    by_name = root.startswith(("UUID=", "LABEL="))
    if not by_name and not (root.startswith("/dev/") and config.disks and config.modules_dir is not None):
        return None
    return RootDevice(
        root,
        parameter(append, "rootfstype") or "",
        parameter(append, "rootflags") or "",
        last_word(append, ("ro", "rw")) or "ro",
        parameter(append, "init") or "/sbin/init",
    )
