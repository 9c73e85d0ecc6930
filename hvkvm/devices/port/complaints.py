"""Counts what guests do wrong and reports it at a bounded rate.

A guest may repeat a mistake a hundred thousand times a second, so the port
devices never report each one: the first few are told, then only every count
that is a power of two. That needs no clock and bounds the log by log2.
Called by port devices from any vCPU thread.
"""

from __future__ import annotations

from hvkvm.events import Observer, Warned


class Complaints:
    """One subject's counter; `count` may be a few short when vCPUs race, never negative."""

    __slots__ = ("_burst", "_observer", "_subject", "count")

    def __init__(self, observer: Observer, subject: str, *, burst: int = 8) -> None:
        self._observer = observer
        self._subject = subject
        self._burst = burst
        self.count = 0

    def add(self, text: str) -> None:
        """Count one more and perhaps report it. Any thread."""
        self.count = count = self.count + 1
        if count <= self._burst:
            self._observer.event(Warned(self._subject, text))
        elif not count & (count - 1):
            self._observer.event(Warned(self._subject, f"{text} (the {count}th complaint of its kind)"))
