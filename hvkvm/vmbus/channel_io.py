"""An open channel as its device sees it: packets in, packets out, few signals.

Why: a wake in Python is dear, so a wake drains the whole ring (up to a turn's
budget, see `runtime.io_loop`) and answers everything with at most one signal to
the guest. A ring that breaks
is told once by `on_broken`, and from then on the channel does nothing.

Owner: the I/O loop. Nothing here raises for guest bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from hvkvm.abi.ring import VM_PKT_COMP, VM_PKT_DATA_INBAND, Packet
from hvkvm.vmbus.ring_reader import RingReader
from hvkvm.vmbus.ring_writer import RingWriter

BUDGET = 64
"""Packets taken a turn; a guest that writes as fast as we read must not keep the loop for itself."""

BUDGET_BYTES = 1 << 16
"""Bytes of packets copied a turn, what stands before a payload included: the packet that goes beyond is the
turn's last."""

LOST = "the guest's connection is over"


class ChannelIo:
    """Both rings of an open channel.

    `signal()` interrupts the guest for this channel, `again()` asks for another
    `drain` soon, because the budget was used up.
    """

    __slots__ = (
        "_again",
        "_batch",
        "_on_broken",
        "_signal",
        "_wanted",
        "_why",
        "held",
        "pointed",
        "reader",
        "signals",
        "writer",
    )

    def __init__(
        self,
        reader: RingReader,
        writer: RingWriter,
        signal: Callable[[], object],
        on_broken: Callable[[str], object],
        again: Callable[[], object],
    ) -> None:
        self.reader = reader
        self.writer = writer
        self._signal = signal
        self._on_broken: Callable[[str], object] | None = on_broken
        self._again = again
        self._batch = 0
        self._wanted = False
        self._why = "", ""
        self.held = False
        """Whether the machine is at rest. Only `hold` and `release` change it."""
        self.pointed: Callable[[bool, bytes], object] | None = None
        """Where a device tells of messages that its packets only point to, with whether the host gets it;
        None while nobody records."""
        self.signals = 0
        """How often the guest was interrupted."""

    @property
    def broken(self) -> str:
        """Why the channel is used no more; empty while all is well."""
        return "" if self.held else self.reader.broken or self.writer.broken

    def hold(self) -> None:
        """Touch guest memory no more until `release`: nothing can be read, and nothing has room."""
        if not self.held:
            self.held = True
            # A ring that broke in this turn has yet to be told of: that waits too.
            self._why = self.reader.broken, self.writer.broken
            self.reader.broken = self.writer.broken = "the machine is at rest"

    def release(self) -> None:
        """Undo `hold`."""
        if self.held:
            self.held = False
            self.reader.broken, self.writer.broken = self._why

    def drain(self, handle: Callable[[Packet], object], budget: int = BUDGET) -> int:
        """Give every packet to `handle`; how many there were. Run it at open and at each doorbell.

        Answers that `handle` sends leave with one signal at the end. `handle`
        may stop the channel by `abandon`.
        """
        reader, count, size = self.reader, 0, 0
        if self._on_broken is None or self.held:
            return 0
        reader.mask()
        with self:
            while True:
                packet = reader.get()
                if packet is None:
                    if reader.broken or self.rest():
                        break
                    continue
                count += 1
                size += len(packet.payload) + len(packet.header)
                handle(packet)
                if self._on_broken is None:
                    break
                if count >= budget or size >= BUDGET_BYTES:
                    # Masked as it is: no doorbell comes, so we come back by ourselves.
                    self._again()
                    break
        return count

    def rest(self) -> bool:
        """All was read: give the room back and ask for doorbells; False if more has come, without one.

        For devices that read by themselves (`device.StreamDevice`), inside a batch.
        """
        if self.held:
            return True
        wanted, more = self.reader.rest()
        if wanted:
            self._wanted = True
        if more:
            self.reader.mask()
        return not more

    def again(self) -> None:
        """Come back soon, though no doorbell rings: for what a budget left undone. Several are one."""
        self._again()

    def send(
        self,
        payload: bytes | memoryview,
        *,
        kind: int = VM_PKT_DATA_INBAND,
        trans_id: int = 0,
        flags: int = 0,
        header: bytes = b"",
    ) -> bool:
        """Send a packet: False if there is no room (try again when the guest rings) or the ring is broken."""
        if self._on_broken is None:
            return False
        if self._batch:
            return self.writer.put(kind, payload, trans_id=trans_id, flags=flags, header=header)
        with self:
            return self.writer.put(kind, payload, trans_id=trans_id, flags=flags, header=header)

    def send_all(self, kind: int, packets: Iterable[tuple[int, bytes]]) -> int:
        """Send short packets, of which each is a transaction id and a payload; how many there was room for.

        Inside a batch only. What had no room waits for `send`, which has the guest tell of room.
        """
        return 0 if self._on_broken is None else self.writer.put_all(kind, packets)

    def fits(self, payload_bytes: int, header_bytes: int = 0) -> bool:
        """Whether such a packet can ever lie in the guest's ring; for `send` that is the caller's duty."""
        return self.writer.fits(payload_bytes, header_bytes)

    def complete(self, packet: Packet, payload: bytes = b"") -> bool:
        """Answer `packet` with a VM_PKT_COMP; as `send`. Nothing to do if its sender wants none."""
        if not packet.wants_completion:
            return True
        return self.send(payload, kind=VM_PKT_COMP, trans_id=packet.trans_id)

    def __enter__(self) -> ChannelIo:
        """Begin a batch: what is sent inside leaves at its end, with one signal."""
        self._batch += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._batch -= 1
        if not self._batch:
            self.flush()

    def flush(self) -> None:
        """Publish both ways now, with the signal that may be due: the end of a batch does it by itself."""
        if self._on_broken is None or self.held:
            return
        reader, writer = self.reader, self.writer
        wanted, self._wanted = self._wanted, False
        if reader.publish():
            wanted = True
        if writer.flush() or wanted:
            self.signals += 1
            self._signal()
        if reader.broken or writer.broken:
            self._check()

    def _check(self) -> None:
        if self.broken and self._on_broken is not None:
            tell, self._on_broken = self._on_broken, None
            tell(self.broken)

    def abandon(self) -> None:
        """Touch the rings no more. Idempotent; also from inside `drain`."""
        self._on_broken = None

    def lose(self) -> None:
        """The guest's pages may be another kernel's by now. Idempotent; also while held.

        `abandon`, and a device that reads or writes a ring by itself, or that looks into it at its end, finds
        it broken.
        """
        self.abandon()
        reader, writer = self._why
        self._why = reader or LOST, writer or LOST
        self.reader.broken = self.reader.broken or LOST
        self.writer.broken = self.writer.broken or LOST
