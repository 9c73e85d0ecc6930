"""The live line on a terminal until the guest says its first word.

One line on stderr, redrawn by the I/O loop's timer, erased before anything
else is written. Silent when stderr is no terminal, or with --quiet or --json.
Owner: drawn on the I/O loop; `clear()` may be called from any thread.
"""

from __future__ import annotations

import os
import threading
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hvkvm.cli.teller import Teller
    from hvkvm.machine.machine import Machine
    from hvkvm.runtime.timers import Timer

REDRAW_SECONDS = 0.25
ERASE = "\r\x1b[K"


class StatusLine:
    """Shows elapsed seconds, exits and where vCPU 0 is, until `clear()` or the first console output."""

    def __init__(
        self,
        machine: Machine,
        stream: Teller,
        *,
        enabled: bool,
        what: str = "guest running {seconds:.1f} s, {exits} exits, no output yet",
    ) -> None:
        self._machine = machine
        self._what = what
        self._stream = stream
        self._live = enabled and stream.isatty() and os.environ.get("TERM") != "dumb"
        self._drawn = False
        self._lock = threading.Lock()
        self._timer: Timer | None = None
        self._began = monotonic()

    def start(self) -> None:
        """Start drawing; the guest's first byte ends it."""
        if self._live:
            self._machine.board.on_first_output = self.clear
            with self._lock:
                self._timer = self._machine.platform.io.call_later(REDRAW_SECONDS, self._draw)

    def _draw(self) -> None:
        with self._lock:
            if not self._live or self._stream.gone:
                return
            exits = sum(self._machine.exit_counts().values())
            text = f"hvkvm: {self._what.format(seconds=monotonic() - self._began, exits=exits)}"
            if "NO_COLOR" not in os.environ:
                text = f"\x1b[2m{text}\x1b[0m"
            if not self._stream.waiting:  # a terminal that was stopped shows no more of them
                self._stream.write(ERASE + text)
                self._drawn = True
            self._timer = self._machine.platform.io.call_later(REDRAW_SECONDS, self._draw)

    def clear(self) -> None:
        """Erase the line and draw no more. Any thread, any number of times."""
        with self._lock:
            self._live = False
            timer, self._timer = self._timer, None
            if self._drawn:
                self._drawn = False
                self._stream.write(ERASE)
                self._stream.flush()
        if timer is not None:
            timer.cancel()  # not under the lock: it waits for `_draw`, which takes that
