"""One channel of a NIC: packets out of its ring, completions back, each exactly once.

Frames of a turn go to the wire together. What the wire does not take waits here, a bounded number of
packets; beyond that the ring is left alone until there is room. The guest's completions for received frames
come by the same ring, so that it is read on as long as that. A ring that is left alone while the guest lacks
receive buffer may hold what the guest gives back, behind its data: two guests that send to one another would
then wait for one another for ever. There what waits for a wire that takes nothing for LOSE_SECONDS is lost,
as in a switch, and the ring is read on. A wire that is merely slow loses nothing.

A completion interrupts the guest, and halts and wakes it once more, though nobody there waits for one: Linux
takes a short packet for gone as soon as it is copied. So
completions of few short packets are kept back: they go with the next packet for the guest, with completions
that cannot wait, or after KEEP_SECONDS.

Owner: the I/O loop. Nothing here raises for guest bytes: what breaks the rules ends the channel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from hvkvm.abi import nvsp, rndis
from hvkvm.abi.ring import (
    VM_PKT_CANCEL_REQUEST,
    VM_PKT_COMP,
    VM_PKT_DATA_INBAND,
    VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED,
    Packet,
)
from hvkvm.devices.synth.netvsp_receive import Receive
from hvkvm.devices.synth.netvsp_send import SECTION_BYTES, Send
from hvkvm.net.port import Frame
from hvkvm.runtime.guard import Guard
from hvkvm.runtime.protocols import CallLater, TimerHandle
from hvkvm.tuples import NamedTuple
from hvkvm.vmbus.channel_io import BUDGET_BYTES, ChannelIo
from hvkvm.vmbus.offer import Offer

TURN_PACKETS = 64
"""Packets taken a turn."""

TURN_FRAMES = 128
"""Frames a turn: a packet may have several, and the one that goes beyond is the turn's last."""

TURN_BYTES = 1 << 20
"""Bytes of frames a turn: the packet that goes beyond is the turn's last."""

TURN_PIECES = 1024
"""What `Send.work` counts, a turn: likewise. A frame of Linux's has up to 32."""

REQUEST_PIECES = TURN_PIECES // 2
"""What a message that is no RNDIS counts: a buffer of thousands of pages may be lent by it."""

MAX_WAITING = 512
"""Packets that may wait for the wire."""

LOSE_SECONDS = 0.2
"""So long a wire may take nothing while the guest lacks receive buffer, before what waits for it is lost."""

KEEP_SECONDS = 0.01
"""So long a completion is kept back where nothing else goes to the guest, and up to twice as long."""

MAX_KEPT = 16
"""So many completions are kept back, and no more than for an eighth of the guest's sections."""

_COMPLETE = nvsp.rndis_pkt_complete.pack(nvsp.NVSP_MSG1_TYPE_SEND_RNDIS_PKT_COMPLETE, nvsp.NVSP_STAT_SUCCESS)


class ChannelState(NamedTuple):
    """The completions that the guest is still owed: transaction id and payload."""

    owed: tuple[tuple[int, bytes], ...]


class Nic(Protocol):
    """What is needed of `netvsp.Netvsp`."""

    send: Send
    receive: Receive
    guard: Guard
    later: CallLater | None

    def fail(self, reason: str) -> None: ...

    def control(self, io: ChannelIo, message: bytes) -> None: ...

    def request(self, packet: Packet) -> bytes | None: ...

    def transmit(self, frames: list[Frame], queue: int) -> int: ...

    def after(self, io: ChannelIo) -> None: ...

    def room(self) -> None:
        """What the wire waits for may have come, or have gone."""
        ...


class Waiting:
    """A packet whose frames are not all taken yet."""

    __slots__ = ("frames", "short", "trans_id", "wants")

    def __init__(self, trans_id: int, wants: bool, frames: int, short: bool) -> None:
        self.trans_id = trans_id
        self.wants = wants
        self.frames = frames
        self.short = short


