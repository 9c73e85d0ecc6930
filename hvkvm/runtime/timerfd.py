"""A timerfd: a host timer of nanosecond resolution that the I/O loop can watch.

Why not `IoLoop.call_later`: epoll waits whole milliseconds, so a 1 ms timer
would come after 1 to 2. Python 3.11 has no timerfd of its own, hence ctypes.

`arm` and `disarm` may be called from any thread; `drain` belongs to the loop.
"""

from __future__ import annotations

import ctypes
import os
from time import CLOCK_MONOTONIC

_TFD_NONBLOCK = os.O_NONBLOCK
_TFD_CLOEXEC = os.O_CLOEXEC
_SECOND = 1_000_000_000

_libc = ctypes.CDLL(None, use_errno=True)
_create = _libc.timerfd_create
_create.argtypes = (ctypes.c_int, ctypes.c_int)
_settime = _libc.timerfd_settime
_settime.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class TimerFd:
    """One one-shot timer on CLOCK_MONOTONIC. Raises OSError when none can be made."""

    __slots__ = ("_spec", "fd")

    def __init__(self) -> None:
        self.fd: int = _create(CLOCK_MONOTONIC, _TFD_NONBLOCK | _TFD_CLOEXEC)
        if self.fd < 0:
            error = ctypes.get_errno()
            raise OSError(error, f"timerfd_create: {os.strerror(error)}")
        # struct itimerspec: interval (s, ns), then value (s, ns). Written by whoever holds the user's lock.
        self._spec = (ctypes.c_long * 4)()

    def arm(self, nanoseconds: int) -> None:
        """Become readable in `nanoseconds` (at least 1), once; replaces what was set. OSError once closed.

        Two threads must not be in here at once.
        """
        self._spec[2], self._spec[3] = divmod(max(nanoseconds, 1), _SECOND)
        self._set()

    def disarm(self) -> None:
        """Not become readable any more; like `arm` for threads."""
        self._spec[2] = self._spec[3] = 0
        self._set()

    def _set(self) -> None:
        if _settime(self.fd, 0, ctypes.addressof(self._spec), None) < 0:
            error = ctypes.get_errno()
            raise OSError(error, f"timerfd_settime: {os.strerror(error)}")

    def drain(self) -> bool:
        """Whether it went off since the last time; not readable until it does again."""
        try:
            os.read(self.fd, 8)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Close the fd, after the loop has stopped watching it. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
