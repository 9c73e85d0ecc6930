"""What `--disk` and `--cdrom` say, and the same in TOML: a disk's image, and where the guest finds it."""

# No `from __future__ import annotations`: the annotations are the table, and read at run time.

import os
from pathlib import Path
from typing import Annotated

from hvkvm.block.image import CACHES, FORMATS, SECTOR_SIZES, ImageOptions
from hvkvm.errors import ConfigError
from hvkvm.machine.config_fields import Field
from hvkvm.machine.config_kinds import Choice, File, Kind, Number, OnOff, check_file, said
from hvkvm.tuples import NamedTuple

MAX_CONTROLLERS = 64
MAX_LUNS = 64
"""Of one controller: Linux looks for up to 255, which nobody needs."""
MAX_SERIAL = 20
BUSES = ("vmbus", "nvme", "virtio")


_UNIX = "nbd:unix:"
_MOST_OF_A_SOCKET = 107
"""Bytes of its name: beyond, there is only a short way to it, from some folder."""


def server_from(folder: str | Path, name: str) -> str:
    """An NBD server's `name`, said in `folder`, as it is from wherever; "": the current one."""
    place, behind, export = name.partition(":exportname=")
    if not place.startswith(_UNIX) or place == _UNIX:
        return name
    path = os.path.join(folder, place.removeprefix(_UNIX)) if folder else os.path.abspath(place[len(_UNIX) :])
    return f"{_UNIX}{path}{behind}{export}" if len(os.fsencode(path)) <= _MOST_OF_A_SOCKET else name


class ImageName(Kind):
    """A file of this host, or nbd:unix:PATH or nbd:HOST:PORT."""

    def from_text(self, name: str, text: str, folder: Path | None = None) -> str:
        if folder is None:
            return text
        return server_from(folder, text) if text.startswith("nbd:") else str(folder / text)

    def check(self, name: str, value: str) -> None:
        if not value:
            raise ConfigError(f"{name}: empty; name an image file, or nbd:unix:PATH")
        super().check(name, value)
        if not value.startswith("nbd:"):
            check_file(name, Path(value))


class MediumName(ImageName):
    """An ImageName, or "none" for a drive without a medium, which is "" then."""

    def from_text(self, name: str, text: str, folder: Path | None = None) -> str:
        return "" if text == "none" else super().from_text(name, text, folder)

    def check(self, name: str, value: str) -> None:
        if value:
            super().check(name, value)


def _place(most: int, what: str, name: str, value: int) -> None:
    if not -1 <= value < most:
        raise ConfigError(f"{said(name, value)}: there are {what} 0 to {most - 1}; choose one of them")


def check_lun(name: str, value: int) -> None:
    """ConfigError for what is no LUN; -1 stands for the next free one."""
    _place(MAX_LUNS, "LUNs", name, value)


def check_controller(name: str, value: int) -> None:
    """ConfigError for what is no controller."""
    _place(MAX_CONTROLLERS, "controllers", name, value if value >= 0 else MAX_CONTROLLERS)


def check_serial(name: str, value: str) -> None:
    """ConfigError for what INQUIRY could not tell."""
    if len(value) > MAX_SERIAL or not all(" " <= one <= "~" for one in value):
        raise ConfigError(f"{said(name, value)}: no serial number; use up to {MAX_SERIAL} ASCII characters")


class DiskSpec(NamedTuple):
    """A disk."""

    file: Annotated[str, Field(ImageName(), help="the image")]
    format: Annotated[
        str, Field(Choice(("", *FORMATS)), "raw|vhdx", "the image's format (by its first bytes)")
    ] = ""
    readonly: Annotated[bool, Field(OnOff(), "on", "refuse the guest's writes")] = False
    snapshot: Annotated[bool, Field(OnOff(), "on", "throw away what the guest writes")] = False
    cache: Annotated[
        str, Field(Choice(CACHES), "|".join(CACHES), "the host's page cache, or O_DIRECT (writeback)")
    ] = "writeback"
    serial: Annotated[
        str, Field(Kind(), "TEXT", "the serial number that the guest sees (by its place)", check_serial)
    ] = ""
    discard: Annotated[
        bool, Field(OnOff(), "on|off", "whether a discard gives space back to the host (on)")
    ] = True
    sector: Annotated[
        str,
        Field(Choice(("", *map(str, SECTOR_SIZES))), "512|4096", "bytes of a sector of a raw image (512)"),
    ] = ""
    controller: Annotated[int, Field(Number(0), "N", "the controller, from 0 (0)", check_controller)] = 0
    lun: Annotated[int, Field(Number(1), "N", "the LUN (the next free one)", check_lun)] = -1
    bus: Annotated[
        str,
        Field(
            Choice(("", *BUSES)), "|".join(BUSES), "where the guest finds it (with firmware nvme, else vmbus)"
        ),
    ] = ""
    faults: Annotated[
        Path | None, Field(File(), "FILE", "have it fail on purpose, as this TOML file says")
    ] = None

    @property
    def options(self) -> ImageOptions:
        """How the image is opened."""
        return ImageOptions(
            self.format,
            read_only=self.readonly,
            snapshot=self.snapshot,
            cache=self.cache,
            sector_size=int(self.sector or 0),
            discard=self.discard,
        )


class CdromSpec(NamedTuple):
    """A DVD drive, with a medium or empty."""

    file: Annotated[str, Field(MediumName(), help="the ISO image, or none")]
    serial: Annotated[str, Field(Kind(), "TEXT", "the serial number that the guest sees", check_serial)] = ""
    controller: Annotated[int, Field(Number(0), "N", "the controller, from 0 (0)", check_controller)] = 0
    lun: Annotated[int, Field(Number(1), "N", "the LUN (the next free one)", check_lun)] = -1
    bus: Annotated[
        str,
        Field(
            Choice(("", *BUSES)),
            "|".join(BUSES),
            "vmbus: a drive; else a read-only disk (with firmware nvme, else vmbus)",
        ),
    ] = ""

    @property
    def options(self) -> ImageOptions:
        """How the image is opened."""
        return ImageOptions("raw", read_only=True)


def image_of(one: DiskSpec | CdromSpec) -> tuple[int, int] | None:
    """What tells its image file from others, whatever it is named by; None where there is none to be seen."""
    if not one.file or one.file.startswith("nbd:"):
        return None
    try:
        found = os.stat(one.file)
    except OSError:  # opening it tells
        return None
    return found.st_dev, found.st_ino


def writes(one: DiskSpec | CdromSpec) -> bool:
    """Whether its image file is written, so that no other disk may use that."""
    return not (one.options.read_only or one.options.snapshot)


def shut_out(one: DiskSpec | CdromSpec, other: DiskSpec | CdromSpec) -> bool:
    """Whether both are one image file and either writes it, so that its lock shuts the other out."""
    if not (writes(one) or writes(other)):
        return False
    image = image_of(one)
    return image is not None and image == image_of(other)
