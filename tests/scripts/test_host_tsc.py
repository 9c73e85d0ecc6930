"""The frequency that the lab's Linux is told: right beside other work, or none at all."""

from __future__ import annotations

import platform
from itertools import count

import pytest
from steps import host_tsc

MHZ = 2445


class Host:
    """A counter of MHZ and a clock; each `every`th look at the counter is followed by `away` ns elsewhere."""

    def __init__(self, every: int = 0, away: int = 0) -> None:
        self.now = 0
        self.looks = count(1)
        self.every, self.away = every, away

    def clock_ns(self) -> int:
        self.now += 100
        return self.now

    def counter(self) -> int:
        ticks = self.now * MHZ // 1000
        if self.every and next(self.looks) % self.every != 0:
            self.now += self.away
        return ticks

    def sleep(self, seconds: float) -> None:
        self.now += int(seconds * 1e9)

    def khz(self) -> int | None:
        return host_tsc.measured(self.counter, self.clock_ns, self.sleep)


def test_what_comes_in_between_most_looks_is_left_out() -> None:
    for host in (Host(), Host(every=7, away=30_000_000)):
        found = host.khz()
        assert found is not None
        assert abs(found - MHZ * 1000) < MHZ


@pytest.mark.parametrize("factor", [0, 1000])
def test_what_no_processor_has_is_not_told(factor: int) -> None:
    host = Host()
    assert host_tsc.measured(lambda: host.counter() * factor, host.clock_ns, host.sleep) is None


@pytest.mark.skipif(platform.machine() != "x86_64", reason="its counter is another one")
def test_this_processor_has_one_frequency() -> None:
    first, second = host_tsc.khz(), host_tsc.khz()
    if first is None or second is None:
        pytest.skip("this kernel lets nobody run what he has written")
    assert abs(first - second) < first / 100


def test_another_processor_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert host_tsc.khz() is None
