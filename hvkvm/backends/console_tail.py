"""The last lines a guest printed, for whoever must say what happened.

Bounded in lines and in line length, whatever the guest prints. `add` comes from
the I/O loop, `lines` from any thread.
"""

from __future__ import annotations

import re
import threading
from collections import deque

_ESCAPE_SEQUENCES = re.compile(rb"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|[()][A-Z0-9]|[=>78cDEHMZ])")
_UNPRINTABLE = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]")


class ConsoleTail:
    """Keeps `max_lines` lines of at most `max_length` bytes; a longer one is cut into several."""

    def __init__(self, max_lines: int = 200, max_length: int = 512) -> None:
        self._lines: deque[bytes] = deque(maxlen=max_lines)
        self._open = b""  # the line that has no newline yet
        self._max_length = max_length
        self._lock = threading.Lock()

    def add(self, data: bytes) -> None:
        """Take output as it came."""
        with self._lock:
            *ended, rest = (self._open + data).split(b"\n")
            for line in ended[-(self._lines.maxlen or 0) :]:
                self._append(line)
            while len(rest) > self._max_length:
                self._append(rest[: self._max_length])
                rest = rest[self._max_length :]
            self._open = rest

    def _append(self, line: bytes) -> None:
        for start in range(0, max(1, len(line)), self._max_length):
            self._lines.append(line[start : start + self._max_length])

    def lines(self, count: int | None = None) -> list[str]:
        """The last `count` lines (None: all kept), the unfinished one included, fit to print. Any thread."""
        with self._lock:
            kept = [*self._lines, self._open] if self._open else list(self._lines)
        if count is not None:
            kept = kept[-count:] if count else []
        return [_printable(line) for line in kept]


def _printable(line: bytes) -> str:
    line = _UNPRINTABLE.sub(b"", _ESCAPE_SEQUENCES.sub(b"", line))
    return line.decode("utf-8", "replace")
