"""Signals as things to read: the handler notes the number, the main thread acts when it waits.

A Python signal handler runs between any two instructions of the main thread,
also halfway through starting the machine. So it does nothing but leave a note.
Owner: the main thread.
"""

from __future__ import annotations

import select
import signal
from collections import deque
from collections.abc import Iterable
from time import monotonic
from types import FrameType

from hvkvm.kvm.irqfd import EventFd


def _hang_up_is_ignored(number: signal.Signals) -> bool:
    """Whether the run was started by nohup or its like: it shall outlive its terminal."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


class Signals:
    """Takes `numbers` over until closed. `wait` returns them one at a time."""

    def __init__(self, numbers: Iterable[signal.Signals]) -> None:
        self._noted: deque[int] = deque()
        self._wake = EventFd()
        self._before = {
            number: signal.signal(number, self._note) for number in numbers if not _hang_up_is_ignored(number)
        }

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._noted.append(number)
        self._wake.signal()

    def wait(self, fd: int, timeout: float | None) -> int | None:
        """The next signal; None once `fd` is readable or `timeout` seconds have passed."""
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        poller.register(self._wake.fd, select.POLLIN)
        end = None if timeout is None else monotonic() + timeout
        while True:
            if self._noted:
                return self._noted.popleft()
            self._wake.drain()
            if self._noted:
                continue  # noted between the look and the drain
            left = None if end is None else max(0.0, end - monotonic()) * 1000
            ready = poller.poll(left)
            if self._noted:
                continue
            if not ready or any(number == fd for number, _events in ready):
                return None

    def close(self) -> None:
        """Give every signal back. Idempotent."""
        for number, before in self._before.items():
            signal.signal(number, before if before is not None else signal.SIG_DFL)
        self._before.clear()
        self._wake.close()

    def __enter__(self) -> Signals:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
