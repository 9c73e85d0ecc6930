"""What a guest does wrong on VMBus, counted by kind and reported upward, each kind a subject of its own.

`events.LimitedObserver` limits what is told of them. Used by VMBus, on the I/O loop.
"""

from __future__ import annotations

from hvkvm.events import Observer, Warned


class Reports:
    """Counts by kind. Kinds are our own constants, so there are few; the text may hold guest numbers."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self.counts: dict[str, int] = {}

    def add(self, kind: str, text: str) -> None:
        """Count one more of `kind` and report `text`."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self._observer.event(Warned(f"vmbus {kind}", f"{kind}: {text}"))

    @property
    def total(self) -> int:
        """All that was counted."""
        return sum(self.counts.values())
