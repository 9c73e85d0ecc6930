"""One channel of a storage controller: SCSI requests out of its ring, completions into it.

The data of a request lies in guest pages that its packet names; the unit gets views of
them, and nothing is copied here. A turn takes a bounded number of requests, and all
that is done by its end leaves with one signal. No more than MAX_IN_FLIGHT requests are
taken from a ring before some are answered: what comes beyond waits in the ring.

`storvsp.Storvsp` makes these. Owner: the I/O loop. Nothing here raises for guest bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

from hvkvm.abi import scsi
from hvkvm.abi import storvsp as wire
from hvkvm.abi.ring import VM_PKT_COMP, VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED, Packet
from hvkvm.abi.storvsp import Srb
from hvkvm.block.request import Request
from hvkvm.devices.scsi.command import Command, Reply
from hvkvm.devices.scsi.plain import Plain
from hvkvm.devices.synth.storvsp_io import DiskIo
from hvkvm.devices.synth.storvsp_pages import DataPages
from hvkvm.devices.synth.storvsp_plain import take_plain
from hvkvm.runtime.guard import Guard
from hvkvm.tuples import NamedTuple
from hvkvm.vmbus.channel_io import ChannelIo
from hvkvm.vmbus.device import Done
from hvkvm.vmbus.offer import Offer
from hvkvm.vmbus.pages import Ram

MAX_IN_FLIGHT = 1024
"""Requests of one channel that are not answered yet; Linux's ring of 128 KiB holds some 700."""

BUDGET = 64
"""Requests taken a turn."""

SHORT_HEADER = 512
"""Bytes of what stands before a packet's payload: Linux has room for 32 pages in that of a short request."""

BUDGET_BYTES = 1 << 18
"""Bytes of packets copied a turn: the packet that goes beyond is the turn's last."""

BUDGET_VIEWS = 2048
"""Views of guest pages made a turn: likewise. Linux's requests are too short to have so many."""

_SRB_STATUS = {
    scsi.GOOD: wire.SRB_STATUS_SUCCESS,
    scsi.CHECK_CONDITION: wire.SRB_STATUS_ERROR | wire.SRB_STATUS_AUTOSENSE_VALID,
    scsi.BUSY: wire.SRB_STATUS_BUSY,
}


class SavedCompletion(NamedTuple):
    """A completion that the guest's ring had no room for yet."""

    channel: int
    """0 is the primary."""
    trans_id: int
    payload: bytes


class InFlight:
    """Counts requests that use guest memory."""

    def __init__(self) -> None:
        self.count = 0
        self._waiting: list[Done] = []

    def ended(self) -> None:
        """One has ended."""
        self.count -= 1
        if not self.count and self._waiting:
            waiting, self._waiting = self._waiting, []
            for done in waiting:
                done()

    def when_none(self, done: Done) -> None:
        """`done()` once there are none; now if there are none."""
        if self.count:
            self._waiting.append(done)
        else:
            done()


class Controller(Protocol):
    """What a channel needs of `storvsp.Storvsp`."""

    def begin(self, srb: Srb, request: Request) -> bool:
        """Have a disk do it if it is a plain READ or WRITE; False, and nothing was done, if it is not."""
        ...

    def plain(self, target: int, lun: int) -> Plain | None:
        """What the disk there does at once; None if there is none that would."""
        ...

    def execute(self, srb: Srb, command: Command) -> bool:
        """Have the unit do it; False if there is none that would answer."""
        ...

    @property
    def ready(self) -> bool:
        """Whether the handshake is over, so that requests are taken."""
        ...

    def poll(self) -> None:
        """Answer now what need not wait."""
        ...

    def control(self, channel: StorvspChannel, operation: int, payload: bytes, reply: Answer) -> None:
        """Anything but a SCSI request: `reply(packet)` once, now or later."""
        ...

    def closed(self, channel: StorvspChannel) -> None:
        """The guest has closed this channel."""
        ...


Answer = Callable[[bytes], None]


