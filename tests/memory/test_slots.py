"""Memory slot numbers: lowest first, reused, bounded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.errors import HvkvmError
from hvkvm.memory.slots import SlotAllocator


@given(st.lists(st.integers(0, 7)))
def test_takes_the_lowest_free_number(give_back: list[int]) -> None:
    slots = SlotAllocator(8)
    taken: set[int] = set()
    for slot in give_back:
        if slot in taken:
            slots.give_back(slot)
            taken.remove(slot)
        elif len(taken) < 8:
            got = slots.take()
            assert got == min(set(range(8)) - taken)
            taken.add(got)


def test_says_when_none_is_left() -> None:
    slots = SlotAllocator(2)
    assert [slots.take(), slots.take()] == [0, 1]
    with pytest.raises(HvkvmError, match="of 2"):
        slots.take()


@pytest.mark.parametrize("slot", [-1, 1, 5])
def test_refuses_a_number_that_is_not_taken(slot: int) -> None:
    slots = SlotAllocator(8)
    slots.take()
    with pytest.raises(ValueError, match="not taken"):
        slots.give_back(slot)


def test_refuses_the_same_number_twice() -> None:
    slots = SlotAllocator(8)
    slots.give_back(slots.take())
    with pytest.raises(ValueError, match="not taken"):
        slots.give_back(0)
