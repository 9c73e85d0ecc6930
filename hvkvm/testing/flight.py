"""What crossed a guest's bus last: kept while it runs, put into words when its test fails.

Threads: the machine's own call what is a `Tap`'s; `lines` any thread.
"""

from __future__ import annotations

from collections import deque
from time import monotonic
from typing import NamedTuple

from hvkvm.record import words
from hvkvm.vmbus.offer import Channel
from hvkvm.vmbus.tap import Tap

KEPT = 100
"""Messages, and as many batches of packets, that are kept."""
MAX_KEPT_BYTES = 4096
"""Of a batch; what is behind is told by its length."""


class _Batch(NamedTuple):
    at: float
    interface: bytes
    name: str
    to_host: bool
    data: bytes
    size: int


class FlightRecorder(Tap):
    """The last messages, channel events and packets, each kind bounded by itself."""

    def __init__(self) -> None:
        self._began = monotonic()
        self._messages: deque[tuple[float, str]] = deque(maxlen=KEPT)
        self._raw: deque[tuple[float, bool, bytes, int]] = deque(maxlen=KEPT)
        self._batches: deque[_Batch] = deque(maxlen=KEPT)

    def received(self, payload: bytes) -> None:
        """See Tap."""
        self._raw.append((monotonic(), True, payload, 0))

    def refused(self, connection_id: int, payload: bytes, status: int) -> None:
        """See Tap."""
        self._raw.append((monotonic(), True, payload, status))

    def sent(self, vp_index: int, sint: int, payload: bytes) -> None:
        """See Tap."""
        self._raw.append((monotonic(), False, payload, 0))

    def channel(self, channel: Channel, what: str) -> None:
        """See Tap."""
        self._messages.append((monotonic(), f"channel {what}: {channel.offer.name}, relid {channel.relid}"))

    def ring(self, channel: Channel, to_host: bool, data: bytes) -> None:
        """See Tap."""
        offer = channel.offer
        kept = data[:MAX_KEPT_BYTES]
        self._batches.append(_Batch(monotonic(), offer.interface, offer.name, to_host, kept, len(data)))

    def lines(self) -> list[str]:
        """The last messages and packets, decoded, in the order of time."""
        found = list(self._messages)
        for at, to_host, payload, status in list(self._raw):
            refused = f", refused with status {status:#x}" if status else ""
            found.append((at, f"{words.arrow(to_host)} {words.message(payload)}{refused}"))
        for batch in list(self._batches):
            for text in words.ring(batch.interface, batch.data, whole=len(batch.data) == batch.size):
                found.append((batch.at, f"{words.arrow(batch.to_host)} {batch.name}: {text}"))
        found.sort(key=lambda entry: entry[0])
        return [f"{at - self._began:9.3f} {text}" for at, text in found[-2 * KEPT :]]
