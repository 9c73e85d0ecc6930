"""The I/O loop: readers, bottom halves and timers; fairness; wake-ups; faults; an end without leaks."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from time import sleep

import pytest

from hvkvm.errors import Stopped, Stuck
from hvkvm.kvm.irqfd import EventFd
from hvkvm.runtime.io_loop import IoLoop

Settle = Callable[[IoLoop], None]


def test_reads_what_becomes_ready(loop: IoLoop, pulse: EventFd, settle: Settle) -> None:
    seen: list[tuple[int, bool]] = []
    handle = loop.add_reader(pulse.fd, lambda: seen.append((pulse.drain(), loop.in_loop())))
    settle(loop)
    assert not seen
    pulse.signal()
    settle(loop)
    assert seen == [(1, True)]
    assert not loop.in_loop()
    handle.remove()
    handle.remove()
    pulse.signal()
    settle(loop)
    assert len(seen) == 1


def test_an_fd_may_be_watched_again_after_removal_but_not_twice(
    loop: IoLoop, pulse: EventFd, settle: Settle
) -> None:
    seen: list[str] = []
    first = loop.add_reader(pulse.fd, lambda: seen.append("first"))
    with pytest.raises(ValueError, match="already"):
        loop.add_reader(pulse.fd, pulse.drain)
    first.remove()
    second = loop.add_reader(pulse.fd, lambda: (seen.append("second"), pulse.drain()))
    first.remove()
    pulse.signal()
    settle(loop)
    assert seen == ["second"]
    second.remove()


def test_a_bad_fd_is_refused(loop: IoLoop) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        loop.add_reader(12345, print)


def test_calls_run_in_order_on_the_loop(loop: IoLoop, settle: Settle) -> None:
    seen: list[int] = []
    for i in range(1000):
        loop.call_soon(seen.append, i)
    settle(loop)
    assert seen == list(range(1000))


def test_what_is_queued_before_start_runs(no_leaks: None) -> None:
    loop, ran = IoLoop(), threading.Event()
    loop.call_soon(ran.set)
    assert loop.state == "not started"
    loop.start()
    assert ran.wait(100)
    loop.stop()
    assert loop.state == "ended"


def test_a_call_that_reschedules_itself_starves_nobody(loop: IoLoop, pulse: EventFd) -> None:
    """Bounded passes: neither readers nor timers wait for the queue to run empty."""
    go_on, read, timed = True, threading.Event(), threading.Event()

    def again() -> None:
        if go_on:
            loop.call_soon(again)

    loop.call_soon(again)
    handle = loop.add_reader(pulse.fd, lambda: (pulse.drain(), read.set()))
    pulse.signal()
    loop.call_later(0, timed.set)
    assert read.wait(100)
    assert timed.wait(100)
    go_on = False
    handle.remove()


def test_a_timer_that_reschedules_itself_starves_nobody(loop: IoLoop, pulse: EventFd) -> None:
    go_on, read, called = True, threading.Event(), threading.Event()

    def again() -> None:
        if go_on:
            loop.call_later(0, again)

    loop.call_later(0, again)
    handle = loop.add_reader(pulse.fd, lambda: (pulse.drain(), read.set()))
    pulse.signal()
    loop.call_soon(called.set)
    assert read.wait(100)
    assert called.wait(100)
    go_on = False
    handle.remove()


def test_timers_run_in_due_order_and_not_early(loop: IoLoop) -> None:
    from time import monotonic

    seen: list[tuple[str, float]] = []
    done = threading.Event()
    due: dict[str, float] = {}

    def ran(name: str) -> None:
        seen.append((name, monotonic()))
        if len(seen) == 3:
            done.set()

    def begin() -> None:
        for name, delay in (("c", 0.06), ("a", 0.02), ("b", 0.04)):
            asked = monotonic()
            due[name] = loop.call_later(delay, ran, name).due
            assert due[name] >= asked + delay

    loop.call_soon(begin)  # one call of the loop's: none of them runs before all three are there
    assert done.wait(100)
    assert [name for name, _when in seen] == sorted(due, key=due.__getitem__)
    assert all(when >= due[name] for name, when in seen)


@pytest.mark.parametrize("seconds", [3600, 3e6, float("inf")])
def test_an_earlier_timer_wakes_a_loop_that_waits_for_a_later_one(
    loop: IoLoop, settle: Settle, seconds: float
) -> None:
    """poll(2) takes no more than 24.8 days at a time."""
    done = threading.Event()
    late = loop.call_later(seconds, done.set)
    settle(loop)
    loop.call_later(0.01, done.set)
    assert done.wait(100)
    late.cancel()


def test_a_callback_that_raises_is_reported_and_the_loop_goes_on(
    loop: IoLoop, faults: list[BaseException], pulse: EventFd, settle: Settle
) -> None:
    def broken() -> None:
        pulse.drain()
        raise KeyError("reader")

    handle = loop.add_reader(pulse.fd, broken)
    pulse.signal()
    loop.call_soon(lambda: 1 // 0)
    loop.call_later(0, lambda: [].pop())  # noqa: PLW0108
    settle(loop)
    settle(loop)
    handle.remove()
    assert {type(fault) for fault in faults} == {KeyError, ZeroDivisionError, IndexError}
    assert any("broken" in note for fault in faults for note in fault.__notes__)


def test_without_on_fault_errors_go_where_any_threads_go(
    no_leaks: None, monkeypatch: pytest.MonkeyPatch, settle: Settle
) -> None:
    seen: list[type[BaseException]] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(args.exc_type))
    loop = IoLoop()
    loop.start()
    loop.call_soon(lambda: 1 // 0)
    settle(loop)
    loop.stop()
    assert seen == [ZeroDivisionError]


@pytest.mark.usefixtures("tiny_switch_interval")
def test_no_wakeup_is_lost(loop: IoLoop) -> None:
    """Thousands of single calls, each awaited: one lost wake-up and the wait never ends."""
    for _ in range(3000):
        done = threading.Event()
        loop.call_soon(done.set)
        assert done.wait(100), loop.state


@pytest.mark.usefixtures("tiny_switch_interval")
def test_no_timer_is_lost(loop: IoLoop) -> None:
    late = loop.call_later(3600, print)
    for _ in range(1000):
        done = threading.Event()
        loop.call_later(0, done.set)
        assert done.wait(100), loop.state
    late.cancel()


def test_stop_cancels_what_waits_and_refuses_the_rest(no_leaks: None, pulse: EventFd) -> None:
    loop = IoLoop()
    in_callback, let_go = threading.Event(), threading.Event()
    seen: list[str] = []
    loop.start()
    loop.call_soon(lambda: (in_callback.set(), let_go.wait()))
    assert in_callback.wait(100)
    loop.call_soon(seen.append, "ran", cancelled=lambda: seen.append("cancelled"))
    with pytest.raises(Stuck, match="running"):
        loop.stop(timeout=0.01)
    with pytest.raises(Stopped):
        loop.add_reader(pulse.fd, print)
    with pytest.raises(Stopped):
        loop.call_later(0, print)
    let_go.set()
    loop.stop()
    loop.stop()
    assert seen == ["cancelled"]
    with pytest.raises(Stopped):
        loop.call_soon(print)


def test_a_loop_never_started_closes_clean(no_leaks: None) -> None:
    loop, seen = IoLoop(), list[str]()
    loop.call_soon(print, cancelled=lambda: seen.append("cancelled"))
    loop.stop()
    loop.stop()
    assert seen == ["cancelled"]


def test_what_runs_while_the_loop_is_told_to_stop_may_ask_for_more(no_leaks: None, pulse: EventFd) -> None:
    """It cannot know; what it asks for is dropped, and is no fault of the machine's."""
    faults: list[BaseException] = []
    late: list[str] = []
    loop = IoLoop(on_fault=faults.append)
    runs = threading.Event()

    def callback() -> None:
        runs.set()
        while not loop._stopping:
            sleep(0.001)
        loop.call_later(60, late.append, "a timer")
        loop.call_soon(late.append, "a call")
        loop.add_reader(pulse.fd, lambda: late.append("a reader"))
        late.append("asked")

    loop.start()
    pulse.signal()
    loop.call_soon(callback)
    assert runs.wait(60)
    loop.stop()
    assert late == ["asked"]
    assert not faults


