"""Removing from the I/O loop is synchronous (S39): once it returns, the callback runs no more."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest

from hvkvm.kvm.irqfd import EventFd
from hvkvm.runtime.io_loop import IoLoop

Settle = Callable[[IoLoop], None]


def test_s39_removal_waits_for_the_callback_that_runs(loop: IoLoop, pulse: EventFd) -> None:
    running, let_go = threading.Event(), threading.Event()
    finished: list[bool] = []

    def slow() -> None:
        pulse.drain()
        running.set()
        let_go.wait()
        finished.append(True)

    handle = loop.add_reader(pulse.fd, slow)
    pulse.signal()
    assert running.wait(100)
    assert "slow" in loop.state
    removed = threading.Event()
    remover = threading.Thread(target=lambda: (handle.remove(), removed.set()))
    remover.start()
    while loop._removers == 0:  # it waits
        os.sched_yield()
    assert not removed.is_set()
    let_go.set()
    remover.join()
    assert finished == [True]


def test_s39_timers_too(loop: IoLoop) -> None:
    running, let_go = threading.Event(), threading.Event()
    finished: list[bool] = []
    timer = loop.call_later(0, lambda: (running.set(), let_go.wait(), finished.append(True)))
    assert running.wait(100)
    canceller = threading.Thread(target=timer.cancel)
    canceller.start()
    while loop._removers == 0:
        os.sched_yield()
    let_go.set()
    canceller.join()
    assert finished == [True]


def test_s39_a_callback_may_remove_itself_and_others(loop: IoLoop, settle: Settle) -> None:
    """Also others that are ready in the same round: they do not run any more."""
    pulses = [EventFd() for _ in range(8)]
    handles = []
    seen: list[int] = []

    def first_takes_all(i: int) -> None:
        seen.append(i)
        for handle in handles:
            handle.remove()

    def set_up() -> None:
        for i, pulse in enumerate(pulses):
            handles.append(loop.add_reader(pulse.fd, lambda i=i: first_takes_all(i)))
            pulse.signal()

    loop.call_soon(set_up)  # on the loop, so that all are ready in one round
    settle(loop)
    settle(loop)
    assert len(seen) == 1
    for pulse in pulses:
        pulse.close()


def test_a_new_fd_does_not_get_the_old_ones_event(loop: IoLoop, settle: Settle) -> None:
    """Within one round a callback closes a ready fd and watches another that got the same number."""
    killer, victim = EventFd(), EventFd()
    wrong: list[str] = []
    made: list[EventFd] = []

    def kill() -> None:
        killer.drain()
        number = victim.fd
        victim_handle.remove()
        victim.close()
        fresh = EventFd()
        if fresh.fd != number:
            os.dup2(fresh.fd, number, inheritable=False)
            fresh.close()
            fresh.fd = number
        made.append(fresh)
        fresh_handles.append(loop.add_reader(fresh.fd, lambda: wrong.append("event of the old fd")))

    fresh_handles: list[object] = []

    def set_up() -> None:
        nonlocal victim_handle
        killer_handle = loop.add_reader(killer.fd, kill)
        victim_handle = loop.add_reader(victim.fd, victim.drain)
        fresh_handles.append(killer_handle)
        killer.signal()  # first ready, first served
        victim.signal()

    victim_handle = None
    loop.call_soon(set_up)
    settle(loop)
    settle(loop)
    assert made
    assert not wrong
    for handle in fresh_handles:
        handle.remove()
    for pulse in (killer, *made):
        pulse.close()


@pytest.mark.usefixtures("tiny_switch_interval")
def test_s39_after_removal_the_callback_never_runs(
    loop: IoLoop, faults: list[BaseException], settle: Settle
) -> None:
    """The owner frees what the callback uses right after remove(); repeated, with signals pouring in."""
    stop = False
    current: list[EventFd] = []

    def pour() -> None:
        while not stop:
            for pulse in tuple(current):
                with suppress(OSError):
                    pulse.signal()

    thread = threading.Thread(target=pour)
    thread.start()
    pulse = EventFd()
    current.append(pulse)
    for _ in range(500):
        resource: list[int] = [0]

        def use(resource: list[int] = resource) -> None:
            pulse.drain()
            resource[0] += 1  # IndexError once freed

        handle = loop.add_reader(pulse.fd, use)
        timer = loop.call_later(0, use)
        if resource[0] < 1:
            loop.call_soon(int)
        handle.remove()
        timer.cancel()
        resource.clear()
    stop = True
    thread.join()
    settle(loop)
    assert not faults
    pulse.close()


def test_removing_after_the_end_is_harmless(no_leaks: None) -> None:
    loop, pulse = IoLoop(), EventFd()
    handle, timer = loop.add_reader(pulse.fd, print), loop.call_later(99, print)
    loop.start()
    loop.stop()
    handle.remove()
    timer.cancel()
    pulse.close()
