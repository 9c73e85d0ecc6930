"""From the wire to the guest: frames and RNDIS messages laid into the guest's receive buffer.

A batch of frames goes as one packet of transfer pages, one range and one RNDIS message a frame, so that it
costs the guest one completion; packets of one TCP stream are one frame (`netvsp_coalesce`). A frame that is
longer than a segment (RSC) is one message too: Linux copies a range into a buffer as long as a section, and
the sections that we announce hold 64 KiB. What of a frame goes to the guest `netvsp_laid` decides.

Owner: the I/O loop. Nothing here raises for what a frame holds, or for what a guest does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from hvkvm.abi import nvsp, rndis
from hvkvm.abi.ring import (
    VM_PKT_DATA_USING_XFER_PAGES,
    VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED,
    transfer_ranges,
)
from hvkvm.devices.synth.netvsp_buffer import GuestBuffer, Pieces
from hvkvm.devices.synth.netvsp_coalesce import MAX_PACKET_BYTES, coalesced
from hvkvm.devices.synth.netvsp_laid import Laid, Layer
from hvkvm.devices.synth.netvsp_rndis import Control
from hvkvm.net.port import ETHERNET_BYTES, Frame
from hvkvm.vmbus.channel_io import ChannelIo

MAX_RANGES = 32
"""Most frames of a packet: half of what Linux's NAPI does a turn."""

MAX_CONTROL_WAITING = 32
"""Answers and indications that may wait for room; Linux waits for each before it asks anew."""

BATCH_BYTES = 1 << 19
"""Most bytes of a packet, after the first frame."""

LARGE_SECTION = 65536 + 512
"""A section for RSC: the longest frame with its RNDIS header."""
HEADROOM = 256
"""RNDIS header and marks in front of a frame, with some to spare."""
LARGE_BUFFER = 2 << 20
"""Receive buffers from here on are cut into large sections."""
MIN_SECTIONS = 8

_DATA = nvsp.rndis_pkt.pack(nvsp.NVSP_MSG1_TYPE_SEND_RNDIS_PKT, nvsp.RMC_DATA, nvsp.NETVSC_INVALID_INDEX, 0)
_CONTROL = nvsp.rndis_pkt.pack(
    nvsp.NVSP_MSG1_TYPE_SEND_RNDIS_PKT, nvsp.RMC_CONTROL, nvsp.NETVSC_INVALID_INDEX, 0
)


def _is_indication(message: bytes) -> bool:
    return int.from_bytes(message[:4], "little") == rndis.RNDIS_MSG_INDICATE


class ReceiveCounters:
    """Frames that the guest got, and those that it did not get, by reason."""

    __slots__ = ("bytes", "filtered", "frames", "large", "malformed", "no_room", "too_long", "unready")

    def __init__(self) -> None:
        self.frames = self.bytes = 0
        self.large = 0
        """Of those, longer than a segment."""
        self.filtered = self.too_long = self.malformed = self.unready = 0
        self.no_room = 0
        """Times that the wire had to wait for the guest."""


def section_bytes(buffer: int, mtu: int) -> int:
    """How long a section of a receive buffer is, for frames of this MTU."""
    if buffer >= LARGE_BUFFER:
        return LARGE_SECTION
    return (mtu + ETHERNET_BYTES + 4 + HEADROOM + 7) & ~7