def test_the_loop_may_stop_itself(no_leaks: None) -> None:
    loop = IoLoop()
    loop.start()
    loop.call_soon(loop.stop)
    loop._thread.join(100)
    assert loop.state == "ended"


def test_an_error_in_a_cancellation_is_reported(no_leaks: None, faults: list[BaseException]) -> None:
    loop = IoLoop(on_fault=faults.append)
    loop.call_soon(print, cancelled=lambda: 1 // 0)
    loop.stop()
    assert [type(fault) for fault in faults] == [ExceptionGroup]


def test_signals_are_left_to_other_threads(loop: IoLoop, settle: Settle) -> None:
    import signal

    masks: list[set[int]] = []
    loop.call_soon(lambda: masks.append(set(signal.pthread_sigmask(signal.SIG_BLOCK, ()))))
    settle(loop)
    assert {signal.SIGINT, signal.SIGTERM, signal.SIGCHLD} <= masks[0]
    assert signal.SIGSEGV not in masks[0]


@pytest.mark.usefixtures("tiny_switch_interval")
def test_stop_races_with_submitters(in_threads: Callable[..., None], no_leaks: None) -> None:
    for _ in range(30):
        loop = IoLoop()
        loop.start()
        counts = {"accepted": 0, "ran": 0, "cancelled": 0}

        def ran(counts: dict[str, int] = counts) -> None:
            counts["ran"] += 1  # the loop's thread alone

        def cancelled(counts: dict[str, int] = counts) -> None:
            counts["cancelled"] += 1  # likewise

        def submitter(loop: IoLoop = loop, counts: dict[str, int] = counts) -> None:
            with suppress(Stopped):
                while True:
                    loop.call_soon(ran, cancelled=cancelled)
                    counts["accepted"] += 1

        def stopper(loop: IoLoop = loop, counts: dict[str, int] = counts) -> None:
            while counts["accepted"] < 50:
                os.sched_yield()
            loop.stop()

        in_threads(submitter, stopper)
        assert counts["ran"] + counts["cancelled"] == counts["accepted"], sys.getswitchinterval()
