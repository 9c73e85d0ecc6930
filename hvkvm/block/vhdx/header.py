"""The two headers of a VHDX file, of which the newer valid one counts; the other is written next.

So a header that is torn by a crash leaves the one before it.
"""

from __future__ import annotations

from pathlib import Path

from hvkvm.block.vhdx.layout import (
    FILE_IDENTIFIER_OFFSET,
    FILE_SIGNATURE,
    HEADER_BYTES,
    HEADER_OFFSETS,
    HEADER_SECTION_BYTES,
    HEADER_SIGNATURE,
    MIB,
    header,
    is_sealed,
    seal,
)
from hvkvm.block.vhdx.patched import Source
from hvkvm.errors import ImageDamaged
from hvkvm.tuples import NamedTuple

VERSION = 1
LOG_VERSION = 0
MAX_SEQUENCE = 1 << 63


class Header(NamedTuple):
    """What a header says; `slot` 0 or 1 is where it lies."""

    slot: int
    sequence: int
    file_write_guid: bytes
    data_write_guid: bytes
    log_guid: bytes
    log_length: int
    log_offset: int

    def pack(self) -> bytes:
        """Its bytes, sealed."""
        fields = (
            HEADER_SIGNATURE,
            0,
            self.sequence,
            self.file_write_guid,
            self.data_write_guid,
            self.log_guid,
        )
        raw = header.pack(*fields, LOG_VERSION, VERSION, self.log_length, self.log_offset)
        return seal(raw.ljust(HEADER_BYTES, b"\0"))

    @property
    def offset(self) -> int:
        """Where in the file it lies."""
        return HEADER_OFFSETS[self.slot]

    def next(self, **changes: bytes) -> Header:
        """The one to write after this one."""
        return self._replace(slot=1 - self.slot, sequence=self.sequence + 1, **changes)  # type: ignore[arg-type]


def read_header(path: Path, source: Source) -> Header:
    """The current header. ImageDamaged."""
    if source.pread(FILE_IDENTIFIER_OFFSET, 8) != FILE_SIGNATURE:
        raise ImageDamaged(path, "file type identifier", 0, "not vhdxfile; this is no VHDX")
    found = []
    why = "is not whole"
    for slot, offset in enumerate(HEADER_OFFSETS):
        raw = source.pread(offset, HEADER_BYTES)
        if len(raw) < HEADER_BYTES:
            why = "lies beyond the end of the file"
        elif raw[:4] != HEADER_SIGNATURE:
            why = "has no signature"
        elif not is_sealed(raw):
            why = "has a wrong checksum"
        else:
            fields = header.unpack_from(raw)
            found.append((fields[2], slot, fields))
    if not found:
        raise ImageDamaged(
            path, "header", HEADER_OFFSETS[0], f"neither of the two is valid: the second {why}"
        )
    found.sort()
    if len(found) == 2 and found[0][0] == found[1][0] and found[0][2] != found[1][2]:
        raise ImageDamaged(path, "header", HEADER_OFFSETS[0], "both have one sequence number, and differ")
    sequence, slot, fields = found[-1]
    offset = HEADER_OFFSETS[slot]
    log_version, version, log_length, log_offset = fields[6:]
    if version != VERSION:
        raise ImageDamaged(path, "header", offset, f"version {version}, of which nothing is known")
    if sequence > MAX_SEQUENCE:
        raise ImageDamaged(
            path, "header", offset, f"sequence number {sequence}, which leaves none for the next"
        )
    if log_version != LOG_VERSION and any(fields[5]):
        raise ImageDamaged(path, "header", offset, f"log version {log_version}, of which nothing is known")
    if log_length % MIB or log_offset % MIB or log_offset < HEADER_SECTION_BYTES or not log_length:
        what = f"a log of {log_length:#x} bytes at {log_offset:#x}: not whole MiB behind the headers"
        raise ImageDamaged(path, "header", offset, what)
    return Header(slot, sequence, fields[3], fields[4], fields[5], log_length, log_offset)
