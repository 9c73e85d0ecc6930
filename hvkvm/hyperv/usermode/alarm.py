"""Host timers whose callbacks run on the I/O loop: what synthetic timers are built on.

Why one timerfd for all of them: a guest has four a VP, may start each of them,
and may have them all go off at their shortest period. They must take neither a
file descriptor each, which the process may not have when the guest asks, nor a
turn of the loop each: one turn runs the MAX_ALARMS that were due first. Those
that are late go off in the order in which they were due, so that none of them
keeps the others waiting either.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic

from hvkvm.runtime.protocols import Watcher
from hvkvm.runtime.timerfd import TimerFd
from hvkvm.runtime.timers import Timer, TimerHeap

MAX_ALARMS = 16
"""Alarms that go off in one turn of the I/O loop."""


class Alarms:
    """The alarms of one machine. Raises OSError, Stopped; then nothing is left open."""

    def __init__(self, io: Watcher) -> None:
        # Guards the timerfd, and the heap together with it. Never held while a callback runs.
        self._lock = threading.Lock()
        self._heap = TimerHeap()
        self._ringing = False  # the loop is at it, and sets the timerfd when it is done
        self._timer = TimerFd()
        try:
            self._reader = io.add_reader(self._timer.fd, self._ring)
        except BaseException:
            self._timer.close()
            raise

    def make(self, callback: Callable[[], None]) -> Alarm:
        """An alarm that calls `callback` on the loop. Never fails."""
        return Alarm(self, callback)

    def _add(self, timer: Timer) -> None:
        with self._lock:
            if self._heap.add(timer) and not self._ringing:
                self._set()

    def _set(self) -> None:
        due = self._heap.next_due()
        if due is not None and self._timer.fd >= 0:
            self._timer.arm(int((due - monotonic()) * 1e9))

    def _ring(self) -> None:
        """The I/O loop. May come with nothing due: a stopped alarm leaves the timerfd as it was."""
        self._timer.drain()
        with self._lock:
            self._ringing = True
        errors: list[Exception] = []
        for timer in self._heap.take_due(monotonic(), MAX_ALARMS):
            try:
                timer.run()
            except Exception as error:  # the others go off all the same
                errors.append(error)
        with self._lock:
            self._ringing = False
            self._set()
        if errors:
            raise errors[0] if len(errors) == 1 else ExceptionGroup("alarms", errors)

    def close(self) -> None:
        """Let the timerfd go; waits for a callback that runs. Idempotent."""
        self._reader.remove()
        with self._lock:
            self._heap.clear()
            self._timer.close()


class Alarm:
    """One alarm, from `Alarms.make`.

    `arm` and `disarm` come from one thread at a time (the timer's lock).
    """

    __slots__ = ("_alarms", "_callback", "_timer")

    def __init__(self, alarms: Alarms, callback: Callable[[], None]) -> None:
        self._alarms = alarms
        self._callback = callback
        self._timer: Timer | None = None

    def arm(self, nanoseconds: int) -> None:
        """Call back once in `nanoseconds`, and not at the time set before."""
        self.disarm()
        timer = self._timer = Timer(
            monotonic() + nanoseconds / 1e9, self._callback, (), self._alarms._heap.discard
        )
        self._alarms._add(timer)

    def disarm(self) -> None:
        """Do not call back; a callback that is on its way may still come."""
        timer, self._timer = self._timer, None
        if timer is not None and timer.active:
            timer.cancel()

    def close(self) -> None:
        """Stop for good."""
        self.disarm()
