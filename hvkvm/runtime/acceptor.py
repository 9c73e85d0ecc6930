"""Connections that come to a listening socket, on the I/O loop.

Why: a process that is out of fds can take no connection, and its listener stays
readable: a loop that only tried again would do nothing else.

Owner: the I/O loop, for all but construction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from hvkvm.runtime.protocols import Delayer, ReaderHandle, Watcher
from hvkvm.runtime.retry import Retry

if TYPE_CHECKING:
    from socket import socket

ACCEPT_PAUSE = 1.0
"""Seconds until a listener is looked at again that could not be served."""


class AcceptorLoop(Watcher, Delayer, Protocol):
    """What is needed of the I/O loop."""


class Acceptor:
    """Gives every connection that comes to `listener`, non-blocking, to `accepted(sock)`.

    `failed(reason)` hears why one could not be taken. The listener stays the
    caller's, to be closed behind this. Stopped when the loop takes no readers.
    """

    def __init__(
        self,
        io: AcceptorLoop,
        listener: socket,
        accepted: Callable[[socket], object],
        failed: Callable[[str], object] = lambda _reason: None,
    ) -> None:
        self._io = io
        self._listener = listener
        self._accepted = accepted
        self._failed = failed
        self._again = Retry(io, self._resume, ACCEPT_PAUSE)
        self._reader: ReaderHandle | None = io.add_reader(listener.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            sock, _address = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of fds or memory, say. Whoever waits goes on waiting; and the listener stays readable, on
            # which the loop must not turn.
            self._stop_reading()
            self._again.later()
            self._failed(error.strerror or str(error))
            return
        sock.setblocking(False)
        try:
            self._accepted(sock)
        except OSError as error:  # it needs something more that the host has not
            sock.close()
            self._failed(error.strerror or str(error))

    def _resume(self) -> None:
        try:
            self._reader = self._io.add_reader(self._listener.fileno(), self._accept)
        except OSError:
            self._again.later()

    def _stop_reading(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.remove()

    def close(self) -> None:
        """Take no more. Idempotent; also after the loop's end."""
        self._again.cancel()
        self._stop_reading()
