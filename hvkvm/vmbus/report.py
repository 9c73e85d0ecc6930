"""What a guest does wrong on VMBus, told upward at a bounded rate.

Why: a guest may repeat a mistake as fast as it can post messages. The first few
of a kind are told, then only each count that is a power of two: no clock, and a
log that grows with the logarithm. Used by the VMBus room, on the I/O loop.
"""

from __future__ import annotations

from hvkvm.events import Observer, Warned

BURST = 4


class Reports:
    """Counts by kind. Kinds are our own constants, so there are few; the text may hold guest numbers."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self.counts: dict[str, int] = {}

    def add(self, kind: str, text: str) -> None:
        """Count one more of `kind` and perhaps tell `text`."""
        count = self.counts[kind] = self.counts.get(kind, 0) + 1
        if count <= BURST:
            self._observer.event(Warned("vmbus", f"{kind}: {text}"))
        elif not count & (count - 1):
            self._observer.event(Warned("vmbus", f"{kind}: {text} (the {count}th of its kind)"))

    @property
    def total(self) -> int:
        """All that was counted."""
        return sum(self.counts.values())
