"""The kernel log (dmesg) of a Linux guest, read out of its RAM: no agent, no console, no vCPU that runs.

Linux leaves a note for crash dump tools, VMCOREINFO (Documentation/admin-guide/kdump/vmcoreinfo.rst): where
its log is, the offsets of the fields that lead there, and its page tables. The log is a ring of descriptors
and a ring of text (kernel/printk/printk_ringbuffer.h, Linux 5.10 and later). The note is there from
`subsys_initcall` on, so a kernel that stops before has none.

Everything read here is the guest's to write: each number is bounded before it is used, and what makes no
sense ends as NoKernelLog, nothing else. The guest may run meanwhile: a record that it overwrites is left
out. Any thread but a vCPU's and the I/O loop's, since a search of RAM takes long.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Protocol

from hvkvm.abi.board import RAM_HIGH_BASE, RAM_LOW_LIMIT
from hvkvm.errors import GuestMemoryError, HvkvmError, harmless
from hvkvm.tuples import NamedTuple

MOST_LINES = 20_000
MOST_CHARACTERS = 1 << 19
"""Of one answer; of a longer log the newest lines."""
MOST_NOTES = 64
"""Linux leaves one; each kernel that ran in this RAM before may have left another."""
MOST_RECORDS = 80_000
"""Looked at, newest first."""

_PAGE = 4096
_MARK = b"VMCOREINFO\0\0OSRELEASE="
_NAME_AT, _NAME_BYTES = 12, 12  # behind Elf64_Nhdr; "VMCOREINFO" and its padding
_NOTE_BYTES = 4 * _PAGE
_MOST_RECORD_BITS = 26
_MOST_DATA_BITS = 31
_KERNEL_MAP = 0xFFFF_FFFF_8000_0000  # __START_KERNEL_map
_PRESENT, _HUGE = 1, 1 << 7
_FRAME = 0x000F_FFFF_FFFF_F000
# The two top bits of prb_desc.state_var (printk_ringbuffer.h): committed, finalized.
_READABLE = (1, 2)
_ID_MASK = (1 << 62) - 1


class NoKernelLog(HvkvmError):
    """There is none to be found, and the text says why."""


class Ram(Protocol):
    """What `GuestMemory` has."""

    def read(self, gpa: int, n: int) -> bytes:
        """A copy; GuestMemoryError for what is no RAM."""

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        """RAM that may not be zero: whole pages, by offset without the hole below 4 GiB."""


class Line(NamedTuple):
    """One line of a record; `seconds` since the guest's boot, as dmesg shows it."""

    seconds: float
    text: str

    def __str__(self) -> str:
        """As dmesg prints it, without anything that a terminal would obey."""
        return f"[{self.seconds:12.6f}] {harmless(self.text)}"


def read(ram: Ram, cr3s: Iterable[int] = ()) -> list[Line]:
    """The log, oldest line first. NoKernelLog.

    `cr3s` are page table roots of vCPUs: where several kernels have left notes, the one that
    they run under is taken.
    """
    notes = list(_notes(ram))
    if not notes:
        raise NoKernelLog("no Linux in this RAM has left a VMCOREINFO note")
    if len(notes) > 1:  # only then are the vCPUs asked: one that is stuck takes long not to answer
        roots = [cr3 & _FRAME for cr3 in cr3s]
        notes.sort(key=lambda note: not note.is_under(roots))
    why = NoKernelLog("")
    for note in notes:
        try:
            return note.log()
        except NoKernelLog as error:
            why = error
    raise why


def _notes(ram: Ram) -> Iterator[_Note]:
    for gpa in islice(_marks(ram), MOST_NOTES):
        try:
            yield _Note(ram, gpa)
        except NoKernelLog:
            continue  # bytes that look like one


