"""Signals as things to read: they come through a pipe, and the main thread acts when it waits.

A Python signal handler runs between any two instructions of the main thread, also
halfway through starting the machine. And it runs only when the main thread executes
Python again: a signal that comes after its last look and before `poll` has begun, or
that the kernel gives to another thread, would leave it asleep. So the handlers do
nothing; the interpreter's own C handler writes the number into a pipe
(`signal.set_wakeup_fd`), which ends a `poll` at any moment and on any thread.
Owner: the main thread.

A verb without a machine, which only has something to take away at its end, takes `ending_by_exit`.
"""

from __future__ import annotations

import os
import select
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from types import FrameType

from hvkvm.runtime.timers import MAX_WAIT

_PIECE = 4096


def hang_up_is_ignored(number: int) -> bool:
    """Whether the run was started by nohup or its like: it shall outlive its terminal."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


def _leave_to_the_pipe(_number: int, _frame: FrameType | None) -> None:
    """A handler must be there, or the interpreter would not write the number."""


@contextmanager
def ending_by_exit() -> Iterator[None]:
    """Have SIGTERM and SIGHUP end the block by SystemExit (143, 129), as Ctrl-C does by KeyboardInterrupt.

    Their own action ends the process where it stands, and half a file or another process is left.
    One that is ignored stays so, and a second one does not cut short what the first has begun to clean up.
    """
    ended = False

    def end(number: int, _frame: FrameType | None) -> None:
        nonlocal ended
        if not ended:
            ended = True
            raise SystemExit(128 + number)

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


class Signals:
    """Takes `numbers` over until closed. `wait` returns them one at a time, in the order they came."""

    def __init__(self, numbers: Iterable[signal.Signals]) -> None:
        self._noted: deque[int] = deque()
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = {
            number: signal.signal(number, _leave_to_the_pipe)
            for number in numbers
            if not hang_up_is_ignored(number)
        }

    def wait(self, fd: int, timeout: float | None) -> int | None:
        """The next signal; None once `fd` is readable or `timeout` seconds have passed."""
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        poller.register(self._reader, select.POLLIN)
        end = monotonic() + (float("inf") if timeout is None else timeout)
        while True:
            self._take()
            if self._noted:
                return self._noted.popleft()
            left = max(0.0, end - monotonic())
            ready = dict(poller.poll(min(MAX_WAIT, left) * 1000))
            if self._reader not in ready and (fd in ready or left <= 0):
                return None

    def _take(self) -> None:
        """Read what has come. Signals that others handle (SIGTSTP, SIGCHLD) leave their numbers here too."""
        with suppress(BlockingIOError):
            while data := os.read(self._reader, _PIECE):
                self._noted.extend(number for number in data if number in self._before)

    def close(self) -> None:
        """Give every signal back. Idempotent."""
        for number, before in self._before.items():
            signal.signal(number, before if before is not None else signal.SIG_DFL)
        self._before.clear()
        if self._reader >= 0:
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._reader)
            os.close(self._writer)
            self._reader = self._writer = -1

    def __enter__(self) -> Signals:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
