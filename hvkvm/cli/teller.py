"""Standard error of `hvkvm run`: told by any thread, written by one of its own.

Why a thread: a pipe that nobody reads and a terminal that was stopped make
write(2) wait, and that must hold up neither a vCPU nor the I/O loop nor the end
of a machine. What waits is bounded; what finds no room is counted, and the count
is told behind the rest. `close` waits for the reader a while, so that the line that
says how a run ended is there for everyone who reads.

A thread belongs to the process that made it: in a forked child this does nothing.
"""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from contextlib import suppress
from types import TracebackType
from typing import TextIO

from hvkvm.events import Event, LimitedObserver, Warned
from hvkvm.runtime.kick import block_signals

LIMIT = 1 << 16
"""Bytes that wait for the reader."""

CLOSE_SECONDS = 10.0
"""How long the end of a run waits for standard error to be read."""

FLUSH_SECONDS = 0.1
"""How long `flush` does: for what should be on the terminal before the guest's next line is."""

_PRIVILEGE = 16
"""So many times the room of what a guest causes has what the run itself says."""

_CHUNK = 4096
"""PIPE_BUF: a pipe that poll(2) finds writable takes this many bytes without a wait."""


class Teller(LimitedObserver):
    """Prints `Warned` events, and whatever else the run has to say, as whole lines on `stream`.

    `quiet` leaves the warnings out. As a stream (`write`, `flush`, `isatty`) it serves the status line.
    """

    def __init__(self, stream: TextIO, *, quiet: bool, limit: int = LIMIT) -> None:
        super().__init__()
        self._stream = stream
        self._quiet = quiet
        self._limit = limit
        try:
            # Written by number: a thread that waits inside a Python stream holds a lock that the
            # interpreter wants at its exit.
            self._fd: int | None = stream.fileno()
        except (OSError, ValueError, AttributeError):
            self._fd = None
        self._pid = os.getpid()
        # Reentrant, since signal handlers end machines; never held while something is written.
        self._changed = threading.Condition(threading.RLock())
        self._queue: deque[str] = deque()
        self._size = 0
        self._writing = False
        self._closed = False
        self._gone = False
        self._thread: threading.Thread | None = None
        self.dropped = 0
        """Lines for which there was no room."""

    # Any thread; none of these waits, but for `flush`.

    def tell(self, event: Event) -> None:
        """Print a warning."""
        if isinstance(event, Warned) and not self._quiet:
            self.write(f"hvkvm: {event.text}\n")

    def say(self, line: str) -> None:
        """Print `line` behind our name."""
        self.write(f"hvkvm: {line}\n", always=True)

    def write(self, text: str, *, always: bool = False) -> None:
        """Print `text` in its turn, or count it as dropped; `always` finds room where warnings find none."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            if self._closed or self._gone:
                return
            if self._size + len(text) > self._limit * (_PRIVILEGE if always else 1):
                self.dropped += 1
                return
            self._queue.append(text)
            self._size += len(text)
            if self._thread is None:
                self._start()
            self._changed.notify_all()

    @property
    def gone(self) -> bool:
        """Whether nobody will ever read it: the terminal has hung up, say."""
        return self._gone

    @property
    def waiting(self) -> bool:
        """Whether something is not written yet."""
        with self._changed:
            return bool(self._queue) or self._writing

    def flush(self) -> None:
        """Wait until all is written, for FLUSH_SECONDS at most."""
        if os.getpid() == self._pid:
            with self._changed:
                self._changed.wait_for(lambda: not self.waiting, FLUSH_SECONDS)

    def isatty(self) -> bool:
        """Whether a person looks at it."""
        return self._stream.isatty()

    def close(self, seconds: float = CLOSE_SECONDS) -> bool:
        """Wait until all is written, for `seconds` at most, and take no more; whether all was. Idempotent.

        The main thread.
        """
        if os.getpid() != self._pid:
            return False
        with self._changed:
            if not self._closed and self._thread is None and self._queue:
                self._start()  # there was no thread to be had before: perhaps there is one now
            self._changed.wait_for(lambda: self._gone or not (self.waiting or self.dropped), seconds)
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        # A thread that waits for a reader is left behind: it is a daemon, and its process is about to end.
        if thread is not None and not self.waiting:
            thread.join(seconds)
        return not (self._gone or self.waiting or self.dropped)

    def _start(self) -> None:
        thread = threading.Thread(target=self._main, name="teller", daemon=True)
        with suppress(RuntimeError):  # no thread to be had: the next line, or close, tries again
            thread.start()
            self._thread = thread

    # The thread.

    def _main(self) -> None:
        block_signals()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed or self.dropped)
                if self._queue:
                    text = self._queue.popleft()
                    self._size -= len(text)
                elif self.dropped:
                    text = f"hvkvm: {self.dropped} messages are lost: standard error was not read in time\n"
                    self.dropped = 0
                else:
                    return
                self._writing = True
            written = self._write_out(text)
            with self._changed:
                self._writing = False
                if not written:
                    self._gone = True
                    self._queue.clear()
                    self._size = self.dropped = 0
                self._changed.notify_all()
                if self._gone:
                    return

    def _write_out(self, text: str) -> bool:
        """Write all of it, however long that takes; False if nobody will ever read it."""
        if self._fd is None:
            try:
                self._stream.write(text)
                self._stream.flush()
            except (OSError, ValueError):
                return False
            return True
        data = memoryview(text.encode(self._stream.encoding or "utf-8", "backslashreplace"))
        poller = select.poll()
        poller.register(self._fd, select.POLLOUT)
        while data:
            try:
                poller.poll()
                data = data[os.write(self._fd, data[:_CHUNK]) :]
            except BlockingIOError:
                continue
            except OSError:
                return False
        return True

    def __enter__(self) -> Teller:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