def _marks(ram: Ram) -> Iterator[int]:
    """Where a page begins as the note does."""
    try:
        for offset, piece in ram.pieces():
            at = piece.find(_MARK)
            while at >= 0:
                if at % _PAGE == _NAME_AT:
                    place = offset + at - _NAME_AT
                    yield place if place < RAM_LOW_LIMIT else place - RAM_LOW_LIMIT + RAM_HIGH_BASE
                at = piece.find(_MARK, at + 1)
    except (GuestMemoryError, OSError) as error:
        raise NoKernelLog(f"the guest's RAM cannot be read: {error}") from None


class _Note:
    """A VMCOREINFO note, and the kernel that it describes."""

    def __init__(self, ram: Ram, gpa: int) -> None:
        self._ram = ram
        size = min(int.from_bytes(_bytes(ram, gpa + 4, 4), "little"), _NOTE_BYTES)
        text = _bytes(ram, gpa + _NAME_AT + _NAME_BYTES, size).decode("ascii", "replace")
        self._words = dict(line.partition("=")[::2] for line in text.split("\n"))
        self._levels = 5 if self._words.get("NUMBER(pgtable_l5_enabled)") == "1" else 4
        self._shift = self._number("NUMBER(phys_base)", 10)
        self._root = self._physical("SYMBOL(init_top_pgt)") & _FRAME
        self._pages: dict[int, int] = {}

    def _number(self, name: str, base: int) -> int:
        try:
            return int(self._words[name], base)
        except (KeyError, ValueError):
            raise NoKernelLog(f"its VMCOREINFO note does not say {name}: Linux before 5.10?") from None

    def _symbol(self, name: str) -> int:
        return self._number(f"SYMBOL({name})", 16)

    def _offset(self, name: str) -> int:
        return self._small(f"OFFSET({name})")

    def _small(self, name: str) -> int:
        value = self._number(name, 10)
        if not 0 <= value < _PAGE:
            raise NoKernelLog(f"its VMCOREINFO note has {name}={value}")
        return value

    def _physical(self, name: str) -> int:
        """Where a symbol of the kernel's image is."""
        return self._number(name, 16) - _KERNEL_MAP + self._shift

    def is_under(self, roots: list[int]) -> bool:
        """Whether one of these page tables has this kernel's log where the note says."""
        try:
            wanted = self._physical("SYMBOL(prb)")
            address = self._symbol("prb")
        except NoKernelLog:
            return False
        for root in roots:
            try:
                if self._walk(root, address) == wanted:
                    return True
            except NoKernelLog:
                continue
        return False

    def _walk(self, root: int, address: int) -> int:
        """The guest-physical address of `address` under the page table `root`."""
        table, level = root, self._levels
        while True:
            shift = 3 + 9 * level
            entry = int.from_bytes(_bytes(self._ram, table + (address >> shift & 511) * 8, 8), "little")
            if not entry & _PRESENT:
                raise NoKernelLog(f"its page tables do not map {address:#x}")
            if level == 1 or (level < 4 and entry & _HUGE):
                below = (1 << shift) - 1
                return (entry & _FRAME & ~below) | (address & below)
            table, level = entry & _FRAME, level - 1

    def _at(self, address: int, n: int) -> bytes:
        """`n` bytes at an address of the kernel's."""
        found = b""
        while len(found) < n:
            here = address + len(found)
            page = self._pages.get(here >> 12)
            if page is None:
                page = self._pages[here >> 12] = self._walk(self._root, here) & _FRAME
            at = here % _PAGE
            found += _bytes(self._ram, page + at, min(n - len(found), _PAGE - at))
        return found

    def _u32(self, address: int) -> int:
        return int.from_bytes(self._at(address, 4), "little")

    def _u64(self, address: int) -> int:
        return int.from_bytes(self._at(address, 8), "little")

    def log(self) -> list[Line]:
        """The lines of every record that can be read, oldest first; see MOST_LINES, MOST_CHARACTERS."""
        lines: list[Line] = []
        left = MOST_CHARACTERS
        for seconds, text in self._records():  # newest first
            record = [Line(seconds, part) for part in text.split("\n")]
            left -= sum(map(len, record)) + len(text)
            if left < 0 or len(lines) + len(record) > MOST_LINES:
                break
            lines += reversed(record)
        lines.reverse()
        return lines

    def _records(self) -> Iterator[tuple[float, str]]:
        ring = self._u64(self._symbol("prb"))
        descs = ring + self._offset("printk_ringbuffer.desc_ring")
        texts = ring + self._offset("printk_ringbuffer.text_data_ring")
        bits = self._u32(descs + self._offset("prb_desc_ring.count_bits"))
        data_bits = self._u32(texts + self._offset("prb_data_ring.size_bits"))
        if bits > _MOST_RECORD_BITS or not 8 <= data_bits <= _MOST_DATA_BITS:
            raise NoKernelLog(f"its log has rings of 2^{bits} records and 2^{data_bits} bytes")
        counter = self._offset("atomic_long_t.counter")
        newest = self._u64(descs + self._offset("prb_desc_ring.head_id") + counter) & _ID_MASK
        oldest = self._u64(descs + self._offset("prb_desc_ring.tail_id") + counter) & _ID_MASK
        count = min((newest - oldest) & _ID_MASK, (1 << bits) - 1) + 1
        layout = _Layout(
            self._u64(descs + self._offset("prb_desc_ring.descs")),
            self._small("SIZE(prb_desc)"),
            self._offset("prb_desc.state_var") + counter,
            self._offset("prb_desc.text_blk_lpos") + self._offset("prb_data_blk_lpos.begin"),
            self._offset("prb_desc.text_blk_lpos") + self._offset("prb_data_blk_lpos.next"),
            self._u64(descs + self._offset("prb_desc_ring.infos")),
            self._small("SIZE(printk_info)"),
            self._offset("printk_info.ts_nsec"),
            self._offset("printk_info.text_len"),
            self._u64(texts + self._offset("prb_data_ring.data")),
            1 << data_bits,
        )
        for number in range(min(count, MOST_RECORDS)):
            ident = (newest - number) & _ID_MASK
            try:
                found = self._record(layout, ident, ident & ((1 << bits) - 1))
            except NoKernelLog:
                continue
            if found is not None:
                yield found

    def _record(self, layout: _Layout, ident: int, index: int) -> tuple[float, str] | None:
        desc = layout.descs + index * layout.desc_size
        state = self._u64(desc + layout.state)
        if state & _ID_MASK != ident or state >> 62 not in _READABLE:
            return None
        begin, end = self._u64(desc + layout.begin), self._u64(desc + layout.end)
        if begin & 1:
            return None  # a record without text
        info = layout.infos + index * layout.info_size
        (nanoseconds,) = struct.unpack("<Q", self._at(info + layout.time, 8))
        (length,) = struct.unpack("<H", self._at(info + layout.length, 2))
        # A block that would reach over the ring's end lies at its start instead.
        at = begin % layout.size if begin // layout.size == (end - 1) // layout.size else 0
        length = max(
            0, min(length, end % layout.size - at - 8 if end % layout.size else layout.size - at - 8)
        )
        text = self._at(layout.data + at + 8, length).decode("utf-8", "replace")
        if self._u64(desc + layout.state) & _ID_MASK != ident:
            return None  # overwritten meanwhile
        return nanoseconds / 1e9, text


class _Layout(NamedTuple):
    """Where one kernel has what: addresses, and offsets into its structures."""

    descs: int
    desc_size: int
    state: int
    begin: int
    end: int
    infos: int
    info_size: int
    time: int
    length: int
    data: int
    size: int


def _bytes(ram: Ram, gpa: int, n: int) -> bytes:
    try:
        return ram.read(gpa, n)
    except GuestMemoryError:
        raise NoKernelLog(f"its page tables or its note lead to {gpa:#x}, which is no RAM") from None
