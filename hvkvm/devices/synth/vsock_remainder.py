"""What a guest wrote to a host program that was slow, before its connection ended.

Why: the channel is gone, its rings are the guest's again, and the program has
yet to read. So the last bytes stay here, with the socket, until it does.

Owner: `vsock.Vsock`, on the I/O loop.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from hvkvm.errors import is_temporary
from hvkvm.runtime.protocols import CallLater, TimerHandle
from hvkvm.runtime.socket_watch import HANG_UP, WRITE, SocketWatch


class Remainder:
    """Sends `data` on `sock`, which is non-blocking and now its own, and closes it; `done(self)` once, last.

    A program that takes nothing for `seconds` gets no more. OSError or Stopped if
    it cannot be watched, and then the socket is still the caller's.
    """

    def __init__(
        self,
        sock: socket.socket,
        data: bytes,
        watch: SocketWatch,
        call_later: CallLater,
        seconds: float,
        done: Callable[[Remainder], object],
    ) -> None:
        self._sock = sock
        self._data = memoryview(data)
        self._call_later = call_later
        self._seconds = seconds
        self._done: Callable[[Remainder], object] | None = done
        self._timer: TimerHandle | None = None
        self._watched = watch.add(sock.fileno(), self._ready)
        try:
            self._watched.arm(WRITE)
            self._timer = call_later(seconds, self.finish)
        except BaseException:
            self._watched.remove()
            raise

    def _ready(self, mask: int) -> None:
        try:
            sent = 0 if mask & HANG_UP else self._sock.send(self._data, socket.MSG_NOSIGNAL)
        except OSError as error:
            if is_temporary(error):
                self._watched.arm_to_send(error)
                return
            sent = 0
        self._data = self._data[sent:]
        if not sent or not self._data:
            self.finish()
            return
        self._watched.arm(WRITE)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._call_later(self._seconds, self.finish)

    def finish(self) -> None:
        """Be done with it. Idempotent."""
        done, self._done = self._done, None
        if done is None:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._watched.remove()
        self._sock.close()
        done(self)
