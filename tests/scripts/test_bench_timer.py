"""The timer measurement: its arithmetic, and that its counts agree on a running guest. No time is judged."""

from __future__ import annotations

from struct import pack

import pytest
from steps import bench_timer
from steps.bench_timer import PERIOD, Tick, decode, figures


def test_log_is_read_by_the_narrowest_clock_readings() -> None:
    """A TSC of ten ticks per 100 ns, off by a million; some readings of both clocks took long."""

    def clocks(now: int) -> bytes:
        tsc = 10 * now + 1_000_000
        return b"".join(pack("<4Q", tsc - width, now, tsc + width, 0) for width in (900, 50, 30, 4000) * 2)

    ticks = [(2000 + 7, 2000, 2003), (12000 + 90, 12000, 12050)]
    entries = b"".join(pack("<4Q", 10 * seen + 1_000_000, due, sent, 0) for seen, due, sent in ticks)
    assert decode(clocks(1000) + entries + clocks(20000)) == [Tick(*tick) for tick in ticks]


def test_ticks_that_never_came_are_missed_and_slow_ones_late() -> None:
    late = 6_000
    ticks = [Tick(due + add, due, due) for due, add in ((0, 10), (PERIOD, 20), (4 * PERIOD, late))]
    found = figures(ticks)
    assert {name: found[name] for name in ("due", "delivered", "missed", "late")} == {
        "due": 5,
        "delivered": 3,
        "missed": 2,
        "late": 1,
    }
    assert (found["median_us"], found["worst_us"]) == (2.0, 600.0)


@pytest.mark.parametrize(
    "synic", [pytest.param("user", marks=pytest.mark.kvm), pytest.param("kernel", marks=pytest.mark.hyperv)]
)
def test_every_tick_is_delivered_or_missed(synic: str) -> None:
    found = bench_timer.measure(synic, 100)
    assert found["delivered"] == 100
    assert found["due"] == found["delivered"] + found["missed"]
    assert 0 <= found["late"] <= 100
