"""Tells the user what the machine reports while it runs: one line on stderr for each warning."""

from __future__ import annotations

from contextlib import suppress
from typing import TextIO

from hvkvm.events import Event, Observer, Warned


class Teller(Observer):
    """Prints `Warned` events; the low rooms have limited their rate already. Any thread."""

    def __init__(self, stream: TextIO, *, quiet: bool) -> None:
        self._stream = stream
        self._quiet = quiet

    def event(self, event: Event) -> None:
        if isinstance(event, Warned) and not self._quiet:
            with suppress(OSError, ValueError):  # a full disk behind `2>` ends no guest
                self._stream.write(f"hvkvm: {event.text}\n")
                self._stream.flush()
