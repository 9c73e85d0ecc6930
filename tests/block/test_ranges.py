"""Ranges cut at multiples of a step, and into runs of equal bits."""

from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st

from hvkvm.block.ranges import cut, runs


@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(1, 700))
def test_pieces_are_the_range_in_order_and_none_crosses_a_multiple(
    start: int, length: int, step: int
) -> None:
    at = start
    for index, within, n in cut(start, start + length, step):
        assert index * step + within == at
        assert 0 < n <= step - within
        at += n
    assert at == start + length


@given(st.lists(st.lists(st.booleans(), max_size=70), max_size=6))
def test_runs_are_those_of_all_bits_in_a_row(words: list[list[bool]]) -> None:
    numbers = [(sum(bit << at for at, bit in enumerate(word)), len(word)) for word in words]
    flat = [bit for word in words for bit in word]
    assert list(runs(numbers)) == [(len(list(group)), bit) for bit, group in groupby(flat)]
