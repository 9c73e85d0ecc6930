"""Host output that never blocks the I/O loop, and loses no byte that its file takes.

Whether a file description blocks is shared with every process that has it, so
hvkvm must not make its caller's stdout non-blocking. It opens a pipe or terminal
again instead, which gives a description of its own. What the reader does not
take yet waits here; above HIGH_WATER `on_congestion(True)` asks the source to
wait, below LOW_WATER `on_congestion(False)` lets it go on.

A file that takes no bytes (a full disk, a limit on its size) is no reader that
went away: what it refuses is lost and counted, and the next write tries again,
since there may be room by then. A regular file is written by a thread
(`file_sender`), since its disk may stand still.

`write` may be called from any thread, and usually is from the I/O loop, which
sends the rest when the reader is ready.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from fcntl import F_GET_SEALS, fcntl
from time import monotonic, sleep
from typing import TYPE_CHECKING

from hvkvm.errors import NO_MEMORY, Stopped, is_temporary
from hvkvm.runtime.retry import Retry

if TYPE_CHECKING:
    from hvkvm.backends.file_sender import FileSender
    from hvkvm.runtime.io_loop import Handle, IoLoop

HIGH_WATER = 1 << 18
LOW_WATER = 1 << 16
LIMIT = 1 << 20
"""Bytes a source that ignores on_congestion may leave waiting; what comes beyond is lost and counted."""

_PIECE = 1 << 16
_SHORT_SECONDS = 0.05
_GONE = (errno.EPIPE, errno.ECONNRESET)
_CAREFUL_PIECE = 512  # within what POLLOUT promises of a pipe (PIPE_BUF) or a terminal


def open_again(fd: int, flags: int) -> int | None:
    """A new non-blocking description of the pipe or terminal `fd`, or None where that cannot be had.

    Not for files (a new description starts at offset 0) nor sockets (open(2) refuses them).
    """
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISFIFO(mode) or (stat.S_ISCHR(mode) and os.isatty(fd))):
            return None
        return os.open(f"/proc/self/fd/{fd}", flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return None


def _on_a_disk(fd: int) -> bool:
    """Whether it is a regular file, and none in memory: those have seals."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return False
    try:
        fcntl(fd, F_GET_SEALS)
    except OSError:
        return True
    return False


