"""Timers of the I/O loop: a heap by due time, with cheap cancelling.

Times are `time.monotonic()` seconds. The heap may be used from any thread; timers run
on the loop.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Sequence
from typing import Any

MAX_WAIT = 86_400.0
"""Seconds: who waits longer looks again meanwhile, since poll(2) and epoll_wait(2) take 24.8 days at most."""
_COMPACT_AT = 64
"""So many cancelled timers may wait in the heap before it is rebuilt without them."""


class Timer:
    """One call in the future, from `IoLoop.call_later`."""

    __slots__ = ("_args", "_on_cancel", "active", "callback", "due")

    def __init__(
        self,
        due: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        on_cancel: Callable[[Timer], object],
    ) -> None:
        self.due = due
        self.callback = callback
        self.active = True
        """False once it was cancelled or has begun to run."""
        self._args = args
        self._on_cancel = on_cancel

    def run(self) -> None:
        """Call back, unless cancelled meanwhile. The loop."""
        if self.active:
            self.active = False
            self.callback(*self._args)

    def cancel(self) -> None:
        """Do not call back; synchronous, like `Handle.remove`. Repeatable."""
        self.active = False
        self._on_cancel(self)


class TimerHeap:
    """Timers not yet due."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._heap: list[tuple[float, int, Timer]] = []
        self.entries: Sequence[tuple[float, int, Timer]] = self._heap
        """What waits, the earliest first. The loop may test its truth and look at that one without a lock:
        what it does not see in the middle of a change, its next round does."""
        self._sequence = 0  # equal due times run in the order of their making
        self._cancelled = 0

    def add(self, timer: Timer) -> bool:
        """Add; whether it is now the earliest, so that a sleeper must wake earlier."""
        with self._lock:
            self._sequence += 1
            heapq.heappush(self._heap, (timer.due, self._sequence, timer))
            return self._heap[0][2] is timer

    def discard(self, timer: Timer) -> None:
        """A timer was cancelled: it may leave now, or when it is due."""
        with self._lock:
            self._cancelled += 1
            if self._cancelled > _COMPACT_AT and self._cancelled * 2 > len(self._heap):
                self._heap[:] = [entry for entry in self._heap if entry[2].active]
                heapq.heapify(self._heap)
                self._cancelled = 0

    def next_due(self) -> float | None:
        """When the earliest one is due; None when there is none."""
        with self._lock:
            heap = self._heap
            while heap and not heap[0][2].active:
                heapq.heappop(heap)
            return heap[0][0] if heap else None

    def take_due(self, now: float, most: int | None = None) -> list[Timer]:
        """Take out those due at `now`, or the first `most` of them, earliest first."""
        due: list[Timer] = []
        with self._lock:
            heap = self._heap
            while heap and heap[0][0] <= now and len(due) != most:
                timer = heapq.heappop(heap)[2]
                if timer.active:
                    due.append(timer)
        return due

    def clear(self) -> None:
        """Drop all of them."""
        with self._lock:
            self._heap.clear()

    def __len__(self) -> int:
        return len(self._heap)
