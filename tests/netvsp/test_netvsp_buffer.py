"""Who has which part of the receive buffer: no two at a time, none outside, all back in the end."""

from __future__ import annotations

import random
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.devices.synth.netvsp_buffer import MAX_BUFFER_BYTES, GuestBuffer, Pieces
from hvkvm.vmbus.gpadl import Gpadl, GpaRangeList
from hvkvm.vmbus.pages import GuestPages

STEPS = st.lists(st.tuples(st.sampled_from(["lend", "back", "undo", "twice", "save"]), st.integers(0, 400)))


@given(STEPS, st.integers(1, 12), st.sampled_from([512, 1024, 4096]))
def test_pieces_never_overlap(steps: list[tuple[str, int]], count: int, size: int) -> None:
    pieces = Pieces(size, count)
    out: dict[int, tuple[int, int]] = {}
    last: int | None = None
    for what, number in steps:
        if what == "lend":
            need = (number % 300 + 8) & ~7
            start, room = pieces.room(need)
            assert room <= need
            if room < need:
                continue
            assert start % 8 == 0
            assert start >= 0
            assert start + need <= size
            assert all(start + need <= a or a + n <= start for a, n in out.values()), (start, need, out)
            last = pieces.lend(start, need)
            out[last] = (start, need)
        elif what == "undo" and last is not None:
            pieces.take_back_last()
            del out[last]
            last = None
        elif what in ("back", "twice") and out:
            ident = sorted(out)[number % len(out)]
            assert pieces.back(ident)
            if what == "twice":
                assert not pieces.back(ident)
            del out[ident]
            last = None
        elif what == "save":
            other = Pieces(size, count)
            other.load(pieces.save())
            pieces, last = other, None
        assert pieces.lent <= count
    for ident in list(out):
        assert pieces.back(ident)
    assert pieces.lent == 0
    assert pieces.room(size) == (0, size)


def test_an_unknown_piece_is_none() -> None:
    pieces = Pieces(4096, 4)
    assert not pieces.back(1)
    assert not pieces.back(1 << 63)
    assert pieces.lend(0, 8) == 1
    assert pieces.next_id == 2


class PlainRam:
    """Pages of RAM."""

    def __init__(self, pages: int) -> None:
        self._bytes = memoryview(bytearray(pages * 4096))

    def contains(self, gpa: int, n: int) -> bool:
        return gpa + n <= len(self._bytes)

    def view(self, gpa: int, n: int) -> memoryview:
        return self._bytes[gpa : gpa + n]


def test_a_buffer_is_one_range_of_bounded_length() -> None:
    memory: Any = PlainRam(8)
    page = GpaRangeList(4096, 0, array("Q", [3]))
    odd = GpaRangeList(5000, 96, array("Q", [3, 7]))
    longest = GpaRangeList(MAX_BUFFER_BYTES, 96, array("Q", [3, 7]))
    for one, size in ((page, 4096), (odd, 5000), (longest, 8192 - 96)):
        assert GuestBuffer(memory, Gpadl(1, 1, (one,), 1)).size == size, "never beyond its pages"
    for ranges in ((), (page, page), (longest._replace(byte_count=MAX_BUFFER_BYTES + 1),)):
        with pytest.raises(ValueError, match="a buffer is one range"):
            GuestBuffer(memory, Gpadl(1, 1, ranges, 1))


@given(
    st.permutations(range(12)),
    st.integers(0, 100),
    st.lists(st.integers(0, 9000), max_size=5),
)
def test_what_is_laid_in_parts_lies_as_if_it_were_one(order: list[int], at: int, sizes: list[int]) -> None:
    whole = random.Random(at).randbytes(sum(sizes))[: 12 * 4096 - at]
    parts, rest = [], memoryview(whole)
    for size in sizes:
        parts.append(rest[:size])
        rest = rest[size:]
    for pfns in (order, list(range(12))):  # scattered, and one run
        ram = PlainRam(12)
        GuestPages(ram, pfns).write_all(at, parts)
        lies = b"".join(ram.view(pfn * 4096, 4096) for pfn in pfns)
        assert lies == bytes(at) + whole + bytes(12 * 4096 - at - len(whole))
