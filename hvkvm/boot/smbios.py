"""SMBIOS tables: what a guest's inventory says about the machine it is in. Pure. Source: DMTF DSP0134 3.2.

Firmware takes them by fw_cfg and chooses their address (`build`); where there is none they lie in RAM, where
a guest scans for them (`placed`).
"""

from __future__ import annotations

import struct

from hvkvm.abi import board
from hvkvm.digest import sha1
from hvkvm.tuples import NamedTuple

ANCHOR_FILE = "etc/smbios/smbios-anchor"
TABLES_FILE = "etc/smbios/smbios-tables"
VENDOR, PRODUCT = "hvkvm", "Virtual Machine"
_OUR_NAMES = bytes.fromhex("5a1f2c8e8d0f4d4e9a518f9b6d0f7c11")
_PHYSICAL_ARRAY, _DEVICE, _MAPPING = 0x1000, 0x1100, 0x1300
_MEGABYTES = 20
_ANCHOR_ROOM = 32
_OTHER, _UNKNOWN, _NO_ERROR_INFORMATION = 1, 2, 0xFFFE


class SmbiosFiles(NamedTuple):
    """The entry point, whose table address firmware fills in, and the tables."""

    anchor: bytes
    tables: bytes


def build(name: str, cpus: int, memory_size: int, version: str) -> SmbiosFiles:
    """For a machine called `name`, whose UUID is the same for the same name."""
    tables = b"".join(
        [
            _table(0, 0, _bios(), VENDOR, version, "01/01/2026"),
            _table(1, 0x100, _system(name), VENDOR, PRODUCT, version, name),
            _table(3, 0x300, _chassis(), VENDOR),
            *(_table(4, 0x400 + index, _processor(), f"CPU {index}", VENDOR) for index in range(cpus)),
            _table(16, _PHYSICAL_ARRAY, _array(memory_size)),
            _table(17, _DEVICE, _device(memory_size), "DIMM 0", VENDOR),
            *(
                _table(19, _MAPPING + index, _mapping(start, size))
                for index, (start, size) in enumerate(_ranges(memory_size))
            ),
            _table(32, 0x2000, bytes(6) + b"\0"),
            _table(127, 0x7F00, b""),
        ]
    )
    anchor = bytearray(struct.pack("<5sBBBBBBBIQ", b"_SM3_", 0, 24, 3, 2, 0, 1, 0, len(tables), 0))
    anchor[5] = -sum(anchor) & 0xFF
    return SmbiosFiles(bytes(anchor), tables)


def placed(name: str, cpus: int, memory_size: int, version: str) -> bytes:
    """The entry point and its tables, for `board.SMBIOS_ADDRESS`."""
    files = build(name, cpus, memory_size, version)
    anchor = bytearray(files.anchor.ljust(_ANCHOR_ROOM, b"\0"))
    struct.pack_into("<Q", anchor, 16, board.SMBIOS_ADDRESS + _ANCHOR_ROOM)
    anchor[5] = (anchor[5] - sum(anchor)) & 0xFF
    return bytes(anchor) + files.tables


def _table(kind: int, handle: int, body: bytes, *strings: str) -> bytes:
    """One structure: strings are numbered from 1 and end in an empty one, so none of them may be empty."""
    text = b"".join(_printable(one) + b"\0" for one in strings) or b"\0"
    return struct.pack("<BBH", kind, 4 + len(body), handle) + body + text + b"\0"


def _printable(text: str) -> bytes:
    """`text` as firmware may show it: a NUL in it would end the string, a line break the line."""
    return bytes(ord(one) if " " <= one <= "~" else ord("?") for one in text) or b"?"


def _bios() -> bytes:
    characteristics = 1 << 3  # the characteristics are not supported
    extension = 1 << 3 | 1 << 4  # UEFI, a virtual machine
    return struct.pack("<BBHBBQBBBBBBH", 1, 2, 0, 3, 0, characteristics, 0, extension, 0, 0, 0xFF, 0xFF, 0)


def _system(name: str) -> bytes:
    power_switch = 6
    return struct.pack("<BBBB16sBBB", 1, 2, 3, 4, _uuid(name), power_switch, 0, 0)


def _uuid(name: str) -> bytes:
    """RFC 9562's version 5, three fields of it little-endian. To import `uuid` takes longer than all this."""
    made = bytearray(sha1(_OUR_NAMES + name.encode(), usedforsecurity=False).digest()[:16])
    made[6] = made[6] & 0x0F | 0x50
    made[8] = made[8] & 0x3F | 0x80
    return bytes(made[3::-1] + made[5:3:-1] + made[7:5:-1] + made[8:])


def _chassis() -> bytes:
    safe = 3
    return struct.pack("<BBBBBBBBBIBBBBB", 1, _OTHER, 0, 0, 0, safe, safe, safe, _UNKNOWN, 0, 0, 0, 0, 0, 0)


def _processor() -> bytes:
    central, populated_and_enabled, no_cache = 3, 0x41, 0xFFFF
    head = struct.pack("<BBBBQBBHHHBB", 1, central, 1, 2, 0, 0, 0, 0, 0, 0, populated_and_enabled, _OTHER)
    tail = struct.pack("<HHHBBBBBBHHHHH", no_cache, no_cache, no_cache, 0, 0, 0, 1, 1, 1, 4, 1, 1, 1, 1)
    return head + tail


def _array(memory_size: int) -> bytes:
    system_board, system_memory, no_correction = 3, 3, 3
    kilobytes = memory_size >> 10
    small = kilobytes if kilobytes < 1 << 31 else 1 << 31
    large = 0 if small == kilobytes else memory_size
    return struct.pack(
        "<BBBIHHQ", system_board, system_memory, no_correction, small, _NO_ERROR_INFORMATION, 1, large
    )


def _device(memory_size: int) -> bytes:
    dimm, ram = 9, 7
    megabytes = memory_size >> _MEGABYTES
    size, extended = (megabytes, 0) if megabytes < 0x7FFF else (0x7FFF, megabytes)
    head = struct.pack(
        "<HHHHHBBBBBHHBBBBB",
        _PHYSICAL_ARRAY,
        _NO_ERROR_INFORMATION,
        0xFFFF,
        0xFFFF,
        size,
        dimm,
        0,
        1,
        0,
        ram,
        2,
        0,
        2,
        0,
        0,
        0,
        0,
    )
    dram, volatile_memory = 3, 1 << 3
    # Since SMBIOS 3.2: what it is made of, and how much of it forgets. No makers, nothing that lasts.
    since_3_2 = struct.pack("<BHBHHHHQQQQ", dram, volatile_memory, 0, 0, 0, 0, 0, 0, memory_size, 0, 0)
    return head + struct.pack("<IHHHH", extended, 0, 0, 0, 0) + since_3_2


def _mapping(start: int, size: int) -> bytes:
    first, last = start >> 10, (start + size >> 10) - 1
    if last < 0xFFFFFFFF:
        return struct.pack("<IIHBQQ", first, last, _PHYSICAL_ARRAY, 1, 0, 0)
    return struct.pack("<IIHBQQ", 0xFFFFFFFF, 0xFFFFFFFF, _PHYSICAL_ARRAY, 1, start, start + size - 1)


def _ranges(memory_size: int) -> list[tuple[int, int]]:
    low = min(memory_size, board.RAM_LOW_LIMIT)
    found = [(0, low)]
    if memory_size > low:
        found.append((board.RAM_HIGH_BASE, memory_size - low))
    return found
