"""Where one may listen to a bus: messages, channels, signals and what the rings carry.

A `Tap` is told on the threads that do the work, so it must be quick, must not block
and must not raise. Without one nothing of this runs: the rings of a channel are
tapped ones only if there was a tap that wants them when the channel opened.

A ring is told a batch at a time, as the bytes that one end has just published or
given back: whole packets, with descriptors and trailers, however they were read or
written. What the guest wrote is read a second time for that, so a hostile guest may
show a tap something else than the device saw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hvkvm.vmbus.offer import Channel
from hvkvm.vmbus.pages import Ram
from hvkvm.vmbus.ring_reader import RingReader
from hvkvm.vmbus.ring_writer import RingWriter

TO_GUEST = False
TO_HOST = True


class Tap:
    """Hears what crosses a bus. This one ignores it."""

    wants_rings = True
    """Whether `ring` and `signal` are of interest, for channels that open from now on."""

    def received(self, payload: bytes) -> None:
        """A message of the guest is looked at. The I/O loop."""

    def refused(self, connection_id: int, payload: bytes, status: int) -> None:
        """An HvPostMessage on a connection of the bus that gets an error, an HvStatus. A vCPU's thread."""

    def sent(self, vp_index: int, sint: int, payload: bytes) -> None:
        """A message for the guest takes its place behind the others. The I/O loop."""

    def channel(self, channel: Channel, what: str) -> None:
        """The channel was "opened" or "closed", or "failed" to open. The I/O loop."""

    def ring(self, channel: Channel, to_host: bool, data: bytes) -> None:
        """Packets that the host has read or written. The I/O loop."""

    def pointed(self, channel: Channel, to_host: bool, data: bytes) -> None:
        """A device's own message that a packet of the ring points to, as the device took it. The I/O loop."""

    def signal(self, channel: Channel, to_host: bool) -> None:
        """The guest's doorbell was heard, or an event flag of the guest set. The I/O loop."""


class Both(Tap):
    """Two listeners in place of one; both are told."""

    def __init__(self, first: Tap, second: Tap) -> None:
        self._both = (first, second)
        self.wants_rings = first.wants_rings or second.wants_rings

    def received(self, payload: bytes) -> None:
        """See Tap."""
        for tap in self._both:
            tap.received(payload)

    def refused(self, connection_id: int, payload: bytes, status: int) -> None:
        """See Tap."""
        for tap in self._both:
            tap.refused(connection_id, payload, status)

    def sent(self, vp_index: int, sint: int, payload: bytes) -> None:
        """See Tap."""
        for tap in self._both:
            tap.sent(vp_index, sint, payload)

    def channel(self, channel: Channel, what: str) -> None:
        """See Tap."""
        for tap in self._both:
            tap.channel(channel, what)

    def ring(self, channel: Channel, to_host: bool, data: bytes) -> None:
        """See Tap."""
        for tap in self._both:
            if tap.wants_rings:
                tap.ring(channel, to_host, data)

    def pointed(self, channel: Channel, to_host: bool, data: bytes) -> None:
        """See Tap."""
        for tap in self._both:
            if tap.wants_rings:
                tap.pointed(channel, to_host, data)

    def signal(self, channel: Channel, to_host: bool) -> None:
        """See Tap."""
        for tap in self._both:
            if tap.wants_rings:
                tap.signal(channel, to_host)


Told = Callable[[bytes], object]


class TappedReader(RingReader):
    """A RingReader that tells what it gives back."""

    __slots__ = ("_told",)

    def __init__(self, memory: Ram, pfns: Sequence[int], told: Told) -> None:
        super().__init__(memory, pfns)
        self._told = told

    def publish(self) -> bool:
        """See RingReader."""
        self._tell()
        return super().publish()

    def rest(self) -> tuple[bool, bool]:
        """See RingReader."""
        self._tell()
        return super().rest()

    def _tell(self) -> None:
        size = (self._at - self._published) % self.size
        if size and not self.broken:
            self._told(self._read(self._published, size))


class TappedWriter(RingWriter):
    """A RingWriter that tells what it publishes."""

    __slots__ = ("_told",)

    def __init__(self, memory: Ram, pfns: Sequence[int], told: Told) -> None:
        super().__init__(memory, pfns)
        self._told = told

    def _publish(self) -> None:
        size = (self._at - self._published) % self.size
        if size:
            self._told(self._read(self._published, size))
        super()._publish()
