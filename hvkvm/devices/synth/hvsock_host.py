"""The host program's end of an hvsock connection: a socket, and what it has yet to take.

What the socket does not take at once is copied, so that the guest has its room back. A program that
has gone takes everything from then on, and it goes nowhere; what it sent before is still to come.
Owner: the I/O loop.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from fcntl import ioctl
from termios import FIONREAD

from hvkvm.errors import is_temporary


class HostEnd:
    """`sock` is made non-blocking; who made this closes it."""

    __slots__ = ("ahead", "gone", "left", "refused", "sock")

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.ahead = memoryview(b"")
        """What a program before this one had sent: it comes before what is in the socket."""
        self.left = b""
        """For the socket, which was full."""
        self.refused: OSError | None = None
        """Why it took nothing at last, if it did not."""
        self.gone = False
        """The socket takes no more, and what the guest sends goes nowhere."""

    def has_data(self) -> bool:
        """Whether the program has sent something that was not read yet."""
        if self.ahead:
            return True
        try:
            return bool(self.sock.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def unread(self) -> bytes:
        """What the program has sent and was not read yet; it stays there."""
        try:
            # Its program may have made the socket as large as it liked.
            size = int.from_bytes(ioctl(self.sock, FIONREAD, bytes(4)), sys.byteorder)
            return bytes(self.ahead) + self.sock.recv(size, socket.MSG_PEEK)
        except OSError:
            return bytes(self.ahead)

    def read(self, views: Sequence[memoryview]) -> int:
        """Move what the program has sent into `views`; how many bytes, 0 at its end. OSError of the socket.

        BlockingIOError if there is nothing.
        """
        if not self.ahead:
            return os.readv(self.sock.fileno(), views)
        size = 0
        for view in views:
            piece = self.ahead[size : size + len(view)]
            view[: len(piece)] = piece
            size += len(piece)
        self.ahead = self.ahead[size:]
        return size

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
            self.refused = None
        except OSError as error:
            if not is_temporary(error):
                self.leave()
                return True
            sent, self.refused = 0, error
        if sent < size:
            self.left = b"".join(views)[sent:]
        return sent == size

    def send_left(self) -> bool:
        """Whether nothing is kept any more."""
        if not self.left:
            return True
        try:
            sent = self.sock.send(self.left, socket.MSG_NOSIGNAL)
            self.refused = None
        except OSError as error:
            if is_temporary(error):
                self.refused = error
                return False
            self.leave()
            return True
        self.left = self.left[sent:]
        return not self.left

    def end_stream(self) -> None:
        """Tell the program that no more comes."""
        with suppress(OSError):  # it has gone
            self.sock.shutdown(socket.SHUT_WR)
