"""Ranges of bytes and sectors: cut them at multiples of a step, and by runs of equal bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def cut(start: int, end: int, step: int) -> Iterator[tuple[int, int, int]]:
    """`start` to `end` cut at multiples of `step`: which multiple, offset within it, length."""
    while start < end:
        index, within = divmod(start, step)
        n = min(end - start, step - within)
        yield index, within, n
        start += n


def runs(words: Iterable[tuple[int, int]]) -> Iterator[tuple[int, bool]]:
    """The runs of equal bits in `words` (bits, the first one lowest; how many they are): length, whether set.

    A run goes on from word to word. No bit of a word is set above its count.
    """
    run, kind = 0, False
    for word, count in words:
        bits, left = word, count
        while left:
            here = bool(bits & 1)
            # The length of the run of equal bits at the low end.
            flipped = ~bits if here else bits
            same = min(left, (flipped & -flipped).bit_length() - 1) if flipped else left
            if run and here is not kind:
                yield run, kind
                run = 0
            kind = here
            run += same
            bits >>= same
            left -= same
    if run:
        yield run, kind