class Receive(Layer):
    """The receive buffer of a NIC, once its guest has lent one. `broken(reason)` ends the guest's channel."""

    def __init__(self, control: Control, broken: Callable[[str], object]) -> None:
        super().__init__(control)
        self.counters = ReceiveCounters()
        self.buffer: GuestBuffer | None = None
        self.set_id = 0
        self.sections = 0
        self.pieces = Pieces(0, 0)
        self.ranges = MAX_RANGES
        """Most frames of a packet for this guest."""
        self.waiting: deque[bytes] = deque()
        """Messages for the guest that wait for room."""
        self._lacks = 0  # bytes that found no free stretch when something was last to be sent
        self._indication = 0  # the id of the last indication's piece
        self._most = 0  # bytes of a packet, after its first frame
        self._broken = broken

    def lend(self, buffer: GuestBuffer, set_id: int, mtu: int) -> bool:
        """Take a buffer into use; False if it is too small for frames of this MTU."""
        section = section_bytes(buffer.size, mtu)
        if section * MIN_SECTIONS > buffer.size:
            return False
        self.forget()
        self._lacks = 0
        self.buffer, self.set_id = buffer, set_id
        self.section, self.sections = section, buffer.size // section
        self._most = min(BATCH_BYTES, buffer.size // 8)
        # Ids go on: what the guest completes late must not be taken for what was sent anew.
        self.pieces = Pieces(buffer.size, self.sections, self.pieces.next_id)
        return True

    def drop(self) -> None:
        """The buffer is the guest's alone again; what waited is lost with it."""
        self.buffer = None
        self._lacks = 0
        self.waiting.clear()
        self.pieces = Pieces(0, 0, self.pieces.next_id)

    # RNDIS messages.

    def tell(self, message: bytes) -> None:
        """Queue a message for the guest."""
        if len(self.waiting) >= MAX_CONTROL_WAITING:
            self._broken(f"{len(self.waiting)} RNDIS answers wait, and the guest takes none")
            return
        self.waiting.append(message)

    @property
    def indicating(self) -> bool:
        """Whether an indication is on its way: the guest has not given it back, or has yet to get it."""
        return self.pieces.is_out(self._indication) or any(map(_is_indication, self.waiting))

    def pump(self, io: ChannelIo) -> None:
        """Send what waits while there is room."""
        while self.waiting:
            message, ident = self.waiting[0], self.pieces.next_id
            if not self._send(io, _CONTROL, (Laid(message, (), len(message)),)):
                return
            self.waiting.popleft()
            if _is_indication(message):
                self._indication = ident

    # Frames.

    @property
    def starved(self) -> bool:
        """Whether what was to be sent last has no piece, also now: the guest has to give some back first."""
        return self._lacks > 0 and self.pieces.room(self._lacks)[1] < self._lacks

    def deliver(self, frames: Sequence[Frame], channel_for: Callable[[Laid], ChannelIo | None]) -> int:
        """Take frames for the guest; how many were taken: sent, or dropped for a reason of the counters."""
        control = self.control
        if self.buffer is None or not control.packet_filter:
            self.counters.unready += len(frames)
            return len(frames)
        if len(frames) > 1 and (control.rsc4 or control.rsc6):
            most = min(self.section - HEADROOM, MAX_PACKET_BYTES + ETHERNET_BYTES)
            joined, counts = coalesced(
                frames, four=control.rsc4, six=control.rsc6, most=most, longest=self.max_frame
            )
            if len(joined) < len(frames):
                return sum(counts[: self._deliver(joined, channel_for)])
        return self._deliver(frames, channel_for)

    def _deliver(self, frames: Sequence[Frame], channel_for: Callable[[Laid], ChannelIo | None]) -> int:
        batch: list[Laid] = []
        dropped: list[tuple[int, str]] = []
        first = size = 0  # of the batch
        on: ChannelIo | None = None
        taken = len(frames)
        for index, frame in enumerate(frames):
            laid = self.laid(frame)
            if isinstance(laid, str):
                dropped.append((index, laid))
                continue
            io = channel_for(laid)
            if io is None:
                dropped.append((index, "unready"))
                continue
            if batch and (io is not on or len(batch) >= self.ranges or size + laid.size > self._most):
                if on is None or not self._send(on, _DATA, batch):
                    taken = first
                    break
                batch, size = [], 0
            if not batch:
                first, on = index, io
            batch.append(laid)
            size += laid.size
        else:
            if batch and on is not None and not self._send(on, _DATA, batch):
                taken = first
        for index, reason in dropped:
            if index < taken:  # else it comes again
                setattr(self.counters, reason, getattr(self.counters, reason) + 1)
        if taken < len(frames):
            self.counters.no_room += 1
        return taken

    def _send(self, io: ChannelIo, message: bytes, batch: Sequence[Laid]) -> bool:
        """Lay a batch into the buffer and send the packet that says where: False if there is no room."""
        buffer, pieces = self.buffer, self.pieces
        if buffer is None:
            return False
        one = len(batch) == 1
        need = (batch[0][2] + 7) & ~7 if one else sum([(laid[2] + 7) & ~7 for laid in batch])
        start, room = pieces.room(need)
        if room < need:
            self._lacks = need
            return False
        self._lacks = 0
        at = start
        payload = large = 0
        ranges: list[int] = []
        for head, views, size in batch:
            ranges += size, at
            buffer.write_all(at, (head, *views))
            at += (size + 7) & ~7
            payload += size - len(head)
            large += size - len(head) > self.max_frame
        header = transfer_ranges(self.set_id, ranges)
        ident = pieces.lend(start, need)
        if not one and not io.fits(len(message), len(header)):  # rings without room for one were refused
            self._broken("a ring that holds no packet for the guest")
            return False
        sent = io.send(
            message,
            kind=VM_PKT_DATA_USING_XFER_PAGES,
            trans_id=ident,
            flags=VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED,
            header=header,
        )
        if not sent:
            pieces.take_back_last()
            return False
        if io.pointed is not None:
            for head, _views, _size in batch:
                io.pointed(False, head)
        if message is _DATA:
            counters = self.counters
            counters.frames += len(batch)
            counters.bytes += payload
            counters.large += large
        return True
