"""The log of a VHDX file, written: metadata reaches its place only after the log holds it, stable.

A batch of at most 126 sectors is one entry, so it counts as a whole or not at all. Each entry is its own
tail: when it is written, everything before it is in its place and stable, which `VhdxImage.flush` sees to.
An entry never overwrites the one before it, since each has less than half of the log: so a torn entry
leaves one that replays what is in place already.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import urandom

from hvkvm.block.host_file import HostFile
from hvkvm.block.vhdx.header import Header
from hvkvm.block.vhdx.layout import (
    DATA_SIGNATURE,
    DESC_SIGNATURE,
    DESCRIPTOR_BYTES,
    LOG_SIGNATURE,
    NO_GUID,
    SECTOR,
    data_descriptor,
    data_sector,
    log_entry_header,
    seal,
)

BATCH = (SECTOR - log_entry_header.size) // DESCRIPTOR_BYTES
"""Sectors that one entry takes: as many as its first sector has descriptors for."""


class LogWriter:
    """Writes to the log of `file`; `head` is its current header, which has an empty log."""

    def __init__(self, file: HostFile, head: Header) -> None:
        self.head = head
        self._file = file
        self._at = 0
        self._sequence = 1

    def commit(self, sectors: Sequence[tuple[int, bytes]], file_size: int) -> None:
        """Log 4 KiB `sectors` by file offset, at most BATCH, make that stable, then put them in their place.

        The file has `file_size` bytes, and is stable so. That they are stable in their place is the
        next sync's matter, before the next commit. OSError.
        """
        file, head = self._file, self.head
        guid = head.log_guid if head.log_guid != NO_GUID else urandom(16)
        entry = _build(sectors, guid, self._sequence, self._at, file_size)
        if self._at + len(entry) > head.log_length:
            first = head.log_length - self._at
            file.pwrite(head.log_offset + self._at, entry[:first])
            file.pwrite(head.log_offset, entry[first:])
        else:
            file.pwrite(head.log_offset + self._at, entry)
        file.sync()
        if head.log_guid == NO_GUID:
            # Only now: a header that names a log without a whole entry would be damage.
            self.write_header(log_guid=guid)
        self._at = (self._at + len(entry)) % head.log_length
        self._sequence += 1
        for offset, data in sectors:
            file.pwrite(offset, data)

    def write_header(self, **changes: bytes) -> None:
        """Make a changed header the current one, stable, then the other, too, in case one rots. OSError."""
        for _ in range(2):
            head = self.head.next(**changes)
            self._file.pwrite(head.offset, head.pack())
            self._file.sync()
            self.head = head

    def close(self) -> None:
        """Say that the log is empty: everything is in its place and stable. OSError."""
        if self.head.log_guid != NO_GUID:
            self.write_header(log_guid=NO_GUID)


def _build(
    sectors: Sequence[tuple[int, bytes]], guid: bytes, sequence: int, tail: int, file_size: int
) -> bytes:
    length = SECTOR * (1 + len(sectors))
    head = log_entry_header.pack(
        LOG_SIGNATURE, 0, length, tail, sequence, len(sectors), 0, guid, file_size, file_size
    )
    descriptors = b"".join(
        data_descriptor.pack(DESC_SIGNATURE, data[-4:], data[:8], offset, sequence)
        for offset, data in sectors
    )
    bodies = b"".join(
        data_sector.pack(DATA_SIGNATURE, sequence >> 32, data[8:-4], sequence & 0xFFFFFFFF)
        for _offset, data in sectors
    )
    return seal((head + descriptors).ljust(SECTOR, b"\0") + bodies)