class Output:
    """What waits for one host fd. The fd stays the caller's.

    `on_broken()` is called once, on the writing thread, when nobody reads any
    more (EPIPE, ECONNRESET); from then on output vanishes. `on_failed(error)` is
    called once, there too, for the first write that fails for another reason
    (ENOSPC, EFBIG, EIO, ...). Neither may block.
    """

    def __init__(
        self,
        fd: int,
        io: IoLoop,
        *,
        on_congestion: Callable[[bool], None] | None = None,
        on_broken: Callable[[], None] | None = None,
        on_failed: Callable[[OSError], None] | None = None,
    ) -> None:
        self.on_congestion = on_congestion
        self.on_broken = on_broken
        self.on_failed = on_failed
        self.broken = False
        self.failure: OSError | None = None
        """The first error of a write, if the file refused one."""
        self.lost = 0
        self._io = io
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._waiting = bytearray()
        self._congested = False
        self._short = False
        """The host had no memory for what was to be written."""
        self._own = open_again(fd, os.O_WRONLY)
        self._fd = fd if self._own is None else self._own
        self._ready = select.epoll()
        # What may block and cannot be opened again is asked before each piece. epoll refuses files and their
        # like (EPERM): they take everything at once.
        self._ask_first = self._own is None
        self._sender: FileSender | None = None
        try:
            self._ready.register(self._fd, select.EPOLLOUT)
        except PermissionError:
            self._ask_first = False
            if _on_a_disk(fd):
                from hvkvm.backends.file_sender import FileSender

                self._sender = FileSender(fd, self._waiting, self._changed, self._sent)
                self._ready.register(self._sender.idle_fd, select.EPOLLIN)
        except OSError:
            self.broken = True  # started with stdout closed
        self._watch: Handle | None = None
        self._retry = Retry(io, self._writable)

    def write(self, data: bytes) -> None:
        """Send `data`, or keep it until the reader is ready. Any thread."""
        with self._lock:
            if self.broken:
                return
            room = LIMIT - len(self._waiting)
            self.lost += max(0, len(data) - room)
            self._waiting += data[:room]
            if self._watch is None:
                self._send()
            else:
                self._tell_source()

    @property
    def waiting(self) -> int:
        """Bytes that the reader has not taken yet."""
        return len(self._waiting)

    @property
    def ready_fd(self) -> int:
        """Readable when the reader would take more: for callers that wait for something else too."""
        return self._ready.fileno()

    def drain(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds until everything is sent; whether it was. Not on the I/O loop."""
        deadline = monotonic() + timeout
        while True:
            with self._lock:
                self._send()
                if self._sender is not None:
                    self._changed.wait_for(lambda: not self._waiting, timeout)
                if not self._waiting:
                    return True
            left = deadline - monotonic()
            if left <= 0:
                return False
            if self._short:
                sleep(min(left, _SHORT_SECONDS))  # the file is ready, and not what keeps us
            else:
                self._ready.poll(left)

    def close(self) -> None:
        """Stop; what still waits is dropped (`drain` first). Idempotent, any thread."""
        watch = self._watch
        if watch is not None:
            watch.remove()  # not under the lock, which its callback takes
        self._retry.cancel()  # nor this
        with self._lock:
            self._watch = None
            self._waiting.clear()
            self.broken = True
            if self._sender is not None:
                self._sender.close()
            if self._own is not None:
                os.close(self._own)
                self._own = None
            self._ready.close()

    # --- under the lock --------------------------------------------------------------------------

    def _send(self) -> None:
        """Write what can be written now; afterwards watch or stop watching the fd."""
        waiting = self._waiting
        if self._sender is not None and self._sender.send():
            self._tell_source()
            return
        self._short = False
        try:
            while waiting:
                if self._ask_first and not self._ready.poll(0):
                    break
                del waiting[: os.write(self._fd, waiting[: _CAREFUL_PIECE if self._ask_first else _PIECE])]
        except OSError as error:
            if error.errno in _GONE:
                self._break()
            elif not is_temporary(error):
                self._fail(error)
            self._short = error.errno in NO_MEMORY
        self._tell_source()
        if waiting and self._short:
            self._retry.later()  # the file is ready: watching it would call at once, and again
        elif waiting and self._watch is None:
            # An epoll fd is itself readable when its fd is ready: the loop needs no notion of "writable".
            try:
                self._watch = self._io.add_reader(self._ready.fileno(), self._writable)
            except (Stopped, ValueError):
                return
            except OSError:  # the host has no memory for it now
                self._retry.later()
        if (self._short or not waiting) and self._watch is not None and self._io.in_loop():
            self._watch.remove()
            self._watch = None

    def _sent(self, error: OSError | None) -> None:
        """The file's thread has written a piece, or could not."""
        if error is not None:
            self._fail(error)
        if self._congested and len(self._waiting) <= LOW_WATER:
            with suppress(Stopped):
                self._io.call_soon(self._writable)  # where sources are told

    def _writable(self) -> None:
        with self._lock:
            self._send()

    def _tell_source(self) -> None:
        congested = len(self._waiting) > (LOW_WATER if self._congested else HIGH_WATER)
        if congested != self._congested:
            self._congested = congested
            if self.on_congestion is not None:
                self.on_congestion(congested)

    def _fail(self, error: OSError) -> None:
        self.lost += len(self._waiting)
        self._waiting.clear()
        if self.failure is None:
            self.failure = error
            if self.on_failed is not None:
                self.on_failed(error)

    def _break(self) -> None:
        self.broken = True
        self._waiting.clear()
        if self.on_broken is not None:
            self.on_broken()
