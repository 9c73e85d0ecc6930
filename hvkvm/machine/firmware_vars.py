"""Keeps firmware's variables in a file: what the guest's flash holds, written soon after it changes.

A worker thread writes; the I/O loop says when. What the guest writes between two such moments is lost in a
crash, at most DELAY seconds of it and the time that the disk takes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from hvkvm.errors import HvkvmError, Stopped
from hvkvm.events import Observer, Warned
from hvkvm.runtime.workers import Workers

if TYPE_CHECKING:
    from hvkvm.boot.variables_file import VariablesFile
    from hvkvm.devices.flash import Flash
    from hvkvm.runtime.io_loop import IoLoop

DELAY = 0.1
"""Seconds: firmware writes a variable byte by byte, in bursts."""


class KeptVariables:
    """`flash`'s content in `file`, which has it already, and is closed with this."""

    def __init__(self, file: VariablesFile, flash: Flash, io: IoLoop, observer: Observer) -> None:
        self.file = file
        self.unkept = ""
        """Why the file has not what the guest has changed; empty where it has."""
        self._flash = flash
        self._io = io
        self._observer = observer
        self._workers = Workers(io, limit=1, name="firmware variables")
        self._queue = self._workers.queue(1, "firmware variables")
        self._lock = threading.Lock()
        self._due = False
        # The loop's own.
        self._kept = flash.content
        self._writing = False
        self._at_rest: list[Callable[[], object]] = []

    def changed(self) -> None:
        """The flash has other content: write it soon. Any thread."""
        with self._lock:
            if self._due:
                return
            self._due = True
        with suppress(Stopped):
            self._io.call_later(DELAY, self._write)

    def _write(self) -> None:
        with self._lock:
            self._due = False
        if self._writing:
            return  # it looks again when it is done
        content = self._flash.content
        if content == self._kept:
            self._rest()
            return
        self._writing = True
        try:
            self._queue.submit(self._work, content, self._written)
        except Stopped as error:  # no thread can be had
            self._written(content, error)

    def _work(self, content: bytes) -> None:
        self.file.replace(content)

    def _written(self, content: bytes, outcome: object) -> None:
        self._writing = False
        if isinstance(outcome, BaseException):
            self.unkept = getattr(outcome, "strerror", None) or str(outcome)
            text = f"--firmware-vars {self.file.path}: {self.unkept}: what the guest has changed is not kept"
            self._observer.event(Warned("firmware variables", text))
            self._rest()
        else:
            self._kept, self.unkept = content, ""
            self._write()

    def _rest(self) -> None:
        waiting, self._at_rest = self._at_rest, []
        for done in waiting:
            done()

    def keep(self, done: Callable[[], object]) -> None:
        """`done()` once the file has what the flash holds, or cannot have it. The loop."""
        self._at_rest.append(done)
        self._write()

    def close(self) -> None:
        """End the worker, and let others have the file. Idempotent."""
        with suppress(HvkvmError):
            self._workers.close()
            self.file.close()
