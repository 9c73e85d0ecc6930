"""A host program that has connected and not yet said to which port of the guest.

Owner: `vsock.Vsock`, on the I/O loop.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from hvkvm.abi.hvsock import MAX_LISTEN_PORT
from hvkvm.runtime.protocols import CallLater
from hvkvm.runtime.socket_watch import READ, SocketWatch

MAX_LINE_BYTES = 32
"""Longest CONNECT line, its newline included."""

SECONDS = 10.0
"""A program that has not said it by then is silent."""


class Caller:
    r"""Reads `CONNECT <port>\n` and not a byte more, since the stream may follow at once.

    `done(self, port)` once; None for a program that left, was silent or said
    something else. `sock` is non-blocking, and then the callee's. OSError or
    Stopped if it cannot be watched.
    """

    def __init__(
        self,
        sock: socket.socket,
        watch: SocketWatch,
        call_later: CallLater,
        done: Callable[[Caller, int | None], object],
    ) -> None:
        self.sock = sock
        self._done: Callable[[Caller, int | None], object] | None = done
        self._line = b""
        self._watched = watch.add(sock.fileno(), self._ready)
        try:
            self._timer = call_later(SECONDS, self.finish)
            self._watched.arm(READ)
        except BaseException:
            self._watched.remove()
            raise

    def _ready(self, _mask: int) -> None:
        try:
            seen = self.sock.recv(MAX_LINE_BYTES - len(self._line), socket.MSG_PEEK)
            line, newline, _ = seen.partition(b"\n")
            # All of it belongs to the line, so there is as much to take.
            self._line += self.sock.recv(len(line + newline)) if seen else b""
        except BlockingIOError:
            self._watched.arm(READ)
            return
        except OSError:
            seen = newline = b""
        if newline:
            self.finish(parse_connect(self._line))
        elif not seen or len(self._line) >= MAX_LINE_BYTES:
            self.finish()
        else:
            self._watched.arm(READ)

    def finish(self, port: int | None = None) -> None:
        """Be done with it. Idempotent."""
        done, self._done = self._done, None
        if done is not None:
            self._timer.cancel()
            self._watched.remove()
            done(self, port)


def parse_connect(line: bytes) -> int | None:
    r"""The port of `CONNECT <port>\n`; None for any other line."""
    word, _, number = line.rstrip(b"\r\n").partition(b" ")
    if word != b"CONNECT" or not number.isdigit() or len(number) > 10:
        return None
    port = int(number)
    return port if port <= MAX_LISTEN_PORT else None
