"""The progress of something that takes longer than two seconds, on stderr.

A stream that takes nothing (a full disk, a reader that went away) ends what is told, not the work.
"""

from __future__ import annotations

import sys
from time import monotonic
from types import TracebackType

QUIET_SECONDS = 2.0
REDRAW_SECONDS = 0.25
LINE_SECONDS = 10.0
ERASE = "\r\x1b[K"


class Progress:
    """`progress(done, total)`: a line that is redrawn on a terminal, one every ten seconds elsewhere."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._stream = sys.stderr
        self._quiet = False
        try:
            self._terminal = self._stream.isatty()
        except ValueError:  # closed
            self._terminal, self._quiet = False, True
        self._began = monotonic()
        self._next = self._began + QUIET_SECONDS
        self._drawn = False

    def __call__(self, done: int, total: int) -> None:
        now = monotonic()
        if now < self._next or not total or self._quiet:
            return
        percent = min(100, 100 * done // total)
        left = (now - self._began) * (total - done) / done if done else 0.0
        text = f"hvkvm: {self._what}: {percent} %, {left:.0f} s left"
        if self._terminal:
            self._write(ERASE + text)
            self._drawn = True
        else:
            self._write(text + "\n")
        self._next = now + (REDRAW_SECONDS if self._terminal else LINE_SECONDS)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._quiet = True

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._drawn and not self._quiet:
            self._write(ERASE)
