"""A layer on a wire: a port to the NIC above it, a receiver to the wire below it, that lets all through.

What looks at frames, or does something to them, derives from it. Owner: the I/O loop, for all but
construction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from hvkvm.net.port import Frame, Offloads, Receiver, Statistics
from hvkvm.net.wire import Wire


class Between:
    """See `net.port.Port`, and `net.port.Receiver`. `below` is this layer's from now on."""

    def __init__(self, below: Wire) -> None:
        self.below = below
        self.kind = below.kind
        self.offloads: Offloads = below.offloads
        self.mtu = below.mtu
        self._above: Receiver | None = None
        below.attach(self)

    @property
    def statistics(self) -> Statistics:
        """The wire's."""
        return self.below.statistics

    @property
    def up(self) -> bool:
        """See `Wire`."""
        return self.below.up

    def plug(self, plugged: bool) -> None:
        """See `Wire`."""
        self.below.plug(plugged)

    def attach(self, receiver: Receiver) -> None:
        """See `Port.attach`."""
        self._above = receiver

    def start(self) -> None:
        """See `Port.start`."""
        self.below.start()

    def stop(self, done: Callable[[], object]) -> None:
        """See `Port.stop`."""
        self.below.stop(done)

    def close(self) -> None:
        """See `Port.close`."""
        self.below.close()

    def when_closed(self, done: Callable[[], object]) -> None:
        """See `Port.when_closed`."""
        self.below.when_closed(done)

    def send(self, frames: Sequence[Frame], queue: int = 0) -> int:
        """See `Port.send`."""
        return self.below.send(frames, queue)

    def resume(self) -> None:
        """See `Port.resume`."""
        self.below.resume()

    def set_offloads(self, wanted: Offloads) -> None:
        """See `Port.set_offloads`."""
        self.below.set_offloads(wanted)

    def inspect(self) -> Mapping[str, object]:
        """See `Port.inspect`."""
        return self.below.inspect()

    # The wire's calls.

    def frames(self, frames: Sequence[Frame]) -> int:
        """See `Receiver.frames`."""
        return len(frames) if self._above is None else self._above.frames(frames)

    def writable(self) -> None:
        """See `Receiver.writable`."""
        if self._above is not None:
            self._above.writable()

    def link(self, up: bool) -> None:
        """See `Receiver.link`."""
        if self._above is not None:
            self._above.link(up)
