"""The run-on-this-thread queue: how others ask the owner of some state to act on it.

The promise, in full. A `submit()` that returns means exactly one of two things
will happen to that item: it is run once, on the draining thread, after every
item whose `submit()` returned earlier (FIFO); or it is reported cancelled once,
by the thread that closes the queue. A `submit()` that raises means neither ever
happens. Nothing is forgotten, also when closing races with submitting.

A drain pass runs what was queued when it began, or the first so many of it, so
that an item which submits again cannot keep its thread from its other duties.

Owner: one consumer thread drains. Any thread submits. Whoever ends the consumer
closes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from hvkvm.errors import Stopped

Cancelled = Callable[[], object]
"""Called without arguments for an item that will never run; must not block."""

_Item = tuple[Callable[..., object], tuple[Any, ...], Cancelled | None]


class WorkQueue:
    """A FIFO of calls for one consumer thread. `name` appears in errors."""

    def __init__(self, name: str = "work queue") -> None:
        self.name = name
        self.items: deque[_Item] = deque()
        """What waits. The consumer may test its truth without a lock; nobody else touches it."""
        self.running: Callable[..., object] | None = None
        """What the consumer runs just now, for state dumps."""
        self._closed = False
        # Reentrant: a signal handler or a finalizer that runs inside submit() may submit, too.
        self._lock = threading.RLock()

    def submit(self, fn: Callable[..., object], *args: Any, cancelled: Cancelled | None = None) -> None:
        """Queue `fn(*args)`. Raises Stopped when the queue is closed. Any thread.

        Waking the consumer is the caller's business, after this returns.
        """
        with self._lock:
            # Under the lock, so that close() either sees the item or refuses it.
            if self._closed:
                raise Stopped(f"{self.name} takes no more work")
            self.items.append((fn, args, cancelled))

    def drain(self, most: int | None = None) -> int:
        """Run what is queued now, or the first `most` of it, in order; the number run. Consumer thread.

        An item's exception propagates at once; the items behind it stay queued.
        """
        items = self.items
        count = len(items)
        if most is not None and count > most:
            count = most
        try:
            for _ in range(count):
                try:
                    fn, args, _cancelled = items.popleft()
                except IndexError:  # the item before closed the queue
                    break
                self.running = fn
                fn(*args)
        finally:
            self.running = None
        return count

    def close(self) -> int:
        """Refuse further work and report what is left as cancelled, in order; the number cancelled.

        Idempotent. Every report is made even when some raise; what they raised
        comes out as one ExceptionGroup at the end. Any thread.
        """
        with self._lock:
            self._closed = True
        errors: list[Exception] = []
        count = 0
        while True:
            try:
                # One by one: an item that a drain still running takes first is run, not cancelled.
                _fn, _args, cancelled = self.items.popleft()
            except IndexError:
                break
            count += 1
            if cancelled is not None:
                try:
                    cancelled()
                except Exception as error:
                    errors.append(error)
        if errors:
            raise ExceptionGroup(f"cancelling what {self.name} held", errors)
        return count

    @property
    def closed(self) -> bool:
        """Whether it refuses work. Any thread."""
        return self._closed
