"""What every ACPI table has: the standard header, its checksum, and how a register of it is named. Pure."""

from __future__ import annotations

import struct

OEM_ID = b"HVKVM "
_CREATOR = b"HVKV"
_REVISION = 1

HEADER_SIZE = 36
_SYSTEM_MEMORY, _SYSTEM_IO = 0, 1


def checksum(data: bytes | bytearray) -> int:
    """The byte that makes `data` sum up to 0, where it has 0 in its place."""
    return -sum(data) & 0xFF


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A table with the standard header around `body`."""
    made = bytearray(
        struct.pack(
            "<4sIBB6s8sI4sI",
            signature,
            HEADER_SIZE + len(body),
            revision,
            0,
            OEM_ID,
            b"HVKVM" + signature[:3],
            _REVISION,
            _CREATOR,
            _REVISION,
        )
    )
    made += body
    made[9] = checksum(made)
    return bytes(made)


def port_address(port: int, width: int, access: int) -> bytes:
    """Generic Address Structure of an I/O port: `width` in bits, `access` 1 byte, 2 word, 3 dword."""
    return struct.pack("<BBBBQ", _SYSTEM_IO, width, 0, access, port)


def memory_address(gpa: int, width: int) -> bytes:
    """Likewise of memory; what accesses are good is not said."""
    return struct.pack("<BBBBQ", _SYSTEM_MEMORY, width, 0, 0, gpa)
