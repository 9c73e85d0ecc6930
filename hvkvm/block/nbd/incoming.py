"""What an NBD server sends, in few system calls: heads out of a buffer, data straight into its place.

Why: a reply to a read is a head in two or three parts and then data. A call for each would give the GIL away
four times a request. So a call for a head takes what has come behind it, too, and a call for data takes what
follows that into a buffer of ours: one call for each reply where several requests are under way, or fewer.

Owner: the thread that receives.
"""

from __future__ import annotations

import socket

from hvkvm.block.buffers import IOV_MAX, Cutter
from hvkvm.block.nbd.handshake import receive_some

AHEAD = 8192
"""Bytes that are taken before they are asked for, at most. So much of a reply's data is copied once more."""


class Incoming:
    """The bytes that come from `sock`, in order. OSError where it ends too early."""

    __slots__ = ("_ahead", "_at", "_end", "_sock")

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._ahead = memoryview(bytearray(AHEAD))
        self._at = self._end = 0

    def take(self, n: int) -> bytes:
        """The next `n` bytes, of which there may be AHEAD at most."""
        if self._end - self._at < n:
            self._more(n)
        at = self._at
        self._at = at + n
        return self._ahead[at : at + n].tobytes()

    def fill(self, parts: list[memoryview], n: int) -> None:
        """Put the next `n` bytes into `parts`, which have room for so many."""
        there = min(n, self._end - self._at)
        if there:
            n -= there
            parts = self._scatter(parts, there, n)
        while n:
            # There is nothing ahead now. What the server has sent behind the data comes along.
            places = [*parts, self._ahead] if len(parts) < IOV_MAX else parts[:IOV_MAX]
            got = self._sock.recvmsg_into(places)[0]
            if not got:
                raise ConnectionResetError("the server closed the connection")
            if got >= n:
                self._at, self._end = 0, got - n
                return
            n -= got
            parts = _behind(parts, got, n)

    def _more(self, n: int) -> None:
        """Have at least `n` bytes ahead."""
        left = self._end - self._at
        self._ahead[:left] = self._ahead[self._at : self._end]
        self._at, self._end = 0, left
        while self._end < n:
            self._end += receive_some(self._sock, self._ahead[self._end :])

    def _scatter(self, parts: list[memoryview], n: int, left: int) -> list[memoryview]:
        """Put `n` bytes of those ahead into `parts`; the room for the `left` bytes behind them."""
        cutter = Cutter(parts)
        for part in cutter.take(n):
            end = self._at + len(part)
            part[:] = self._ahead[self._at : end]
            self._at = end
        return cutter.take(left)


def _behind(parts: list[memoryview], done: int, left: int) -> list[memoryview]:
    cutter = Cutter(parts)
    cutter.take(done)
    return cutter.take(left)
