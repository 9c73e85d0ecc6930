"""The block allocation table: where each block lies, every entry checked before it is believed."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path

from hvkvm.block.vhdx import layout
from hvkvm.block.vhdx.layout import MIB, SECTOR, Geometry
from hvkvm.block.vhdx.pages import Pages
from hvkvm.block.vhdx.patched import Source
from hvkvm.block.vhdx.regions import Region
from hvkvm.errors import ImageDamaged

ENTRIES_A_PAGE = SECTOR // 8
_NO_ENTRIES = bytes(SECTOR)

CHECKED_ENTRIES = 1 << 17
"""A BAT of so many entries (1 MiB) is checked whole when it is opened; a larger one as its pages are read."""


class Bat:
    """The BAT in `region`; `taken` are the parts of the file where no block can lie."""

    def __init__(
        self, path: Path, source: Source, region: Region, geometry: Geometry, taken: list[Region]
    ) -> None:
        if geometry.entries * 8 > region.length:
            what = f"{region.length:#x} bytes, too few for {geometry.entries} entries"
            raise ImageDamaged(path, "BAT", region.offset, what)
        self.region = region
        self.geometry = geometry
        self.path = path
        self._taken = taken
        self._end = source.size()
        self.pages = Pages(source, self._check_page, self._turn)
        if geometry.entries <= CHECKED_ENTRIES:
            self.check_overlaps()

    def get(self, index: int) -> int:
        """The entry: a file offset, and a state in its low bits. OSError, ImageDamaged."""
        page, at = divmod(index, ENTRIES_A_PAGE)
        words = self.pages.get(self.region.offset + page * SECTOR)
        return int.from_bytes(words[at * 8 : at * 8 + 8], "little")

    def absent(self, block: int) -> int:
        """How many payload blocks from `block` on have an entry of zero, as far as one page of the BAT says.

        For who goes through a disk: a large one has millions of blocks, and most of them were never written.
        """
        geometry = self.geometry
        page, at = divmod(geometry.payload_index(block), ENTRIES_A_PAGE)
        words = self.pages.get(self.region.offset + page * SECTOR)
        if words[at * 8]:
            return 0
        rest = words[at * 8 :]
        zeros = (len(rest) - len(rest.lstrip(b"\0"))) // 8
        # Behind the last block of a chunk is the entry of its bitmap.
        return min(zeros, geometry.chunk_ratio - block % geometry.chunk_ratio, geometry.blocks - block)

    def peek(self, index: int) -> int | None:
        """The entry, if its page is in memory; None if the file would have to be read for it."""
        page, at = divmod(index, ENTRIES_A_PAGE)
        words = self.pages.peek(self.region.offset + page * SECTOR)
        return None if words is None else int.from_bytes(words[at * 8 : at * 8 + 8], "little")

    def set(self, index: int, entry: int) -> None:
        """Change an entry. With `pages.lock` held."""
        page, at = divmod(index, ENTRIES_A_PAGE)
        self.pages.change(self.region.offset + page * SECTOR, at * 8, entry.to_bytes(8, "little"))

    def present(self) -> Iterator[tuple[int, int, int]]:
        """Each block that is in the file: its offset, its length, the index of its entry."""
        block_size = self.geometry.block_size
        for first in range(0, self.geometry.entries, ENTRIES_A_PAGE):
            page = self.pages.get(self.region.offset + first * 8)
            if page == _NO_ENTRIES:
                continue
            for index, entry in enumerate(_words(page)[: self.geometry.entries - first], first):
                if entry & layout.STATE_MASK >= layout.FULLY_PRESENT:
                    length = MIB if self.geometry.is_bitmap(index) else block_size
                    yield entry & layout.OFFSET_MASK, length, index

    def check_overlaps(self) -> None:
        """No two blocks may lie upon one another. ImageDamaged."""
        end, before = 0, 0
        for offset, length, index in sorted(self.present()):
            if offset < end:
                what = f"lies at {offset:#x}, upon the block of entry {before}"
                raise ImageDamaged(self.path, f"BAT entry {index}", self.region.offset + index * 8, what)
            end, before = offset + length, index

    def _turn(self, offset: int) -> tuple[int, int]:
        """The order in which pages are logged: whatever leads to something, behind that.

        A flush may need several log entries, and a crash lose the later ones. Sector bitmaps come first: a
        bit says nothing before its payload block is partially present, and is cleared before that. Then the
        BAT from its end, for a chunk's bitmap block has its entry behind those of the payload blocks. Last
        the size, which lets new entries count. Regions may lie anywhere: the offset alone would not do.
        """
        if self.region.offset <= offset < self.region.offset + self.region.length:
            return 1, -offset
        return 2 if any(one.offset <= offset < one.offset + one.length for one in self._taken) else 0, offset

    def _check_page(self, offset: int, page: bytes) -> None:
        at = offset - self.region.offset
        if not 0 <= at < self.region.length:
            return  # a page of something else
        first = at // 8
        geometry = self.geometry
        for index, entry in enumerate(_words(page)[: max(0, geometry.entries - first)], first):
            if entry:
                self._check_entry(index, entry)

    def _check_entry(self, index: int, entry: int) -> None:
        geometry = self.geometry
        bitmap = geometry.is_bitmap(index)
        state = entry & layout.STATE_MASK
        offset = entry & layout.OFFSET_MASK
        length = MIB if bitmap else geometry.block_size
        what = ""
        if state not in (layout.BITMAP_STATES if bitmap else layout.PAYLOAD_STATES):
            what = f"state {state}, which no {'bitmap' if bitmap else 'payload'} block has"
        elif entry & layout.RESERVED_MASK:
            what = f"{entry:#x}: reserved bits are set"
        elif state == layout.PARTIALLY_PRESENT and not geometry.has_parent:
            what = "partially present, in a disk without parent"
        elif state >= layout.FULLY_PRESENT:
            if bitmap and not geometry.has_parent:
                what = "a bitmap block, in a disk without parent"
            elif offset + length > self._end:
                what = f"lies at {offset:#x}, beyond the end of the file"
            else:
                for other in self._taken:
                    if offset < other.offset + other.length and other.offset < offset + length:
                        what = f"lies at {offset:#x}, upon the part of the file at {other.offset:#x}"
        if what:
            raise ImageDamaged(self.path, f"BAT entry {index}", self.region.offset + index * 8, what)

    def grown(self, end: int) -> None:
        """The file has `end` bytes now."""
        self._end = max(self._end, end)


def _words(page: bytes) -> array[int]:
    words = array("Q")
    words.frombytes(page)
    return words
