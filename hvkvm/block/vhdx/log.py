"""The log of a VHDX file, read: which of its entries count, and what they change ([MS-VHDX] section 2.3).

The log is a ring of 4 KiB sectors. An entry is whole or does not count; the entries that count run without
a gap of position or number from the one that the newest entry names as its tail to the newest one. Whoever
made the file may have filled the log with entries that lie: however they do, it is read once.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from operator import itemgetter
from pathlib import Path

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
from hvkvm.tuples import NamedTuple

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
    """What the log changes: whole sectors by file offset, ranges of zeros, and the size of the file.

    The ranges are offset and length, disjoint and in order; what lies in a sector of `sectors` is newer.
    """

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
    changes = _Changes()
    for entry in chain:
        _collect(path, head, entry, changes)
    return Replay(changes.sectors, changes.zeroed, newest.last, len(chain))


def _whole_entries(file: HostFile, head: Header) -> dict[int, Entry]:
    """The valid entries by their offset in the log, of which no two overlap."""
    places = [
        start + within
        for start in range(0, head.log_length, MIB)
        for within in _signed(file.pread(head.log_offset + start, MIB))
    ]
    found: dict[int, Entry] = {}
    for number, at in enumerate(places):
        following = places[number + 1] if number + 1 < len(places) else places[0] + head.log_length
        entry = _parse(file, head, at, following - at)
        if entry is not None:
            found[at] = entry
    return found


def _signed(piece: bytes) -> list[int]:
    """Where sectors are that say that an entry begins."""
    return [at for at in range(0, len(piece), SECTOR) if piece[at : at + 4] == LOG_SIGNATURE]


def _parse(file: HostFile, head: Header, at: int, room: int) -> Entry | None:
    """The entry at `at` if it is whole. It ends before `room` bytes, where the next one may begin.

    All its other sectors have another signature. So the log is read once, however many entries lie about
    their length.
    """
    first = file.pread(head.log_offset + at, SECTOR)
    fields = log_entry_header.unpack_from(first)
    _signature, _checksum, length, tail, sequence, count, _reserved, guid, flushed, last = fields
    if guid != head.log_guid or not sequence or not SECTOR <= length <= room or length % SECTOR:
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
    before = {(one.at + one.length) % log_length: one for one in entries.values()}
    begins: dict[int, int] = {}
    """By an entry's place: where those begin that lead to it without a gap."""
    ordered = sorted(entries.values(), key=lambda one: one.sequence)
    for entry in ordered:
        last = before.get(entry.at)
        follows = last is not None and last.sequence + 1 == entry.sequence
        begins[entry.at] = begins[last.at] if last is not None and follows else entry.at
    for head in reversed(ordered):
        tail = entries.get(head.tail)
        if tail is None or tail.sequence > head.sequence or begins[tail.at] != begins[head.at]:
            continue
        chain = [tail]
        while chain[-1] is not head:
            chain.append(entries[(chain[-1].at + chain[-1].length) % log_length])
        return chain
    return []


class _Changes:
    """What entries change, in their order: later ones win. Ranges of zeros are disjoint and in order."""

    def __init__(self) -> None:
        self.sectors: dict[int, bytes] = {}
        self._order: list[int] = []
        self.zeroed: list[tuple[int, int]] = []

    def write(self, offset: int, data: bytes) -> None:
        """One sector."""
        if offset not in self.sectors:
            insort(self._order, offset)
        self.sectors[offset] = data

    def zero(self, offset: int, length: int) -> None:
        """A range, joined with those that it meets."""
        end = offset + length
        first, last = bisect_left(self._order, offset), bisect_left(self._order, end)
        for start in self._order[first:last]:
            del self.sectors[start]
        del self._order[first:last]
        first = bisect_left(self.zeroed, offset, key=sum)
        last = bisect_right(self.zeroed, end, key=itemgetter(0))
        if first < last:
            offset, end = min(offset, self.zeroed[first][0]), max(end, sum(self.zeroed[last - 1]))
        self.zeroed[first:last] = [(offset, end - offset)]


def _collect(path: Path, head: Header, entry: Entry, changes: _Changes) -> None:
    """Add what `entry` changes."""
    raw = entry.raw
    data = -(-(log_entry_header.size + entry.descriptors * DESCRIPTOR_BYTES) // SECTOR) * SECTOR
    for number in range(entry.descriptors):
        where = log_entry_header.size + number * DESCRIPTOR_BYTES
        if raw[where : where + 4] == ZERO_SIGNATURE:
            _signature, length, offset, _sequence = zero_descriptor.unpack_from(raw, where)
            _check_target(path, head, entry, where, offset, length)
            changes.zero(offset, length)
        else:
            _signature, trailing, leading, offset, _sequence = data_descriptor.unpack_from(raw, where)
            _check_target(path, head, entry, where, offset, SECTOR)
            # The first 8 and the last 4 bytes are in the descriptor: the sector has its marks there.
            changes.write(offset, leading + raw[data + 8 : data + SECTOR - 4] + trailing)
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
