"""Another attempt, later, at what the host refuses: it may have an fd or some memory again by then.

Why: a call that needs an fd or memory of the kernel fails at any moment, and what
fails in a callback of the I/O loop ends the machine. Who makes such a call
catches its OSError and asks here to be called again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from hvkvm.errors import Stopped
from hvkvm.runtime.protocols import Delayer, TimerHandle

RETRY_SECONDS = 1.0
"""Until the next attempt."""


class Retry:
    """Calls `fn()` on the loop, `seconds` (or RETRY_SECONDS) after `later`; it waits for one call at a time.

    `later` may be called on any thread, but not on two at once: under a lock that `fn` takes, or on the loop.
    """

    def __init__(self, io: Delayer, fn: Callable[[], object], seconds: float | None = None) -> None:
        self._io = io
        self._fn = fn
        self._seconds = seconds
        self._timer: TimerHandle | None = None
        self.waits = False
        """Whether a call is to come."""

    def later(self) -> None:
        """Ask for the call. Nothing happens if it is asked for already, or if the loop takes no timers."""
        if not self.waits:
            # Said before it is asked for: on another thread the timer may run before its handle is stored.
            self.waits = True
            with suppress(Stopped):
                seconds = RETRY_SECONDS if self._seconds is None else self._seconds
                self._timer = self._io.call_later(seconds, self._again)

    def cancel(self) -> None:
        """Ask for it no more. Synchronous, so not under a lock that `fn` takes. Idempotent."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        self.waits = False

    def _again(self) -> None:
        self.waits = False
        self._fn()
