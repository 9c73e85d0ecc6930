"""What `linux/stable.c` writes, from its seed; and what a disk that lost its VMM must have of it.

Plain data: any thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from hvkvm.block.image import Image

BLOCK = 4096
SECTOR = 512
SLICES = 16
SLICE_BLOCKS = 1024
MOST_WRITES = 8
MOST_BLOCKS = 8
DISK_BYTES = 2 * SLICES * SLICE_BLOCKS * BLOCK
AHEAD = 8
"""So many batches behind the last that we heard of may have been begun: the guest tells later."""
RUN = 16
"""Blocks that are read together."""
_WORD = (1 << 64) - 1


class Range(NamedTuple):
    """Blocks that one batch writes, or discards."""

    first: int
    blocks: int
    discard: bool = False


def batches(seed: int) -> Iterator[list[Range]]:
    """What each batch does, from batch 1 on, without an end."""
    word = 88172645463325252 ^ seed * 0x9E3779B97F4A7C15 & _WORD

    def any_of(limit: int) -> int:
        nonlocal word
        word ^= word << 13 & _WORD
        word ^= word >> 7
        word ^= word << 17 & _WORD
        return (word >> 11) % limit

    number = 0
    while True:
        number += 1
        half = (number & 1) * SLICES * SLICE_BLOCKS
        if not any_of(8):
            slice_ = any_of(SLICES)
            yield [Range(half + slice_ * SLICE_BLOCKS + 256 * any_of(3), 512, discard=True)]
            continue
        written = []
        for number_in_batch in range(1 + any_of(MOST_WRITES)):
            blocks = 1 + any_of(MOST_BLOCKS)
            first = half + (2 * number_in_batch + any_of(2)) * SLICE_BLOCKS
            written.append(Range(first + any_of(SLICE_BLOCKS - blocks + 1), blocks))
        yield written


def stamp(block: int, generation: int) -> bytes:
    """The contents of a sector of `block` that was written by this; 0 for none."""
    if not generation:
        return bytes(SECTOR)
    return (block.to_bytes(8, "little") + generation.to_bytes(8, "little")) * (SECTOR // 16)


class Known:
    """What each block of one disk may hold, over one kill after another."""

    def __init__(self, first: dict[int, int] | None = None) -> None:
        self._may: dict[int, set[int]] = {block: {one} for block, one in (first or {}).items()}
        """Generations by block; one that is not here has zeros."""

    def wrote(self, seed: int, stable: int) -> None:
        """A guest with this seed ran until the VMM was killed, and said that `stable` batches are stable."""
        may = self._may
        for number, ranges in zip(range(1, stable + AHEAD + 1), batches(seed), strict=False):
            generation = seed << 32 | number
            for first, blocks, discard in ranges:
                for block in range(first, first + blocks):
                    if discard:
                        if block in may:
                            may[block].add(0)
                    elif number <= stable:
                        may[block] = {generation}
                    else:
                        may.setdefault(block, {0}).add(generation)

    def faults(self, image: Image) -> list[str]:
        """Where `image` holds what it may not. What it does hold is what it must hold from now on."""
        view = memoryview(bytearray(RUN * BLOCK))
        wrong = []
        for first, blocks in self._runs():
            image.readv(first * BLOCK, [view[: blocks * BLOCK]])
            for n in range(blocks):
                block, data = first + n, bytes(view[n * BLOCK : (n + 1) * BLOCK])
                held, may = held_by(block, data), self._may[block]
                if not held <= may:
                    wrong.append(f"block {block} has {sorted(held)}, may have {sorted(may)}")
                self._may[block] = held
        return wrong

    def _runs(self) -> Iterator[tuple[int, int]]:
        """All blocks, as neighbours that are read together."""
        first = blocks = 0
        for block in sorted(self._may):
            if blocks and (block != first + blocks or blocks == RUN):
                yield first, blocks
                blocks = 0
            if not blocks:
                first = block
            blocks += 1
        if blocks:
            yield first, blocks


def held_by(block: int, data: bytes) -> set[int]:
    """The generations of what is in a block; -1 for what no write has put there."""
    generation = int.from_bytes(data[8:16], "little")
    if data == stamp(block, generation) * (BLOCK // SECTOR):
        return {generation}
    sectors = (data[at : at + SECTOR] for at in range(0, BLOCK, SECTOR))
    numbered = [(int.from_bytes(sector[8:16], "little"), sector) for sector in sectors]
    return {number if sector == stamp(block, number) else -1 for number, sector in numbered}
