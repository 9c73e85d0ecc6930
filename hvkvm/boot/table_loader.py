"""ACPI tables by way of fw_cfg: the files and commands from which firmware makes its own copy of them.

Firmware allocates memory for two files, then is told which fields of them are pointers and which bytes
are checksums. The commands are QEMU's (bios-linker-loader). Pure.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from hvkvm.abi.fw_cfg import (
    LOADER_ADD_CHECKSUM,
    LOADER_ADD_POINTER,
    LOADER_ALLOCATE,
    LOADER_COMMAND_SIZE,
    LOADER_FILE_SIZE,
    LOADER_ZONE_FSEG,
    LOADER_ZONE_HIGH,
)
from hvkvm.boot.acpi import AcpiTables
from hvkvm.tuples import NamedTuple

RSDP_FILE = "etc/acpi/rsdp"
TABLES_FILE = "etc/acpi/tables"
LOADER_FILE = "etc/table-loader"
_RSDP_SIZE = 36
_ALIGN = 64


class LoaderFiles(NamedTuple):
    """The content of the three files."""

    rsdp: bytes
    tables: bytes
    loader: bytes


def split(build: Callable[[int], AcpiTables]) -> LoaderFiles:
    """The files for what `build(address)` makes: a pointer in them counts from its target file's start."""
    # With the RSDP's room just below address 0, every table's address is its offset in the second file.
    made = build(-_ALIGN)
    image = bytearray(made.image)
    for checksum in made.checksums:
        image[checksum.offset] = 0  # firmware sums it up with the rest
    return LoaderFiles(bytes(image[:_RSDP_SIZE]), bytes(image[_ALIGN:]), b"".join(_commands(made)))


def _commands(made: AcpiTables) -> list[bytes]:
    commands = [
        _command("I56sIB", LOADER_ALLOCATE, _name(RSDP_FILE), 16, LOADER_ZONE_FSEG),
        _command("I56sIB", LOADER_ALLOCATE, _name(TABLES_FILE), _ALIGN, LOADER_ZONE_HIGH),
    ]
    for offset, size in made.pointers:
        file, at = _place(offset)
        commands.append(_command("I56s56sIB", LOADER_ADD_POINTER, _name(file), _name(TABLES_FILE), at, size))
    for offset, start, length in made.checksums:
        file, at = _place(offset)
        _file, first = _place(start)
        commands.append(_command("I56sIII", LOADER_ADD_CHECKSUM, _name(file), at, first, length))
    return commands


def _place(offset: int) -> tuple[str, int]:
    """The file that has a byte of the image, and where in it."""
    return (RSDP_FILE, offset) if offset < _ALIGN else (TABLES_FILE, offset - _ALIGN)


def _name(file: str) -> bytes:
    return file.encode().ljust(LOADER_FILE_SIZE, b"\0")


def _command(code: str, *values: int | bytes) -> bytes:
    return struct.pack("<" + code, *values).ljust(LOADER_COMMAND_SIZE, b"\0")
