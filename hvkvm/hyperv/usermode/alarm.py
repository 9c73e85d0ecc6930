"""A host timer whose callback runs on the I/O loop: what a synthetic timer is built on.

Only `usermode.synic` makes these, one for each timer that a guest ever started.
"""

from __future__ import annotations

from collections.abc import Callable

from hvkvm.hyperv.connections import ReaderLoop
from hvkvm.runtime.timerfd import TimerFd


class FdAlarm:
    """Calls `callback` on `io` when the time is up. Raises OSError, Stopped; then nothing is left open.

    `arm` and `disarm` come from one thread at a time (the timer's lock); `close` waits
    for a callback that is running.
    """

    __slots__ = ("_callback", "_reader", "_timer")

    def __init__(self, io: ReaderLoop, callback: Callable[[], None]) -> None:
        self._callback = callback
        self._timer = TimerFd()
        try:
            self._reader = io.add_reader(self._timer.fd, self._due)
        except BaseException:
            self._timer.close()
            raise

    def _due(self) -> None:
        if self._timer.drain():
            self._callback()

    def arm(self, nanoseconds: int) -> None:
        """Call back once in `nanoseconds`, and not at the time set before."""
        self._timer.arm(nanoseconds)

    def disarm(self) -> None:
        """Do not call back; a callback that is on its way may still come."""
        self._timer.disarm()

    def close(self) -> None:
        """Stop for good."""
        self._reader.remove()
        self._timer.close()
