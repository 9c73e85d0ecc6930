"""Signals as things to read: they come through a pipe, and the main thread acts when it waits.

A Python signal handler runs between any two instructions of the main thread, also
halfway through starting the machine. And it runs only when the main thread executes
Python again: a signal that comes after its last look and before `poll` has begun, or
that the kernel gives to another thread, would leave it asleep. So the handlers do
nothing; the interpreter's own C handler writes the number into a pipe
(`signal.set_wakeup_fd`), which ends a `poll` at any moment and on any thread.
Owner: the main thread.

Not so while a machine is built, which may wait long for a server or a program that does not answer. There
is no loop yet in which the main thread would look for signals, nor a guest that could be halfway started,
and what has been made is given back when anything is raised: the handler raises `EndedEarly` there.

A verb without a machine, which only has something to take away at its end, takes `ending_by_exit`.
"""

from __future__ import annotations

import os
import select
import signal
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from types import FrameType
from typing import TYPE_CHECKING

from hvkvm.runtime.timers import MAX_WAIT

if TYPE_CHECKING:
    from hvkvm.machine.machine import Machine

_PIECE = 4096
_END_NOTHING = (signal.SIGQUIT, signal.SIGWINCH)


def hang_up_is_ignored(number: int) -> bool:
    """Whether the run was started by nohup or its like: it shall outlive its terminal."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


class EndedEarly(BaseException):
    """The signal `number` has come before the guest runs. No Exception: nobody takes it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


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
    """Takes `numbers` over until closed. `wait` returns them one at a time, in the order they came.

    `builds` is the class whose making they end, by EndedEarly, all but SIGQUIT and SIGWINCH.
    """

    def __init__(self, numbers: Iterable[signal.Signals], builds: type[Machine] | None = None) -> None:
        self._building = None if builds is None else builds.__init__.__code__
        self._raised: Callable[[], EndedEarly | None] = lambda: None
        self._noted: deque[int] = deque()
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = {
            number: signal.signal(number, self._came) for number in numbers if not hang_up_is_ignored(number)
        }

    def _came(self, number: int, frame: FrameType | None) -> None:
        """Leave it to the pipe, for which a handler must be there; EndedEarly where a machine is being built.

        Which is told from the frames: a word of the builder's that it has ended could come too late. Once it
        has its parts the rest is quick, and ends in moving what gives them back to where `close` finds it:
        nothing may be raised in there. And a second one must not break into what the first one unwinds, which
        takes as long as its error lives: one that is raised in a `__del__`, say, is dropped by Python.
        """
        if self._building is None or self._raised() is not None or number in _END_NOTHING:
            return
        while frame is not None:
            if frame.f_code is self._building and not hasattr(frame.f_locals["self"], "parts"):
                raise self._kept_in_sight(EndedEarly(number))
            frame = frame.f_back

    def _kept_in_sight(self, error: EndedEarly) -> EndedEarly:
        """Not by whoever raises it: a name for it there would keep it, by its traceback, for ever."""
        self._raised = weakref.ref(error)
        return error

    def end_early(self) -> None:
        """Raise EndedEarly for the first that has come by now, but for SIGQUIT and SIGWINCH, which stay."""
        self._take()
        for number in self._noted:
            if number not in _END_NOTHING:
                raise EndedEarly(number)

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
