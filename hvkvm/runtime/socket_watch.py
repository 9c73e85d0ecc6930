"""Readiness of sockets on the I/O loop, asked for each time: one `arm`, one call.

Why: a stream between a socket and a ring knows by itself what it can go on with,
and asks to be told of the socket only when it is stuck there. A standing watch
would call for every packet, and for ever once the peer has hung up. So all
sockets of a service share one epoll of one-shot watches, which is itself one
reader of the loop.

Owner: the I/O loop, for all but construction.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable

from hvkvm.errors import NO_MEMORY
from hvkvm.runtime.protocols import TimedWatcher
from hvkvm.runtime.retry import Retry

READ = select.EPOLLIN | select.EPOLLRDHUP
WRITE = select.EPOLLOUT
HANG_UP = select.EPOLLHUP | select.EPOLLERR
"""Told whatever was asked for."""

MAX_EVENTS = 16
"""Sockets told of in one turn of the loop: a callback may open a connection, half a millisecond's work."""


class Watched:
    """One socket, from `SocketWatch.add`."""

    __slots__ = ("_armed", "_callback", "_later", "_watch", "fd")

    def __init__(self, watch: SocketWatch, fd: int, callback: Callable[[int], object]) -> None:
        self._watch = watch
        self._callback = callback
        self._armed = 0
        self._later: Retry | None = None
        self.fd = fd

    def arm(self, mask: int) -> None:
        """Call once when what `mask` names, or was asked before and not told yet, is so; or on HANG_UP."""
        wanted = self._armed | mask
        if wanted != self._armed:
            self._armed = wanted
            self._watch._epoll.modify(self.fd, wanted | select.EPOLLONESHOT)

    def arm_to_send(self, refused: OSError | None) -> None:
        """`arm` for WRITE, some time later where `refused` says that the host had no memory to send.

        The socket itself has room then: `arm` would call at once, for as long as there is no memory.
        """
        if refused is None or refused.errno not in NO_MEMORY:
            self.arm(WRITE)
            return
        if self._later is None:
            self._later = Retry(self._watch._io, self._arm_again)
        self._later.later()

    def _arm_again(self) -> None:
        self.arm(WRITE)

    def _wait_no_more(self) -> None:
        if self._later is not None:
            self._later.cancel()

    def remove(self) -> None:
        """Forget it. Before closing the fd. Repeatable."""
        self._watch._remove(self)

    def _fire(self, mask: int) -> None:
        self._armed = 0
        self._callback(mask)


class SocketWatch:
    """The sockets of one service. Stopped when the loop takes no readers any more."""

    def __init__(self, io: TimedWatcher) -> None:
        self._io = io
        self._pid = os.getpid()
        self._epoll = select.epoll()
        self._watched: dict[int, Watched] = {}
        try:
            self._handle = io.add_reader(self._epoll.fileno(), self._ready)
        except BaseException:
            self._epoll.close()
            raise

    def add(self, fd: int, callback: Callable[[int], object]) -> Watched:
        """A watch of `fd`, for HANG_UP alone as yet; `callback(mask)` gets what is so. OSError."""
        watched = Watched(self, fd, callback)
        self._epoll.register(fd, select.EPOLLONESHOT)
        self._watched[fd] = watched
        return watched

    def _ready(self) -> None:
        events = self._epoll.poll(0, MAX_EVENTS)
        # Looked up before any callback runs, since it may close a socket and open one of the same number.
        found = [(self._watched.get(fd), mask) for fd, mask in events]
        errors: list[Exception] = []
        for watched, mask in found:
            if watched is not None and self._watched.get(watched.fd) is watched:
                try:
                    watched._fire(mask)
                except Exception as error:  # the others are told only once, and that is now
                    errors.append(error)
        if errors:
            raise errors[0] if len(errors) == 1 else ExceptionGroup("telling of sockets", errors)

    def _remove(self, watched: Watched) -> None:
        if self._watched.get(watched.fd) is not watched:
            return
        del self._watched[watched.fd]
        if os.getpid() != self._pid:
            return  # a forked child shares the list with its parent, whose it is
        watched._wait_no_more()
        try:
            self._epoll.unregister(watched.fd)
        except (OSError, ValueError):
            return  # closed before, either of them

    def close(self) -> None:
        """Watch nothing any more. Idempotent; also after the loop's end."""
        if not self._epoll.closed:
            self._handle.remove()
            for watched in self._watched.values():
                watched._wait_no_more()
            self._watched.clear()
            self._epoll.close()
