"""What every backend has: its receiver, link state, and frames that the receiver had no room for.

A backend derives from `BasePort` and says how a batch goes out (`_transmit`), how it hears of room
(`_watch_room`), and how reading begins and ends (`_read_on`, `_read_off`); what it read it gives to
`_deliver`. Owner: the I/O loop, for all but construction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from hvkvm.events import NULL_OBSERVER, Observer, Warned
from hvkvm.net.port import NO_OFFLOADS, Frame, Offloads, Receiver, Statistics, frame_bytes
from hvkvm.runtime.protocols import Loop
from hvkvm.runtime.retry import Retry

TURN_FRAMES = 64
"""Most frames that a backend reads in a turn."""
TURN_BYTES = 512 * 1024
"""A backend reads no further in a turn once it has so many bytes: about what copying costs 0.1 ms."""


class BasePort(ABC):
    """See `net.port.Port`, whose calls these are."""

    kind = "?"

    def __init__(
        self,
        io: Loop,
        mtu: int,
        *,
        offloads: Offloads = NO_OFFLOADS,
        up: bool = True,
        observer: Observer = NULL_OBSERVER,
    ) -> None:
        self.io = io
        self.mtu = mtu
        self.offloads = offloads
        self.statistics = Statistics()
        self.failure = ""
        """Why the wire is down for good, for people."""
        self._observer = observer
        self._receiver: Receiver | None = None
        self._started = False
        self._wire_up = up
        self._plugged = True
        self._told: bool | None = None
        self._kept: Sequence[Frame] = ()
        self._reading = False
        self._resuming = False
        self._read_retry = Retry(io, self._go_on)
        self._room_retry = Retry(io, self._room)

    # The receiver's calls.

    def attach(self, receiver: Receiver) -> None:
        """See `Port.attach`."""
        self._receiver = receiver

    def start(self) -> None:
        """See `Port.start`."""
        self._started = True
        self._told = None
        self.io.call_soon(self._begin)

    def stop(self, done: Callable[[], object]) -> None:
        """See `Port.stop`."""
        self._started = False
        self._stop_reading()
        done()

    def send(self, frames: Sequence[Frame], queue: int = 0) -> int:
        """See `Port.send`."""
        if not self.up:
            self.statistics.sent_dropped += len(frames)
            return len(frames)
        taken = self._transmit(frames, queue)
        if taken < len(frames):
            self.statistics.send_waits += 1
        return taken

    def resume(self) -> None:
        """See `Port.resume`."""
        if self._kept and not self._resuming:
            self._resuming = True
            self.io.call_soon(self._go_on)

    def set_offloads(self, wanted: Offloads) -> None:  # for most backends there is nothing to do
        """See `Port.set_offloads`."""

    def inspect(self) -> Mapping[str, object]:
        """See `Port.inspect`."""
        shown: dict[str, object] = {"kind": self.kind, "mtu": self.mtu, "up": self.up}
        if self.failure:
            shown["failure"] = self.failure
        return {**shown, **self._details(), **self.statistics.as_dict()}

    @abstractmethod
    def close(self) -> None:
        """See `Port.close`."""

    def when_closed(self, done: Callable[[], object]) -> None:
        """See `Port.when_closed`. What most backends have is gone by then."""
        done()

    # The operator's.

    @property
    def up(self) -> bool:
        """Whether the wire carries frames."""
        return self._wire_up and self._plugged

    def plug(self, plugged: bool) -> None:
        """Have the cable plugged in, or pulled out: frames are lost meanwhile, both ways.

        Those that wait for room are lost as well.
        """
        self._plugged = plugged
        self._link_changed()

    # The backend's.

    @abstractmethod
    def _transmit(self, frames: Sequence[Frame], queue: int) -> int:
        """Send as many as go; how many went or were dropped. Keep the statistics of what was sent."""

    @abstractmethod
    def _read_on(self) -> None:
        """Begin to read. OSError where the host has no memory for that; it is tried again."""

    @abstractmethod
    def _read_off(self) -> None:
        """Read no more; also after the loop's end."""

    def _watch_room(self, fd: int) -> None:
        """Have `_room` called once `fd` takes more. OSError as for `_read_on`."""

    def _details(self) -> Mapping[str, object]:
        return {}

    def _wire(self, up: bool) -> None:
        """The wire itself came up or went down."""
        self._wire_up = up
        self._link_changed()

    def _fail(self, reason: str) -> None:
        """The wire is down for good."""
        if not self.failure:
            self.failure = reason
            self._observer.event(
                Warned(f"net-{self.kind}", f"network {self.kind}: {reason}; the link is down")
            )
        self._stop_reading()
        self._wire(False)

    def _await_room(self, fd: int) -> None:
        """`fd` takes no more now: `_room` comes when it does, or after a while where it cannot be watched."""
        try:
            self._watch_room(fd)
        except OSError:
            self._room_retry.later()

    def _room(self) -> None:
        """There may be room again. In a turn of ours."""
        self._writable()

    def _writable(self) -> None:
        """There is room again. In a turn of ours."""
        if self._started and self._receiver is not None:
            self._receiver.writable()

    def _deliver(self, frames: Sequence[Frame], size: int | None = None) -> None:
        """Give frames to the receiver, in a turn of ours. What finds no room is kept, and reading ends.

        `size`: bytes of all of them, where that is known.
        """
        receiver, statistics = self._receiver, self.statistics
        if receiver is None or not self._plugged:
            statistics.received_dropped += len(frames)
            return
        taken = receiver.frames(frames)
        statistics.received_frames += taken
        if taken == len(frames) and size is not None:
            statistics.received_bytes += size
        else:
            statistics.received_bytes += sum(map(frame_bytes, frames[:taken]))
        if taken < len(frames):
            self._kept = frames[taken:]
            statistics.receive_waits += 1
            self._stop_reading()

    # Turns.

    def _begin(self) -> None:
        if not self._started:
            return
        self._tell_link()
        self._go_on()

    def _go_on(self) -> None:
        self._resuming = False
        if not self._started or self.failure:
            return
        kept, self._kept = self._kept, ()
        if kept:
            self._deliver(kept)
        if not self._kept and not self._reading and self._started and self._wire_up:
            self._reading = True
            try:
                self._read_on()
            except OSError:
                self._stop_reading()
                self._read_retry.later()

    def _stop_reading(self) -> None:
        self._read_retry.cancel()
        if self._reading:
            self._reading = False
            self._read_off()

    def _link_changed(self) -> None:
        if self._started:
            self.io.call_soon(self._tell_link)

    def _tell_link(self) -> None:
        if self._started and self._receiver is not None and self._told != self.up:
            self._told = self.up
            self._receiver.link(self.up)
            if not self._told:
                self._writable()  # what waited for room is offered again, and dropped
