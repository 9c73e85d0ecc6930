"""What the low rooms report upward: typed events and the observer that receives them.

Rooms below `machine` never print and never import upward; they call
`observer.event(...)`. The base observer ignores everything, so an event costs
one call when nobody listens. Events may be raised from any thread: an observer
must be thread-safe and must not block.
"""

from __future__ import annotations

from typing import NamedTuple


class Warned(NamedTuple):
    """Something odd that does not end the machine; `subject` groups repeats for rate limiting."""

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
