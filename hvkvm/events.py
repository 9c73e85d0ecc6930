"""What the lower modules report upward: typed events and the observer that receives them.

Modules below `machine` never print and never import upward; they call
`observer.event(...)`. The base observer ignores everything, so an event costs
one call when nobody listens. Events may be raised from any thread: an observer
must be thread-safe and must not block.

A guest may repeat a mistake a hundred thousand times a second. So what a module
reports is limited in one place, `LimitedObserver`, which every `Machine` puts
before the observer that it was given: no module limits its own.
"""

from __future__ import annotations

import threading

from hvkvm.tuples import NamedTuple


class Warned(NamedTuple):
    """Something odd that does not end the machine.

    `subject` groups repeats for rate limiting: a constant of ours, never a guest's bytes.
    """

    subject: str
    text: str


class GuestPanicked(NamedTuple):
    """The guest reported a crash through the Hyper-V crash MSRs; `text` is its own message."""

    text: str


class SynicPageMoved(NamedTuple):
    """A guest placed a SynIC page; `gpa` None means it was switched off. kind: "message" or "event"."""

    vp_index: int
    kind: str
    gpa: int | None


Event = Warned | GuestPanicked | SynicPageMoved
"""Any of them; named tuples cost no import and are as quick to make as a tuple."""


class Observer:
    """Receives events; this one ignores them."""

    def event(self, event: Event) -> None:
        """Take one event. Any thread; must not block or raise."""


NULL_OBSERVER = Observer()

BURST = 8
"""So many warnings of one subject are told; after them only every count that is a power of two."""

_MAX_SUBJECTS = 256


class LimitedObserver(Observer):
    """Tells `tell(event)` what is worth telling: of the warnings about one subject the first few, then fewer.

    The rule needs no clock, and what a guest can make of it grows with the logarithm
    of what it does. Events that are not warnings pass. Any thread.
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._counts_lock = threading.Lock()

    def event(self, event: Event) -> None:
        """Tell `event`, unless its subject has had its share."""
        if isinstance(event, Warned):
            subject = event.subject
            with self._counts_lock:
                if subject not in self._counts and len(self._counts) >= _MAX_SUBJECTS:
                    subject = ""  # the rest shares one count, or this table would grow
                count = self._counts[subject] = self._counts.get(subject, 0) + 1
            if count > BURST:
                if count & (count - 1):
                    return
                event = Warned(event.subject, f"{event.text} (number {count} of its kind)")
        self.tell(event)

    def tell(self, event: Event) -> None:
        """What passed the limit. Any thread; must not block or raise."""


class _Forwarded(LimitedObserver):
    """Another observer, limited."""

    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self.tell = observer.event  # type: ignore[method-assign]


def limited(observer: Observer) -> Observer:
    """`observer` behind the limit; itself if it is limited already, or hears nothing anyway."""
    if observer is NULL_OBSERVER or isinstance(observer, LimitedObserver):
        return observer
    return _Forwarded(observer)
