"""A limit is of the process's own time: one that was stopped has not waited."""

from __future__ import annotations

import pytest

from hvkvm.runtime import awake
from hvkvm.runtime.awake import PIECE_SECONDS, wait_awake


class Clock:
    """Time passes by waits alone; in the one that is the `stopped_in`th, much more than was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stopped_in: int = 0, true_at: int = 0) -> None:
        self.now = 0.0
        self.waits: list[float] = []
        self._stopped_in = stopped_in
        self._true_at = true_at
        monkeypatch.setattr(awake, "monotonic", lambda: self.now)

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self.now += seconds + (1000 if len(self.waits) == self._stopped_in else 0)
        return len(self.waits) == self._true_at


def test_the_limit_is_as_long_as_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert not wait_awake(clock.wait, 2.5 * PIECE_SECONDS)
    assert clock.now == 2.5 * PIECE_SECONDS
    assert not wait_awake(clock.wait, 0.0)
    assert clock.waits[-1] == 0.0


def test_a_stop_takes_little_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, stopped_in=1, true_at=3)
    assert wait_awake(clock.wait, 10 * PIECE_SECONDS)
    assert clock.waits == [PIECE_SECONDS] * 3
