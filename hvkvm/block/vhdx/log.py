"""The log of a VHDX file, read: which of its entries count, and what they change ([MS-VHDX] section 2.3).

The log is a ring of 4 KiB sectors. An entry is whole or does not count; the entries that count run without
a gap of position or number from the one that the newest entry names as its tail to the newest one.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from hvkvm.block.host_file import HostFile
from hvkvm.block.vhdx.header import Header
from hvkvm.block.vhdx.layout import (
    DATA_SIGNATURE,
    DESC_SIGNATURE,
    DESCRIPTOR_BYTES,
    HEADER_SECTION_BYTES,
    LOG_SIGNATURE,
    MIB,
    SECTOR,
    ZERO_SIGNATURE,
    data_descriptor,
    data_sector,
    is_sealed,
    log_entry_header,
    zero_descriptor,
)
from hvkvm.errors import ImageDamaged

MAX_FILE = 1 << 47
"""No file offset of a log lies beyond: twice what the largest disk needs."""


class Entry(NamedTuple):
    """A whole entry; `at` and `tail` are offsets in the log, the others of the file."""

    at: int
    length: int
    tail: int
    sequence: int
    flushed: int
    last: int
    raw: bytes
    descriptors: int


class Replay(NamedTuple):
    """What the log changes: whole sectors by file offset, ranges of zeros, and the size of the file."""

    sectors: dict[int, bytes]
    zeroed: list[tuple[int, int]]
    size: int
    entries: int


def read_log(path: Path, file: HostFile, head: Header) -> Replay | None:
    """What must be replayed; None for a log that is empty. ImageDamaged."""
    if head.log_offset + head.log_length > file.size():
        raise ImageDamaged(
            path, "log", head.log_offset, f"its {head.log_length:#x} bytes end beyond the file"
        )
    if not any(head.log_guid):
        return None
    entries = _whole_entries(file, head)
    chain = _active(entries, head.log_length)
    if not chain:
        what = "the header says that it is in use, but no entry is whole"
        raise ImageDamaged(path, "log", head.log_offset, what)
    newest = chain[-1]
    if file.size() < newest.flushed:
        what = (
            f"the file had {newest.flushed:#x} bytes when it was written, and has {file.size():#x}: it is cut"
        )
        raise ImageDamaged(path, "log entry", head.log_offset + newest.at, what)
    replay = Replay({}, [], newest.last, len(chain))
    for entry in chain:
        _collect(path, head, entry, replay)
    return replay


def _whole_entries(file: HostFile, head: Header) -> dict[int, Entry]:
    """The valid entries by their offset in the log."""
    found: dict[int, Entry] = {}
    skip_to = 0
    for start in range(0, head.log_length, MIB):
        piece = file.pread(head.log_offset + start, MIB)
        for within in range(0, len(piece), SECTOR):
            at = start + within
            if at < skip_to or piece[within : within + 4] != LOG_SIGNATURE:
                continue
            entry = _parse(file, head, at, piece[within : within + SECTOR])
            if entry is not None:
                found[at] = entry
                # No entry begins inside a whole one: each of its sectors has another signature.
                skip_to = at + entry.length
    return found


def _parse(file: HostFile, head: Header, at: int, first: bytes) -> Entry | None:
    fields = log_entry_header.unpack_from(first)
    _signature, _checksum, length, tail, sequence, count, _reserved, guid, flushed, last = fields
    if guid != head.log_guid or not sequence or not SECTOR <= length <= head.log_length or length % SECTOR:
        return None
    if tail % SECTOR or tail >= head.log_length or flushed > MAX_FILE or last > MAX_FILE:
        return None
    described = -(-(log_entry_header.size + count * DESCRIPTOR_BYTES) // SECTOR) * SECTOR
    if described > length:
        return None
    raw = file.pread(head.log_offset + at, min(length, head.log_length - at))
    if len(raw) < length:
        raw += file.pread(head.log_offset, length - len(raw))
    data = 0
    for number in range(count):
        where = log_entry_header.size + number * DESCRIPTOR_BYTES
        kind = raw[where : where + 4]
        if int.from_bytes(raw[where + 24 : where + 32], "little") != sequence:
            return None
        if kind == DESC_SIGNATURE:
            data += 1
        elif kind != ZERO_SIGNATURE:
            return None
    if described + data * SECTOR != length:
        return None
    for where in range(described, length, SECTOR):
        signature, high, _data, low = data_sector.unpack_from(raw, where)
        if signature != DATA_SIGNATURE or high != sequence >> 32 or low != sequence & 0xFFFFFFFF:
            return None
    if not is_sealed(raw):
        return None
    return Entry(at, length, tail, sequence, flushed, last, raw, count)


def _active(entries: dict[int, Entry], log_length: int) -> list[Entry]:
    """The entries from tail to head of the newest sequence that is whole."""
    for head in sorted(entries.values(), key=lambda one: -one.sequence):
        chain: list[Entry] = []
        entry = entries.get(head.tail)
        while entry is not None and entry.sequence <= head.sequence and len(chain) <= len(entries):
            if chain and entry.sequence != chain[-1].sequence + 1:
                break
            chain.append(entry)
            if entry is head:
                return chain
            entry = entries.get((entry.at + entry.length) % log_length)
    return []


def _collect(path: Path, head: Header, entry: Entry, replay: Replay) -> None:
    """Add what `entry` changes; later entries win."""
    raw = entry.raw
    data = -(-(log_entry_header.size + entry.descriptors * DESCRIPTOR_BYTES) // SECTOR) * SECTOR
    for number in range(entry.descriptors):
        where = log_entry_header.size + number * DESCRIPTOR_BYTES
        if raw[where : where + 4] == ZERO_SIGNATURE:
            _signature, length, offset, _sequence = zero_descriptor.unpack_from(raw, where)
            _check_target(path, head, entry, where, offset, length)
            for start in [one for one in replay.sectors if offset <= one < offset + length]:
                del replay.sectors[start]
            replay.zeroed.append((offset, length))
        else:
            _signature, trailing, leading, offset, _sequence = data_descriptor.unpack_from(raw, where)
            _check_target(path, head, entry, where, offset, SECTOR)
            # The first 8 and the last 4 bytes are in the descriptor: the sector has its marks there.
            replay.sectors[offset] = leading + raw[data + 8 : data + SECTOR - 4] + trailing
            data += SECTOR


def _check_target(path: Path, head: Header, entry: Entry, where: int, offset: int, length: int) -> None:
    what = ""
    if offset % SECTOR or length % SECTOR or not length:
        what = "not whole sectors of 4 KiB"
    elif offset < HEADER_SECTION_BYTES or offset + length > entry.last:
        what = "outside of what a log may change"
    elif offset < head.log_offset + head.log_length and head.log_offset < offset + length:
        what = "the log itself"
    if what:
        structure = f"log descriptor for {offset:#x}+{length:#x}"
        raise ImageDamaged(path, structure, head.log_offset + (entry.at + where) % head.log_length, what)
