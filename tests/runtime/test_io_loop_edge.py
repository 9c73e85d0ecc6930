"""Eventfds that the I/O loop watches by edge: nobody reads them, no write is lost, none is heard twice."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from hvkvm.kvm.irqfd import EventFd
from hvkvm.runtime.io_loop import IoLoop

Settle = Callable[[IoLoop], None]


def test_every_write_is_heard_and_then_there_is_silence(loop: IoLoop, pulse: EventFd, settle: Settle) -> None:
    heard: list[bool] = []
    handle = loop.add_reader(pulse.fd, lambda: heard.append(loop.in_loop()), edge=True)
    settle(loop)
    assert heard == []
    for times in (1, 2, 3):
        pulse.signal()
        settle(loop)
        settle(loop)
        assert heard == [True] * times
    assert pulse.drain() == 3, "the loop reads nothing"
    pulse.signal()
    settle(loop)
    assert len(heard) == 4, "and somebody who does read takes nothing away"
    handle.remove()
    pulse.signal()
    settle(loop)
    assert len(heard) == 4


def test_a_write_before_the_watching_is_heard_once(loop: IoLoop, pulse: EventFd, settle: Settle) -> None:
    for _ in range(200):
        pulse.signal()
        heard: list[int] = []
        handle = loop.add_reader(pulse.fd, lambda heard=heard: heard.append(1), edge=True)
        settle(loop)
        settle(loop)
        assert heard == [1]
        handle.remove()


def test_a_write_during_the_callback_is_heard_again(loop: IoLoop, pulse: EventFd, settle: Settle) -> None:
    heard: list[int] = []

    def callback() -> None:
        heard.append(1)
        if len(heard) < 5:
            pulse.signal()

    handle = loop.add_reader(pulse.fd, callback, edge=True)
    pulse.signal()
    for _ in range(6):
        settle(loop)
    assert len(heard) == 5
    handle.remove()


@pytest.mark.usefixtures("tiny_switch_interval")
def test_no_write_is_lost_among_many(loop: IoLoop, in_threads: Callable[..., None]) -> None:
    """Each writer waits for the callback that answers its write: one lost edge and it waits for ever."""
    fds = [EventFd() for _ in range(4)]
    gates = [threading.Semaphore(0) for _ in fds]
    handles = [loop.add_reader(fd.fd, gate.release, edge=True) for fd, gate in zip(fds, gates, strict=True)]

    def writer(which: int) -> None:
        for _ in range(1000):
            fds[which].signal()
            assert gates[which].acquire(timeout=100), loop.state

    in_threads(*(lambda which=which: writer(which) for which in range(len(fds))))
    for handle, fd in zip(handles, fds, strict=True):
        handle.remove()
        fd.close()


@pytest.mark.usefixtures("tiny_switch_interval")
def test_the_last_of_a_burst_is_always_seen(
    loop: IoLoop, pulse: EventFd, in_threads: Callable[..., None]
) -> None:
    """Writers count first and write second; however writes coalesce, the loop sees the final count."""
    counts = [0, 0]
    seen = threading.Semaphore(0)
    handle = loop.add_reader(pulse.fd, lambda: (latest.append(sum(counts)), seen.release()), edge=True)
    latest: list[int] = [0]

    def writer(which: int) -> None:
        for _ in range(50):
            counts[which] += 1
            pulse.signal()

    for _ in range(30):
        before = sum(counts)
        in_threads(*(lambda which=which: writer(which) for which in (0, 1)))
        while latest[-1] != before + 100:
            assert seen.acquire(timeout=100), (latest[-1], before)
    handle.remove()
