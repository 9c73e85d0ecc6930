"""Another attempt, later: one at a time, and none lost, however quick or slow the loop is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from hvkvm.errors import Stopped
from hvkvm.runtime.io_loop import IoLoop
from hvkvm.runtime.retry import Retry

SECONDS = 100.0


class Timers:
    """Calls back when told to, or at once: as a loop does whose caller stands still meanwhile."""

    def __init__(self, *, at_once: bool = False) -> None:
        self.at_once = at_once
        self.waiting: list[Callable[[], object]] = []

    def call_later(self, _seconds: float, fn: Callable[[], object]) -> Any:
        if self.at_once:
            fn()
        else:
            self.waiting.append(fn)
        return SimpleNamespace(cancel=lambda: fn in self.waiting and self.waiting.remove(fn))


def test_one_waits_however_often_it_is_asked_for() -> None:
    timers, calls = Timers(), []
    retry = Retry(timers, lambda: calls.append(1))
    for round_ in range(3):
        for _ in range(3):
            retry.later()
        assert (len(timers.waiting), retry.waits) == (1, True)
        timers.waiting.pop()()
        assert (len(calls), retry.waits) == (round_ + 1, False)
    retry.later()
    retry.cancel()
    assert (timers.waiting, retry.waits) == ([], False)
    retry.cancel()


def test_a_call_that_comes_before_its_timer_is_known_is_not_the_last() -> None:
    timers, calls = Timers(at_once=True), []
    retry = Retry(timers, lambda: calls.append(1))
    for count in (1, 2, 3):
        retry.later()
        assert (len(calls), retry.waits) == (count, False)


def test_a_call_may_ask_again(io: IoLoop) -> None:
    done, calls = threading.Event(), []

    def call() -> None:
        calls.append(1)
        if len(calls) < 50:
            retry.later()
        else:
            done.set()

    retry = Retry(io, call, 0.0)
    retry.later()
    assert done.wait(SECONDS)
    assert (len(calls), retry.waits) == (50, False)


def test_a_loop_that_has_ended_takes_none() -> None:
    def call_later(*_arguments: object) -> Any:
        raise Stopped("it has ended")

    retry = Retry(SimpleNamespace(call_later=call_later), lambda: None)
    retry.later()
    retry.later()
    retry.cancel()
