"""A host's standard input, read piece by piece as somebody downstream has room for it.

Whatever it is, it ends nothing but itself: a file, a pipe that nobody closes,
/dev/null, a closed fd. Nothing is read that was not asked for, so the
sender of a pipe is held up by its reader at the far end. A terminal is read only
while this process is in its foreground: a background job that reads is stopped.

Owner: made on any thread; `request` and the rest on the I/O loop, `close` also
after its end.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from hvkvm.backends.output import open_again
from hvkvm.backends.terminal import in_foreground
from hvkvm.errors import Stopped, exhausted
from hvkvm.runtime import retry

if TYPE_CHECKING:
    from hvkvm.runtime.io_loop import Handle, IoLoop

FOREGROUND_SECONDS = 0.2
"""How often a background job looks whether it may read its terminal by now."""

Taker = Callable[[bytes], object]


class HostInput:
    """Gives what can be read from `fd`, which stays the caller's. None: there is no input."""

    def __init__(self, fd: int | None, io: IoLoop) -> None:
        self._io = io
        self._own: int | None = None
        self._fd: int | None = None
        self._tty = False
        self._taker: Taker | None = None
        self._size = 0
        self._reader: Handle | None = None
        self._scheduled = False
        self._closed = False
        if fd is None:
            return
        try:
            os.fstat(fd)
            self._tty = os.isatty(fd)
        except OSError:
            return  # started with it closed
        self._own = open_again(fd, os.O_RDONLY)
        self._fd = fd if self._own is None else self._own

    def request(self, size: int, taker: Taker) -> None:
        """Call `taker(data)` once, on the loop and never from in here: with up to `size` bytes, or none
        at the end of input.

        A request that is still open is replaced: its taker is never called.
        """
        self._size, self._taker = size, taker
        if self._reader is None:
            self._soon(self._try)

    def withdraw(self) -> None:
        """Forget a request that is still open: what comes is kept for who asks next."""
        self._taker = None
        self._unwatch()

    def _soon(self, fn: Callable[[], None], seconds: float = 0.0) -> None:
        if self._scheduled or self._closed:
            return
        self._scheduled = True
        with suppress(Stopped):
            if seconds:
                self._io.call_later(seconds, fn)
            else:
                self._io.call_soon(fn)

    def _try(self) -> None:
        """Read at once where that cannot block, else when something is there."""
        self._scheduled = False
        if self._closed or self._taker is None:
            return
        if self._fd is None:
            self._give(b"")
        elif self._is_background(self._fd):
            self._soon(self._try, FOREGROUND_SECONDS)
        elif self._own is not None and not self._tty:
            self._read()
        else:
            self._watch()

    def _is_background(self, fd: int) -> bool:
        """Whether reading would stop this process. A terminal that has hung up is none: it is at its end."""
        return self._tty and not in_foreground(fd) and os.isatty(fd)

    def _watch(self) -> None:
        if self._fd is None:
            return
        try:
            self._reader = self._io.add_reader(self._fd, self._readable)
        except Stopped:
            pass
        except (OSError, ValueError) as error:
            if exhausted(error) is not None:
                self._soon(self._try, retry.RETRY_SECONDS)
            else:
                self._read()  # a file or its like: epoll does not take what is always readable

    def _readable(self) -> None:
        if self._fd is not None and self._is_background(self._fd):
            self._unwatch()
            self._soon(self._try, FOREGROUND_SECONDS)
        else:
            self._read()

    def _read(self) -> None:
        if self._fd is None:
            self._give(b"")
            return
        try:
            data = os.read(self._fd, self._size)
        except (BlockingIOError, InterruptedError):
            if self._reader is None:
                self._watch()
            return
        except OSError:
            data = b""  # a terminal that has hung up, a folder, an fd for writing
        if not data:
            self._fd = None
        self._give(data)

    def _give(self, data: bytes) -> None:
        taker, self._taker = self._taker, None
        self._unwatch()
        if taker is not None:
            taker(data)

    def _unwatch(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.remove()

    def close(self) -> None:
        """Read no more. Idempotent."""
        self._closed = True
        self.withdraw()
        own, self._own = self._own, None
        if own is not None:
            os.close(own)
