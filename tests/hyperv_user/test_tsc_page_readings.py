"""The reference TSC page is made of two clocks, read together as closely as the host lets them be."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count, islice

import pytest

from hvkvm.hyperv.usermode.clock import ReferenceClock, TscPage

TSC_KHZ = 20_000
"""Two ticks a unit of reference time, so that a page's scale is a half of 2^64."""


class ScriptedClock(ReferenceClock):
    """A clock whose readings are given."""

    def __init__(self, readings: Iterable[int]) -> None:
        super().__init__()
        self.left = iter(readings)

    def now(self) -> int:
        return next(self.left)


class SteadyTsc:
    """A vCPU whose TSC stands, and which counts how often it is read."""

    def __init__(self) -> None:
        self.reads = 0

    def msrs(self, indices: tuple[int, ...]) -> dict[int, int]:
        self.reads += 1
        return dict.fromkeys(indices, 1000)

    def tsc_khz(self) -> int:
        return TSC_KHZ


def page(readings: Iterable[int]) -> TscPage:
    return TscPage(ScriptedClock(readings), None, usable=True)  # type: ignore[arg-type]  # it is not placed


def apart(distances: Iterable[int]) -> Iterable[int]:
    """Readings of a clock, two of which have the TSC's between them."""
    at = 0
    for distance in distances:
        yield from (at, at + distance)
        at += 1000


@pytest.mark.parametrize(
    ("distances", "reads", "best"),
    [
        ([30, 10, 12, 10, 40], 5, 10),
        ([300] * 9 + [4], 10, 4),
        ([100] * 20 + [60] + [100] * 29, 50, 60),
    ],
    ids=["a quiet host", "a busy one", "one that is never quick"],
)
def test_the_closest_readings_make_the_page(distances: list[int], reads: int, best: int) -> None:
    made, tsc = page(apart(distances)), SteadyTsc()
    scale, offset = made.scale_and_offset(tsc)
    now = 1000 * distances.index(best) + best // 2
    assert (tsc.reads, scale) == (reads, 1 << 63)
    assert (1000 * scale >> 64) + offset == now
    assert made.uncertain == best // 2 + 1


def test_a_host_on_which_nothing_is_quick_is_not_asked_for_ever() -> None:
    made, tsc = page(islice(apart(count(500)), 1000)), SteadyTsc()
    made.scale_and_offset(tsc)
    assert tsc.reads == 50
    assert made.uncertain == 251