class StorvspChannel:
    """A StreamDevice: the channel `offer.sub_channel_index` of `controller`."""

    def __init__(self, offer: Offer, controller: Controller, memory: Ram) -> None:
        self._offer = offer
        self._controller = controller
        self._io: ChannelIo | None = None
        self._done: deque[tuple[int, bytes]] = deque()
        self._notices: list[int] = []
        self._pages = DataPages(memory)
        self._turn = False  # whether one runs, or is asked for
        self._full = False  # whether the ring has more than may be in flight, and is masked
        self._long = False  # whether the last request named many pages: the next are no plain ones, then
        self.guard = Guard()
        self.in_flight = InFlight()
        self.requests = 0
        """SCSI requests taken so far."""

    @property
    def offer(self) -> Offer:
        """What the guest is offered."""
        return self._offer

    @property
    def index(self) -> int:
        """0 of the primary channel."""
        return self._offer.sub_channel_index

    @property
    def is_open(self) -> bool:
        """Whether the guest has it open."""
        return self._io is not None

    # vmbus.device.StreamDevice

    def opened(self, io: ChannelIo) -> None:
        """The guest has opened it."""
        self._io = io
        self._turn = self._full = False

    def close(self, done: Done) -> None:
        """Answer nothing any more; `done()` when no request has the guest's pages."""
        self._io = None
        self._done.clear()
        self._notices.clear()
        self._pages.clear()
        self._controller.closed(self)
        self.in_flight.when_none(done)

    def rung(self) -> None:
        """Send what is done, take what has come, and send what that brought."""
        io = self._io
        if io is None:
            return
        self._turn = True
        try:
            self._send(io)
            self._receive(io)
            self._controller.poll()
            self._send(io)
        finally:
            self._turn = False
        if self._full and self._room > 0:
            self._wake(io)

    @property
    def _room(self) -> int:
        """How many more requests may be taken."""
        return MAX_IN_FLIGHT - self.in_flight.count - len(self._done)

    def _receive(self, io: ChannelIo) -> None:
        self._full = False
        reader, size, most_views = io.reader, 0, self._pages.made + BUDGET_VIEWS
        reader.mask()
        taken = 0
        if self._controller.ready and not self._long:
            most = min(BUDGET, self._room)
            taken = take_plain(reader, most, self._controller.plain, self._pages, self._done)
            self.requests += taken
        for _ in range(BUDGET - taken):
            if self.in_flight.count + len(self._done) >= MAX_IN_FLIGHT:
                self._full = True
                return  # masked as it is: what is done next brings us back, whether it is answered or not
            packet = reader.get()
            if packet is None:
                if reader.broken or io.rest():
                    return
                continue
            self._take(io, packet)
            header = len(packet.header)
            self._long = header > SHORT_HEADER
            size += header + len(packet.payload)
            if size > BUDGET_BYTES or self._pages.made > most_views:
                break
        io.again()

    # vmbus.device.SavedDevice, in part: the primary's has it all.

    def save_done(self) -> tuple[SavedCompletion, ...]:
        """Completions that wait for room."""
        return tuple(SavedCompletion(self.index, *one) for one in self._done)

    def go_on(self, io: ChannelIo | None, done: list[SavedCompletion]) -> None:
        """Be open as saved, or closed."""
        self._io = io
        if io is not None:
            self._done.extend((one.trans_id, one.payload) for one in done)

    # Out.

    def notify(self, operation: int) -> None:
        """Tell the guest of ENUMERATE_BUS or REMOVE_DEVICE, once for all that wait."""
        if self._io is not None and operation not in self._notices:
            self._notices.append(operation)
            self._wake(self._io)

    @property
    def notices(self) -> tuple[int, ...]:
        """What is still to be told."""
        return tuple(self._notices)

    def _wake(self, io: ChannelIo) -> None:
        if not self._turn:
            self._turn = True
            io.again()

    def _send(self, io: ChannelIo) -> None:
        done = self._done
        while done:
            count = io.send_all(VM_PKT_COMP, done)
            if count == len(done):
                done.clear()
                break
            for _ in range(count):
                done.popleft()
            trans_id, payload = done[0]
            if not io.send(payload, kind=VM_PKT_COMP, trans_id=trans_id):  # asks for room
                return
            done.popleft()
        while self._notices and io.send(wire.notice(self._notices[0])):
            self._notices.pop(0)

    def _answer(self, io: ChannelIo, packet: Packet, payload: bytes) -> None:
        if self._io is io:
            if packet.wants_completion:
                self._done.append((packet.trans_id, payload))
            if packet.wants_completion or self._full:
                self._wake(io)

    # In.

    def _take(self, io: ChannelIo, packet: Packet) -> None:
        payload = packet.payload
        operation = wire.operation_of(payload)
        if operation == wire.EXECUTE_SRB:
            self._execute(io, packet)
        elif operation < 0:
            self._answer(io, packet, wire.answer(wire.STATUS_INVALID_PARAMETER))
        else:
            self.in_flight.count += 1
            self._controller.control(self, operation, payload, partial(self.end, io, packet))

    def completed(self, io: ChannelIo, packet: Packet, payload: bytes) -> None:
        """As `end`, for what runs no code that may fail."""
        if self._io is io:
            wants = packet.flags & VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED
            if wants:
                self._done.append((packet.trans_id, payload))
            if (wants or self._full) and not self._turn:
                self._wake(io)
        self.in_flight.ended()

    def end(self, io: ChannelIo, packet: Packet, answer: bytes) -> None:
        """One that was counted has ended; also when an error of ours has ended the device meanwhile."""
        self.guard.run(self._answer, io, packet, answer)
        self.in_flight.ended()

    def _execute(self, io: ChannelIo, packet: Packet) -> None:
        payload = packet.payload
        self.requests += 1
        if not self._controller.ready:
            self._answer(io, packet, wire.answer(wire.STATUS_INVALID_DEVICE_STATE))
            return
        srb = wire.parse_srb(payload)
        buffers = None if srb is None else self._pages.of(srb, packet)
        if srb is None or buffers is None:
            self._answer(io, packet, wire.completion(payload, wire.SRB_STATUS_INVALID_REQUEST, 0, 0))
            return
        self.in_flight.count += 1
        if buffers and self._controller.begin(srb, DiskIo(self, io, packet, buffers, srb.length)):
            return
        command = Command(srb.cdb, buffers, partial(self.finish, io, packet))
        if not self._controller.execute(srb, command):
            self.end(io, packet, wire.completion(payload, wire.SRB_STATUS_INVALID_LUN, 0, 0))

    def finish(self, io: ChannelIo, packet: Packet, reply: Reply) -> None:
        """A command that was counted has ended."""
        status, sense, moved = reply
        srb_status = _SRB_STATUS.get(status, wire.SRB_STATUS_ERROR)
        sense = sense[: wire.SENSE_BYTES]
        self.end(io, packet, wire.completion(packet.payload, srb_status, status, moved, sense))
