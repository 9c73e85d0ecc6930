"""A run as a picture: phases of the boot, exits of each vCPU, bytes of disks and NICs, channels and the bus.

Collected while the machine runs, written when it has ended: as SVG, or as JSON in
the Chrome trace format, which Perfetto and chrome://tracing open. What is collected
is bounded: samples are taken farther apart when a run is long, and bus events after
the first MAX_EVENTS are counted only.

Threads: `Tap`'s methods come on the I/O loop and vCPU threads, `sample` on the loop;
the rest is the main thread's.
"""

from __future__ import annotations

from collections.abc import Mapping
from time import monotonic

from hvkvm.abi import vmbus_messages as wire
from hvkvm.tuples import NamedTuple
from hvkvm.vmbus.offer import Channel
from hvkvm.vmbus.tap import Tap

MAX_EVENTS = 20_000
MAX_SAMPLES = 4096
FIRST_INTERVAL = 0.02
"""Seconds between samples of the exits, at the beginning; doubled whenever there are MAX_SAMPLES."""


class Instant(NamedTuple):
    """Something that happened on the bus."""

    at: float
    name: str
    to_host: bool


class Span(NamedTuple):
    """A channel while it was open."""

    name: str
    begin: float
    end: float


class Sample(NamedTuple):
    """What came since the sample before: exits of each vCPU by reason, and bytes by device and direction."""

    at: float
    exits: tuple[Mapping[str, int], ...]
    moved: Mapping[str, int] = {}
    """Bytes by "disk0 read", "net0 sent" and the like; what did not move is left out."""


class Timeline(Tap):
    """Times are seconds on the monotonic clock; `begin` is the first of them."""

    wants_rings = False

    def __init__(self, begin: float) -> None:
        self.begin = begin
        self.end = begin
        self.marks: dict[str, float] = {}
        """When a phase of the boot began, by its name, in order."""
        self.instants: list[Instant] = []
        self.lost = 0
        """Bus events beyond MAX_EVENTS."""
        self.spans: list[Span] = []
        self.samples: list[Sample] = []
        self.interval = FIRST_INTERVAL
        self._open: dict[int, tuple[str, float]] = {}
        self._counted: list[dict[str, int]] = []
        self._moved: dict[str, int] = {}

    # What happens.

    def mark(self, phase: str) -> None:
        """A phase begins now; its first beginning counts."""
        self.marks.setdefault(phase, monotonic())

    def sample(self, counts: list[dict[str, int]], moved: dict[str, int] | None = None) -> None:
        """The exits of each vCPU so far, by reason, and the bytes that devices have moved so far."""
        last = self._counted or [{} for _ in counts]
        exits = tuple(
            {reason: n - old.get(reason, 0) for reason, n in new.items() if n > old.get(reason, 0)}
            for new, old in zip(counts, last, strict=True)
        )
        self._counted = counts
        now_moved = moved or {}
        # A device that was replaced counts from 0 again.
        since = {
            name: n - (old if n >= (old := self._moved.get(name, 0)) else 0) for name, n in now_moved.items()
        }
        self._moved = now_moved
        self.samples.append(Sample(monotonic(), exits, {name: n for name, n in since.items() if n}))
        if len(self.samples) >= MAX_SAMPLES:
            self.samples = [
                _merged(*pair) for pair in zip(self.samples[::2], self.samples[1::2], strict=False)
            ]
            self.interval *= 2

    def received(self, payload: bytes) -> None:
        """See Tap."""
        self._note(payload, True)

    def sent(self, vp_index: int, sint: int, payload: bytes) -> None:
        """See Tap."""
        self._note(payload, False)

    def _note(self, payload: bytes, to_host: bool) -> None:
        kind = wire.KINDS.get(wire.message_type(payload) or 0)
        name = str(kind) if kind is not None else "unknown"
        if name == "INITIATE_CONTACT":
            self.mark("VMBus")
        if len(self.instants) >= MAX_EVENTS:
            self.lost += 1
        else:
            self.instants.append(Instant(monotonic(), name, to_host))

    def channel(self, channel: Channel, what: str) -> None:
        """See Tap."""
        if what == "opened":
            self._open[channel.relid] = (channel.offer.name, monotonic())
        elif channel.relid in self._open:
            self._close(channel.relid, monotonic())

    def _close(self, relid: int, at: float) -> None:
        name, begin = self._open.pop(relid)
        if len(self.spans) < MAX_EVENTS:
            self.spans.append(Span(name, begin, at))
        else:
            self.lost += 1

    def finish(self) -> None:
        """The run is over: what is open ends here. Idempotent."""
        self.end = max(self.end, monotonic())
        for relid in list(self._open):
            self._close(relid, self.end)

    @property
    def phases(self) -> list[Span]:
        """From each mark to the next one."""
        ordered = sorted(self.marks.items(), key=lambda entry: entry[1])
        ends = [at for _name, at in ordered[1:]] + [self.end]
        return [Span(name, at, end) for (name, at), end in zip(ordered, ends, strict=True)]


def _merged(first: Sample, second: Sample) -> Sample:
    def added(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
        return {reason: a.get(reason, 0) + b.get(reason, 0) for reason in {*a, *b}}

    return Sample(second.at, tuple(map(added, first.exits, second.exits)), added(first.moved, second.moved))
