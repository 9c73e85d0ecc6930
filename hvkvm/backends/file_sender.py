"""A thread that writes to a file, for `Output`: a disk that stands still shall hold up nobody else.

Why: poll(2) calls a file ready whatever its disk does, and write(2) waits for the disk: a
network file system whose server has gone keeps it for hours. On the I/O loop that would
stop every device of the guest, and `hvkvm ctl` with them.

One thread of its own a sender, made with the first bytes. It holds no lock while it writes.
Where no thread can be had, the caller writes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from time import sleep

from hvkvm.errors import HostExhausted, is_temporary
from hvkvm.runtime.kick import block_signals
from hvkvm.runtime.thread_start import start_thread

PIECE = 1 << 16
_SHORT_SECONDS = 0.05


class FileSender:
    """Writes to `fd` what `waiting` holds. `changed` is its lock, held by whoever calls anything here.

    `sent(error)`, on the thread and under the lock, hears of each write: the bytes have left
    `waiting`, or `error` says why not. Raises OSError.
    """

    def __init__(
        self,
        fd: int,
        waiting: bytearray,
        changed: threading.Condition,
        sent: Callable[[OSError | None], object],
    ) -> None:
        self.idle_fd = os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """Readable while nothing waits."""
        self._fd = os.dup(fd)  # the thread's own: it may be in a write when the caller closes `fd`
        self._waiting = waiting
        self._changed = changed
        self._sent = sent
        self._closed = False
        self._thread: threading.Thread | None = None

    def send(self) -> bool:
        """Have the thread write what waits; False if there can be none, and the caller must."""
        if not self._waiting:
            return True
        if self._thread is None:
            thread = threading.Thread(target=self._main, name="output", daemon=True)
            try:
                start_thread(thread)
            except HostExhausted:
                return False
            self._thread = thread
        with suppress(BlockingIOError):
            os.eventfd_read(self.idle_fd)
        self._changed.notify_all()
        return True

    def close(self) -> None:
        """Write no more. Not waited for: a thread whose disk stands still is a daemon. Idempotent."""
        if not self._closed:
            self._closed = True
            self._changed.notify_all()
            os.close(self.idle_fd)
            if self._thread is None:
                os.close(self._fd)

    def _main(self) -> None:
        block_signals()
        try:
            self._write()
        finally:
            os.close(self._fd)

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                piece = bytes(self._waiting[:PIECE])
            failure: OSError | None = None
            count = 0
            try:
                count = os.write(self._fd, piece)
            except OSError as error:
                if is_temporary(error):
                    sleep(_SHORT_SECONDS)  # the host has no memory for it now
                    continue
                failure = error
            with self._changed:
                if self._closed:
                    return
                del self._waiting[:count]
                self._sent(failure)
                if not self._waiting:
                    os.eventfd_write(self.idle_fd, 1)
                self._changed.notify_all()
