"""Sector bitmaps of a differencing VHDX: which sectors of a block are its own, and which its parent's.

A bitmap block of 1 MiB has a bit for each of 2**23 sectors, those of one chunk of payload blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hvkvm.block.ranges import cut, runs
from hvkvm.block.vhdx.bat import Bat
from hvkvm.block.vhdx.layout import FULLY_PRESENT, MIB, OFFSET_MASK, SECTOR, STATE_MASK
from hvkvm.errors import ImageDamaged

SECTORS_A_PAGE = SECTOR * 8


class SectorBitmaps:
    """The bitmap blocks that `bat` names."""

    def __init__(self, bat: Bat) -> None:
        self._bat = bat
        self._pages = bat.pages

    def runs(self, block: int, within: int, length: int) -> Iterator[tuple[int, bool]]:
        """A range of a partially present block, cut where it changes: bytes, and whether they are its own."""
        size = self._bat.geometry.sector_size
        words = (
            (_bits(self._pages.get(page), bit, count), count)
            for page, bit, count in self._parts(block, within, length)
        )
        for run, ours in runs(words):
            yield run * size, ours

    def mark(self, block: int, within: int, length: int) -> None:
        """These sectors are its own; after their data is in the file."""
        self._change(block, within, length, present=True)

    def prepare(self, block: int, take_space: Callable[[int], int]) -> None:
        """A bitmap block with no bit set for `block`, which is about to get its place. With the lock held."""
        index = self._bat.geometry.bitmap_index(block)
        if self._bat.get(index) & STATE_MASK == FULLY_PRESENT:
            self._change(block, 0, self._bat.geometry.block_size, present=False)
        else:
            self._bat.set(index, take_space(MIB) | FULLY_PRESENT)

    def _change(self, block: int, within: int, length: int, *, present: bool) -> None:
        with self._pages.lock:
            for offset, bit, n in self._parts(block, within, length):
                page = self._pages.get(offset)
                first, last = bit // 8, -(-(bit + n) // 8)
                before = int.from_bytes(page[first:last], "little")
                mask = ((1 << n) - 1) << bit % 8
                after = before | mask if present else before & ~mask
                if after != before:
                    self._pages.change(offset, first, after.to_bytes(last - first, "little"))

    def _parts(self, block: int, within: int, length: int) -> Iterator[tuple[int, int, int]]:
        """The pages with the bits of a range: file offset, first bit, number of bits."""
        geometry = self._bat.geometry
        index = geometry.bitmap_index(block)
        entry = self._bat.get(index)
        if entry & STATE_MASK != FULLY_PRESENT:
            what = f"payload block {block} is partially present, and has no bitmap"
            raise ImageDamaged(
                self._bat.path, f"BAT entry {index}", self._bat.region.offset + index * 8, what
            )
        first = block % geometry.chunk_ratio * geometry.block_size + within
        sector, end = first // geometry.sector_size, (first + length) // geometry.sector_size
        for page, bit, n in cut(sector, end, SECTORS_A_PAGE):
            yield (entry & OFFSET_MASK) + page * SECTOR, bit, n


def _bits(page: bytes, bit: int, n: int) -> int:
    """`n` bits of a page from `bit`, the first one lowest."""
    first, last = bit // 8, -(-(bit + n) // 8)
    return int.from_bytes(page[first:last], "little") >> bit % 8 & (1 << n) - 1
