"""The host program's end of an hvsock connection: a socket, and what it has yet to take.

What the socket does not take at once is copied, so that the guest has its room back. A program that
has gone takes everything from then on, and it goes nowhere; what it sent before is still to come.
Owner: the I/O loop.
"""

from __future__ import annotations

import socket
from contextlib import suppress

MAX_UNREAD = 1 << 20
"""Bytes; more than the system lets a socket hold that nobody made larger."""


class HostEnd:
    """`sock` is made non-blocking; who made this closes it."""

    __slots__ = ("gone", "left", "sock")

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.left = b""
        """For the socket, which was full."""
        self.gone = False
        """The socket takes no more, and what the guest sends goes nowhere."""

    def has_data(self) -> bool:
        """Whether the program has sent something that was not read yet."""
        try:
            return bool(self.sock.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def unread(self) -> bytes:
        """What the program has sent and was not read yet; it stays there."""
        try:
            return self.sock.recv(MAX_UNREAD, socket.MSG_PEEK)
        except OSError:
            return b""

    def leave(self) -> None:
        """Nobody will read the socket's other end."""
        self.gone = True
        self.left = b""

    def send(self, views: list[memoryview], size: int) -> bool:
        """Whether the socket took all `size` bytes, or has gone. What it did not take is kept."""
        if self.gone:
            return True
        try:
            sent = self.sock.sendmsg(views, (), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.leave()
            return True
        if sent < size:
            self.left = b"".join(views)[sent:]
        return sent == size

    def send_left(self) -> bool:
        """Whether nothing is kept any more."""
        if not self.left:
            return True
        try:
            sent = self.sock.send(self.left, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except OSError:
            self.leave()
            return True
        self.left = self.left[sent:]
        return not self.left

    def end_stream(self) -> None:
        """Tell the program that no more comes."""
        with suppress(OSError):  # it has gone
            self.sock.shutdown(socket.SHUT_WR)
