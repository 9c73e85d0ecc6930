"""The I/O loop's rounds are bounded: however much waits of one kind, the other kinds have their turn."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hvkvm.kvm.irqfd import EventFd
from hvkvm.runtime.io_loop import MAX_CALLS, MAX_EVENTS, MAX_TIMERS, IoLoop

Settle = Callable[[IoLoop], None]
MANY = 1000


class Turns:
    """What ran, as letters in order; the first of the many rings for the others."""

    def __init__(self, loop: IoLoop, pulse: EventFd) -> None:
        self.loop = loop
        self.pulse = pulse
        self.ran = ""

    def one_of_many(self) -> None:
        if not self.ran:
            self.pulse.signal()
            self.loop.call_soon(self.call)
            self.loop.call_later(0, self.timer)
        self.ran += "."

    def reader(self) -> None:
        self.ran += "r"

    def call(self) -> None:
        self.ran += "c"

    def timer(self) -> None:
        self.ran += "t"

    def before(self, what: str) -> int:
        """How many of the many ran before `what`."""
        return self.ran[: self.ran.index(what)].count(".")


@pytest.fixture
def turns(no_leaks: None, pulse: EventFd) -> Turns:
    return Turns(IoLoop(), pulse)


def test_many_calls_hold_up_readers_and_timers_for_one_round(turns: Turns, settle: Settle) -> None:
    loop = turns.loop
    loop.add_reader(turns.pulse.fd, turns.reader, edge=True)
    for _ in range(MANY):
        loop.call_soon(turns.one_of_many)
    loop.start()
    settle(loop)
    loop.stop()
    assert turns.before("r") <= MAX_CALLS
    assert turns.before("t") <= 2 * MAX_CALLS
    assert turns.ran.count(".") == MANY
    assert turns.before("c") == MANY, "calls stay in order"


def test_many_timers_hold_up_readers_and_calls_for_one_round(turns: Turns, settle: Settle) -> None:
    loop = turns.loop
    loop.add_reader(turns.pulse.fd, turns.reader, edge=True)
    for _ in range(MANY):
        loop.call_later(0, turns.one_of_many)
    loop.start()
    while "t" not in turns.ran:
        settle(loop)
    loop.stop()
    assert turns.before("r") <= MAX_TIMERS
    assert turns.before("c") <= MAX_TIMERS
    assert turns.before("t") == MANY, "timers stay in order"


def test_many_readers_that_are_always_ready_hold_up_calls_timers_and_one_another_for_one_rotation(
    turns: Turns, settle: Settle
) -> None:
    loop = turns.loop
    busy = [EventFd() for _ in range(2 * MAX_EVENTS)]
    for one in busy:
        one.signal()
        loop.add_reader(one.fd, turns.one_of_many)
    loop.add_reader(turns.pulse.fd, turns.reader, edge=True)
    loop.start()
    while not {"r", "c", "t"} <= set(turns.ran):
        settle(loop)
    loop.stop()
    assert turns.before("c") <= MAX_EVENTS
    assert turns.before("t") <= 2 * MAX_EVENTS
    assert turns.before("r") <= len(busy) + MAX_EVENTS
    for one in busy:
        one.close()
