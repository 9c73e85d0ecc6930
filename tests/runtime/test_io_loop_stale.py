"""An event of a handle that another thread removed is not told to the next one of its fd number (S39)."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from hvkvm.hyperv.connections import Connections
from hvkvm.kvm.irqfd import EventFd
from hvkvm.runtime.io_loop import IoLoop

Settle = Callable[[IoLoop], None]


class CutEpoll:
    """An epoll that runs `meanwhile` on another thread once a poll has found `fd` and not come back."""

    def __init__(self, real: Any, fd: int, meanwhile: Callable[[], object]) -> None:
        self.real = real
        self.fd = fd
        self.meanwhile = meanwhile
        self.cuts = 0

    def poll(self, timeout: float | None, most: int) -> Any:
        events = self.real.poll(timeout, most)
        if not self.cuts and any(fd == self.fd for fd, _mask in events):
            self.cuts += 1
            thread = threading.Thread(target=self.meanwhile)
            thread.start()
            thread.join()
        return events

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


@pytest.mark.parametrize("written", [False, True], ids=["silent", "written"])
@pytest.mark.parametrize("edge", [False, True], ids=["level", "edge"])
def test_s39_a_stale_event_is_not_the_next_ones(
    no_leaks: None, settle: Settle, edge: bool, written: bool
) -> None:
    """The next one hears its own writes alone, also one that it got before the old poll came back."""
    loop, heard = IoLoop(), list[str]()
    old, new = EventFd(), EventFd()
    number = old.fd
    first = loop.add_reader(number, lambda: heard.append("old"), edge=edge)
    handles = []

    def replace() -> None:
        first.remove()
        os.dup2(new.fd, number)
        handles.append(loop.add_reader(number, lambda: (heard.append("new"), new.drain()), edge=edge))
        if written:
            new.signal()

    cut = CutEpoll(loop._epoll, number, replace)
    loop._epoll = cut  # type: ignore[assignment]
    old.signal()
    loop.start()
    settle(loop)
    settle(loop)
    assert cut.cuts == 1
    assert heard == ["new"] * written
    new.signal()
    settle(loop)
    settle(loop)
    assert heard == ["new"] * (1 + written), "and later ones as ever"
    loop.stop()
    handles[0].remove()
    old.close()
    new.close()


@pytest.mark.usefixtures("tiny_switch_interval")
def test_s39_a_number_that_changes_hands_during_a_signal_brings_the_next_one_nothing(
    loop: IoLoop, settle: Settle
) -> None:
    connections = Connections(loop)
    for _ in range(1000):
        heard: list[int] = []
        assert connections.add_event(1, int) == 0
        go = threading.Barrier(2)

        def signals(go: threading.Barrier = go) -> None:
            go.wait()
            while connections.signal(1) == 0:
                pass

        thread = threading.Thread(target=signals)
        thread.start()
        go.wait()
        assert connections.remove_event(1) == 0
        assert connections.add_event(2, lambda heard=heard: heard.append(1)) == 0  # the same fd, most likely
        thread.join()
        settle(loop)
        assert heard == []
        assert connections.remove_event(2) == 0
