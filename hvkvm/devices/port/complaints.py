"""Counts what guests do wrong at a device, and reports each upward (`events.LimitedObserver` limits that).

Called by port devices from any vCPU thread.
"""

from __future__ import annotations

import threading

from hvkvm.events import Observer, Warned


class Complaints:
    """One subject's counter."""

    __slots__ = ("_lock", "_observer", "_subject", "count")

    def __init__(self, observer: Observer, subject: str) -> None:
        self._observer = observer
        self._subject = subject
        self._lock = threading.Lock()
        self.count = 0

    def add(self, text: str) -> None:
        """Count one more and report it. Any thread."""
        with self._lock:
            self.count += 1
        self._observer.event(Warned(self._subject, text))
