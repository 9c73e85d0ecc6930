"""The requests of a disk that are not answered yet: who waits until there are none, and which of them hang.

Owner: the I/O loop. `inspect` may be called from any thread.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Protocol

from hvkvm.block.request import Request
from hvkvm.events import Observer, Warned
from hvkvm.runtime.protocols import Deferrer, Delayer


class Work:
    """What is under way on an image and is no request: waited for, shown and told of as one is."""

    __slots__ = ("_what", "began")

    def __init__(self, what: str) -> None:
        self._what = what
        self.began = 0.0

    def __str__(self) -> str:
        return self._what


class Loop(Deferrer, Delayer, Protocol):
    """What a disk needs of the I/O loop."""


class Flying:
    """Those of the disk `name`; one that takes longer than `hang_seconds` is told of, once."""

    def __init__(self, io: Loop, name: str, observer: Observer, hang_seconds: float) -> None:
        self._io = io
        self._name = name
        self._observer = observer
        self._hang_seconds = hang_seconds
        self._requests: set[Request | Work] = set()
        self._waiting: list[Callable[[], object]] = []
        self._watching = False
        self._told: set[Request | Work] = set()

    def __len__(self) -> int:
        return len(self._requests)

    def begin(self, request: Request | Work) -> None:
        """It is the disk's now."""
        request.began = monotonic()
        self._requests.add(request)
        if not self._watching:
            self._watch()

    def end(self, request: Request | Work) -> float:
        """It is about to be answered: how many seconds it took. `look` follows, once it has been."""
        self._requests.discard(request)
        return monotonic() - request.began

    def look(self) -> None:
        """Tell who waits for that, if there are none."""
        if self._waiting and not self._requests:
            waiting, self._waiting = self._waiting, []
            for done in waiting:
                self._io.call_soon(done, cancelled=done)

    def when_none(self, done: Callable[[], object]) -> None:
        """`done()` on the loop once there are none; whoever begins more makes it wait for them."""
        self._waiting.append(done)
        self.look()

    @property
    def hung(self) -> str:
        """The oldest, if it hangs, and for how long; "" if none does."""
        oldest = min(self._requests, key=lambda one: one.began, default=None)
        seconds = 0.0 if oldest is None else monotonic() - oldest.began
        return f"{oldest} for {seconds:.0f} s" if seconds > self._hang_seconds else ""

    def inspect(self) -> dict[str, object]:
        """How many there are, the oldest, and those that hang."""
        now = monotonic()
        flying = list(self._requests)
        flying.sort(key=lambda one: one.began)
        return {
            "in_flight": len(flying),
            "oldest": f"{flying[0]} for {now - flying[0].began:.1f} s" if flying else None,
            "hung": [str(one) for one in flying if now - one.began > self._hang_seconds],
        }

    def _watch(self) -> None:
        """Look every so often whether a request hangs; only while there are any."""
        now = monotonic()
        self._told &= self._requests
        for request in self._requests - self._told:
            if now - request.began > self._hang_seconds:
                self._told.add(request)
                text = f"{self._name}: the host has not answered a {request} for {now - request.began:.0f} s"
                self._observer.event(Warned("disk hangs", text))
        self._watching = bool(self._requests)
        if self._watching:
            self._io.call_later(self._hang_seconds / 2, self._watch)