class NvspChannel:
    """Index 0 is the primary one, on which all but data is said. A `vmbus.device.StreamDevice`."""

    State = ChannelState

    def __init__(self, nic: Nic, offer: Offer) -> None:
        self.nic = nic
        self.offer = offer
        self.io: ChannelIo | None = None
        self._frames: list[Frame] = []
        self._waiting: deque[Waiting] = deque()
        self._owed: deque[tuple[int, bytes]] = deque()
        self._blocked = False
        self.kept: list[tuple[int, bytes]] = []
        """Completions that are kept back."""
        self._losing = False  # whether what waits is lost soon
        self._moved = False  # whether the wire has taken something since that was decided
        self._fresh = False  # what is kept is younger than the timer
        self._timer: TimerHandle | None = None
        self.saved: ChannelState | None = None
        """Of a sub-channel of a restored machine: what `load` takes."""

    @property
    def waiting(self) -> int:
        """Packets that wait for the wire."""
        return len(self._waiting)

    def opened(self, io: ChannelIo) -> None:
        """See `vmbus.device`."""
        self.io = io
        if not io.fits(nvsp.indirection_table.size):
            self.fail(f"a ring of {io.writer.size} bytes for a NIC")

    def close(self, done: Callable[[], object]) -> None:
        """See `vmbus.device`. Frames under way are lost, as on a wire."""
        self.clear()
        self.nic.room()
        done()

    def clear(self) -> None:
        """The channel is closed."""
        self.io = None
        self._frames = []
        self._waiting.clear()
        self._owed.clear()
        self._blocked = False
        self.kept = []
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def save(self) -> ChannelState:
        """What is owed; frames that the wire has not taken are lost, and completed all the same."""
        waiting = tuple((one.trans_id, _COMPLETE) for one in self._waiting if one.wants)
        return ChannelState((*self._owed, *self.kept, *waiting))

    def load(self, io: ChannelIo | None, state: ChannelState | None) -> None:
        """Go on. ValueError for what cannot have been owed."""
        state = state or self.saved or ChannelState(())
        good = all(
            0 <= ident < 1 << 64 and len(data) <= nvsp.indirection_table.size for ident, data in state.owed
        )
        if not good or len(state.owed) > 4 * MAX_WAITING:
            raise ValueError("the NIC owes the guest what it cannot")
        self.io = io
        if io is not None:
            self._owed.extend(state.owed)

    def writable(self) -> None:
        """The wire has room again."""
        if self._blocked and self.io is not None:
            self._blocked = False
            self.io.again()

    @property
    def _stuck(self) -> bool:
        """Whether the ring is left alone until the wire has room."""
        return self._blocked and len(self._waiting) >= MAX_WAITING

    def starved(self) -> None:
        """Frames for the guest wait for what it gives back, which may lie in this ring, or come by it."""
        io = self.io
        if self._stuck and not self._owed and not self._losing and io is not None:
            with io:
                if not io.rest():  # else its doorbell rings
                    io.again()

    def fail(self, reason: str) -> None:
        """The guest broke a rule: its channel ends, when the turn does."""
        if self.io is not None:
            self.io.reader.broken = self.io.reader.broken or reason
        if self.offer.sub_channel_index:
            self.nic.fail(reason)  # the NIC is one

    def rung(self) -> None:
        """Take a turn's packets. Inside a batch."""
        io = self.io
        if io is None or io.held:
            return
        if self.kept and self._timer is None:
            self.release(io)
        if (not self._owed or self._settle(io)) and (not self._frames or self._push(io)):
            self._read(io)
        if self.io is io and not io.reader.broken and not io.writer.broken:
            self.nic.after(io)

    def _read(self, io: ChannelIo) -> None:
        reader = io.reader
        reader.mask()
        nic, counters, waiting = self.nic, self.nic.send.counters, self._waiting
        quick = nic.send.quick if io.pointed is None else None
        most, most_work, size = counters.bytes + TURN_BYTES, nic.send.work + TURN_PIECES, 0
        for _ in range(TURN_PACKETS):
            packet = reader.get()
            if packet is None:
                if reader.broken or (self._frames and not self._push(io)):
                    return
                if io.rest():
                    return
                continue
            frame = None
            if packet.type == VM_PKT_COMP:
                nic.receive.pieces.back(packet.trans_id)  # who completes what is not out is not heeded
            elif packet.type != VM_PKT_CANCEL_REQUEST:  # iPXE's, for frames that it leaves: they have gone
                frame = quick(packet) if quick is not None else None
                if frame is not None:
                    wants = bool(packet.flags & VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED)
                    waiting.append(Waiting(packet.trans_id, wants, 1, True))
                    self._frames.append(frame)
                else:
                    self._take(io, packet)
                    if self.io is not io or reader.broken:
                        return
                    if nic.send.work > most_work:
                        break
                if counters.bytes > most or len(self._frames) >= TURN_FRAMES:
                    break
            if frame is None:  # else it is short
                size += len(packet.payload) + len(packet.header)
                if size > BUDGET_BYTES:
                    break
            if len(waiting) >= MAX_WAITING:
                break
        if self._push(io):
            io.again()

    def _take(self, io: ChannelIo, packet: Packet) -> None:
        payload = packet.payload
        if len(payload) < nvsp.message_type.size:
            self.fail(f"an NVSP message of {len(payload)} bytes")
            return
        kind = int.from_bytes(payload[:4], "little")
        if kind != nvsp.NVSP_MSG1_TYPE_SEND_RNDIS_PKT:
            answer = None
            self.nic.send.work += REQUEST_PIECES
            if packet.type == VM_PKT_DATA_INBAND:
                answer = self.nic.request(packet)
            if packet.wants_completion:
                self._complete(io, packet.trans_id, answer or b"")
            return
        if len(payload) < nvsp.RNDIS_PKT_BYTES:
            self.fail(f"an RNDIS packet of {len(payload)} bytes")
            return
        self._rndis(io, packet)

    def _rndis(self, io: ChannelIo, packet: Packet) -> None:
        send = self.nic.send
        found = send.bytes_of(packet)
        if isinstance(found, str):
            self.fail(found)
            return
        blob, rest, total = found
        if io.pointed is not None:
            for message in rndis.beginnings(blob):
                io.pointed(True, message)
        if packet.payload[4] == nvsp.RMC_CONTROL:
            if rest:
                blob = b"".join((blob, *rest))
            self.nic.control(io, blob)
            frames: list[Frame] = []
        else:
            made = send.frames_of(blob, rest, total)
            if isinstance(made, str):
                self.fail(made)
                return
            frames = made
            send.counters.packets += 1
        if frames:
            self._waiting.append(Waiting(packet.trans_id, packet.wants_completion, len(frames), False))
            self._frames += frames
        elif packet.wants_completion:
            self._complete(io, packet.trans_id, _COMPLETE)

    def _push(self, io: ChannelIo) -> bool:
        """Give the wire what waits; whether more may be read."""
        frames = self._frames
        if frames and not self._blocked:
            taken = self.nic.transmit(frames, self.offer.sub_channel_index)
            if taken < len(frames):
                self._blocked = True
                del frames[:taken]
            else:
                self._frames = []
            self.nic.send.counters.frames += taken
            self._moved = self._moved or taken > 0
            waiting = self._waiting
            gone: list[tuple[int, bytes]] = []
            short = True
            while taken:
                first = waiting[0]
                if first.frames > taken:
                    first.frames -= taken
                    break
                taken -= first.frames
                waiting.popleft()
                if first.wants:
                    gone.append((first.trans_id, _COMPLETE))
                    short = short and first.short
            if gone and not (short and self._keep(gone)):
                self._complete_all(io, gone)
        # Of an empty ring the doorbell rings, since what the guest gives back may yet come.
        if self._in_the_way and not io.rest():
            self._lose_soon(io)
        return not self._owed and len(self._waiting) < MAX_WAITING

    @property
    def _in_the_way(self) -> bool:
        return self._stuck and not self._owed and self.nic.receive.starved

    def _lose_soon(self, io: ChannelIo) -> None:
        if self.nic.later is None:
            self._lose(io)
        elif not self._losing:
            self._losing, self._moved = True, False
            self.nic.later(LOSE_SECONDS, self.nic.guard.run, self._lose_now, io)

    def _lose_now(self, io: ChannelIo) -> None:
        """Do so if the wire has taken nothing since; the turn that follows looks again."""
        self._losing = False
        if self.io is io and not io.held:
            if self._in_the_way and not self._moved:
                with io:
                    self._lose(io)
            io.again()

    def _lose(self, io: ChannelIo) -> None:
        """Complete all that waits, as if the wire had taken it."""
        self.nic.send.counters.lost += len(self._frames)
        gone = [(one.trans_id, _COMPLETE) for one in self._waiting if one.wants]
        self._frames = []
        self._waiting.clear()  # the wire tells of room all the same
        self._complete_all(io, gone)

    def _complete(self, io: ChannelIo, trans_id: int, payload: bytes) -> None:
        if self._owed or not self._answer(io, trans_id, payload):
            self._owed.append((trans_id, payload))

    def _keep(self, gone: list[tuple[int, bytes]]) -> bool:
        """Keep these completions back; False where they must not wait."""
        count, buffer, later = len(self.kept) + len(gone), self.nic.send.buffer, self.nic.later
        if later is None or buffer is None or count > MAX_KEPT or count * 8 * SECTION_BYTES > buffer.size:
            return False
        if not self.kept:
            self._fresh = self._timer is not None
            if self._timer is None:
                self._timer = later(KEEP_SECONDS, self.nic.guard.run, self._late)
        self.kept += gone
        return True

    def _late(self) -> None:
        """Have what was kept for long enough sent in a turn; a timer is never cancelled for what has gone."""
        self._timer = None
        if self.kept and self.io is not None:
            if self._fresh and self.nic.later is not None:
                self._fresh = False
                self._timer = self.nic.later(KEEP_SECONDS, self.nic.guard.run, self._late)
            else:
                self.io.again()

    def release(self, io: ChannelIo) -> None:
        """Send the completions that were kept back. Inside a batch."""
        self._complete_all(io, [])

    def _complete_all(self, io: ChannelIo, gone: list[tuple[int, bytes]]) -> None:
        if self.kept:
            gone, self.kept = self.kept + gone, []
        done = io.writer.put_all(VM_PKT_COMP, gone) if len(gone) > 1 and not self._owed else 0
        for trans_id, payload in gone[done:]:
            self._complete(io, trans_id, payload)

    def _answer(self, io: ChannelIo, trans_id: int, payload: bytes) -> bool:
        # Inside a batch, so that the writer itself will do. Rings that are too small were refused.
        return io.writer.put(VM_PKT_COMP, payload, trans_id=trans_id) or bool(io.broken)

    def _settle(self, io: ChannelIo) -> bool:
        """Send the completions that found no room; whether none is left."""
        while self._owed:
            if not self._answer(io, *self._owed[0]):
                return False
            self._owed.popleft()
        return True
