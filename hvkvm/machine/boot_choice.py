"""What starts a machine that was told no kernel: UEFI firmware, if a disk of its has something for it.

Owner: whoever makes the machine. Images are opened for reading here, before the machine opens them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvkvm.errors import BootError, ConfigError, ImageError
from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from hvkvm.machine.config import MachineConfig


class Choice(NamedTuple):
    """`config` with the firmware, if it was chosen, and what to tell the user."""

    config: MachineConfig
    note: str


def choose(config: MachineConfig) -> Choice:
    """Have a machine with a bootable disk and no kernel start in the distribution's firmware. May block.

    Raises ConfigError where no disk could be booted, or an image cannot be read; BootError where there is
    no firmware on this host, with the command that installs it.
    """
    if config.firmware is not None or not config.starts_firmware:
        return Choice(config, "")
    from hvkvm.block.boot_search import bootable
    from hvkvm.block.open_image import open_image
    from hvkvm.boot.firmware import find

    media = [("--disk", disk) for disk in config.disks] + [("--cdrom", drive) for drive in config.cdroms]
    for flag, spec in media:
        if not spec.file or config.bus_of(spec) == "vmbus":
            continue
        try:
            image = open_image(spec.file, spec.options._replace(read_only=True, snapshot=False))
            try:
                what = bootable(image)
            finally:
                image.close()
        except (OSError, ImageError) as error:
            raise ConfigError(f"{flag} {spec.file}: {error}") from None
        if what:
            try:
                path = find("auto")
            except BootError:
                raise BootError(
                    f"{flag} {spec.file}: has {what}, but this host has no UEFI firmware to boot it;"
                    " apt install ovmf, or name --firmware FILE"
                ) from None
            note = f"UEFI firmware {path} boots {spec.file}, which has {what}"
            return Choice(config._replace(firmware="auto"), note)
    raise ConfigError(
        "--kernel: missing, and no disk has what UEFI firmware could boot; name the guest kernel's file, or"
        " give --firmware auto to try all the same"
    )
