"""A VMBus host on a SynIC: carries messages in, actions out, and devices along.

`post` takes the guest's messages on vCPU threads and only queues them; all else
runs on the I/O loop. Both queues are bounded: while the guest does not take what
we send, what it sends is left waiting, and then refused (S50). A new
INITIATE_CONTACT always gets through, since it makes all older messages moot.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from hvkvm.abi import vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.abi.hv_synic import (
    HV_MESSAGE_PAYLOAD_BYTE_COUNT,
    HV_SYNIC_SINT_COUNT,
    HVMSG_VMBUS,
    hv_post_message_input,
)
from hvkvm.abi.tlfs import HvStatus
from hvkvm.errors import Stopped
from hvkvm.events import NULL_OBSERVER, Observer
from hvkvm.vmbus.actions import (
    Action,
    CloseChannel,
    DropMessages,
    OpenChannel,
    ReleaseGpadl,
    RetargetChannel,
    SendMessage,
    TlConnect,
)
from hvkvm.vmbus.device import Device, GpadlUser, SavedDevice, StreamDevice
from hvkvm.vmbus.gpadl import Gpadl
from hvkvm.vmbus.guard import Guarded, fault_text
from hvkvm.vmbus.offer import Channel
from hvkvm.vmbus.open_channel import OPEN_FAILURES, OpenedChannel, SynicUser
from hvkvm.vmbus.outbox import CallLater, Outbox
from hvkvm.vmbus.pages import Ram
from hvkvm.vmbus.saved import ServerState, load_server, save_server
from hvkvm.vmbus.server import BusState, Server

MAX_INBOX = 256
"""Messages of the guest that may wait; Linux has a handful under way."""

TURN_MESSAGES = 4
"""Messages of the guest taken a turn of the I/O loop: the last of a GPADL takes a millisecond or two."""

COSTLY_MESSAGES = frozenset(
    (
        wire.INITIATE_CONTACT,
        wire.UNLOAD,
        wire.REQUESTOFFERS,
        wire.OPENCHANNEL,
        wire.CLOSECHANNEL,
        wire.MODIFYCHANNEL,
        wire.TL_CONNECT_REQUEST,
    )
)
"""These end a turn: they open or close files, devices and KVM's objects, or go through all channels."""

TURN_CLOSES = 4
"""Channels closed a turn when a connection ends with many: KVM may take milliseconds to let go of each."""

MAX_ENDED = 16
"""Devices that ended by their own fault, of which the reason is kept."""

MESSAGE_CONNECTIONS = (vmbus.VMBUS_MESSAGE_CONNECTION_ID, vmbus.VMBUS_MESSAGE_CONNECTION_ID_4)

_SUCCESS = int(HvStatus.SUCCESS)
_MALFORMED = int(HvStatus.INVALID_HYPERCALL_INPUT)
_FULL = int(HvStatus.INSUFFICIENT_BUFFERS)


class SavedMessage(NamedTuple):
    """A message that the guest has not taken."""

    vp_index: int
    sint: int
    payload: bytes


class HostState(NamedTuple):
    """The connection, the messages that wait both ways, and whose devices know of their open channels."""

    server: ServerState
    inbox: tuple[bytes, ...]
    outbox: tuple[SavedMessage, ...]
    started: tuple[int, ...]
    """Relids."""


class VmbusHost:
    """The bus of one machine.

    `call_soon(fn, *args)` and `call_later(seconds, fn, *args)` defer to the I/O loop; Stopped after its end.
    Build and `attach` on the main thread before vCPUs run; afterwards `add`,
    `remove` and `reset` on the I/O loop.
    """

    def __init__(
        self,
        synic: SynicUser,
        memory: Ram,
        vp_count: int,
        call_soon: Callable[..., object],
        call_later: CallLater,
        *,
        max_version: int = vmbus.HOST_VERSIONS[-1],
        observer: Observer = NULL_OBSERVER,
        trace: Callable[[bool, wire.Message], None] | None = None,
    ) -> None:
        self.server = Server(
            memory.contains, vp_count, max_version=max_version, observer=observer, trace=trace
        )
        self._synic = synic
        self._memory = memory
        self._call_soon = call_soon
        self._call_later = call_later
        self._devices: dict[Channel, Device | StreamDevice] = {}
        self._open: dict[Channel, OpenedChannel] = {}
        self._ended: dict[str, str] = {}
        self._lock = threading.Lock()  # inbox and _scheduled
        self._inbox: deque[wire.Message] = deque()
        self._scheduled = False
        self._outbox = Outbox(synic, self._soon, call_later, self.server.reports, self._resume)
        self._leaving: deque[Channel] = deque()
        self._performing = False
        self._held = False
        self._strangers: list[Channel] = []
        """Channels of a restored guest that have no device here."""
        self._on_connect: Callable[[TlConnect], object] = self.server.refuse_connect
        self._on_leave: list[Callable[[], object]] = []

    def attach(self) -> None:
        """Hear messages on connections 1 and 4. ValueError if somebody does already."""
        for conn_id in MESSAGE_CONNECTIONS:
            if self._synic.connections.add_message(conn_id, self.post):
                raise ValueError(f"message connection {conn_id} is taken")

    def add(self, device: Device | StreamDevice) -> Channel:
        """Offer a device. ValueError if its GUIDs are offered already."""
        channel = self.server.offer(device.offer)
        # One that a guest broke, and that would have come back, gives way to it.
        for gone in [c for c in self._devices if c.withdrawn and not c.broken and not c.in_use]:
            del self._devices[gone]
        self._adopt(channel, device)
        self._perform()
        return channel

    def _adopt(self, channel: Channel, device: Device | StreamDevice) -> None:
        self._devices[channel] = device
        if isinstance(device, Guarded):
            device.guard.attach(partial(self._device_failed, channel))

    def remove(self, channel: Channel) -> None:
        """Rescind a device. Idempotent. What is in its rings is not published any more: `flush` before."""
        self.server.rescind(channel)
        if not channel.in_use:  # else it goes when it is closed
            self._devices.pop(channel, None)
        self._perform()

    def gpadl(self, channel: Channel, gpadl_id: int) -> Gpadl | None:
        """A GPADL of this channel that the guest named; None if there is none."""
        return self.server.channels.gpadls.get(channel.relid, gpadl_id)

    def serve_connects(self, on_connect: Callable[[TlConnect], object]) -> None:
        """Give the guest's hvsock connects to `on_connect`, for `accept_connect` or `refuse_connect` later.

        Before a guest runs. At most `server.MAX_TL_CONNECTS` wait at a time.
        """
        self._on_connect = on_connect
        self.server.accepts_sockets = True

    def accept_connect(self, request: TlConnect, device: Device | StreamDevice) -> Channel | None:
        """Offer the device that carries it; None if its guest has gone. ValueError if offered already."""
        channel = self.server.accept_connect(request, device.offer)
        if channel is not None:
            self._adopt(channel, device)
            self._perform()
        return channel

    def refuse_connect(self, request: TlConnect) -> None:
        """Nobody takes it."""
        self.server.refuse_connect(request)
        self._perform()

    def on_leave(self, callback: Callable[[], object]) -> None:
        """Call `callback()` whenever a connection ends: the guest contacts anew, unloads, or is reset.

        Open channels are closed right after it. For offers that concern one guest only.
        """
        self._on_leave.append(callback)

    # The guest's messages.

    def post(self, message: hv_post_message_input) -> int:
        """HvPostMessage: 3 malformed, 19 too many wait, else 0 and the rest later (S50). A vCPU's thread."""
        if message.message_type != HVMSG_VMBUS:
            return _MALFORMED
        parsed = wire.parse(bytes(message.payload)[: message.payload_size])
        if parsed is None:
            return _MALFORMED
        kind = parsed.kind.type
        with self._lock:
            # What is before a contact belongs to a connection that ends with it; an UNLOAD that finds
            # the queue full may come from a crashing kernel, which has little patience.
            if kind == wire.INITIATE_CONTACT:
                self._inbox.clear()
            elif len(self._inbox) >= MAX_INBOX:
                if kind != wire.UNLOAD:
                    return _FULL
                self._inbox.clear()
            self._inbox.append(parsed)
            if self._scheduled:
                return _SUCCESS
            self._scheduled = True
        self._schedule()
        return _SUCCESS

    def _schedule(self) -> None:
        try:
            self._call_soon(self._receive)
        except Stopped:
            return  # the machine is ending: nobody waits for an answer

    def _receive(self) -> None:
        """Take a turn's share of what is queued, while the guest takes our answers. I/O loop."""
        for _ in range(TURN_MESSAGES):
            with self._lock:
                full = self._outbox.full and (
                    not self._inbox or self._inbox[0].kind.type != wire.INITIATE_CONTACT
                )
                blocked = full or self._held
                if blocked or not self._inbox:
                    self._scheduled = False
                    return
                message = self._inbox.popleft()
            self.server.receive(message)
            self._perform()
            if message.kind.type in COSTLY_MESSAGES:
                break
        self._schedule()

    # Actions.

    def _perform(self) -> None:
        """Do what the server asks, in order; answers to it may bring more, which go behind."""
        if self._performing or self._held:
            return  # called by a device from inside an action: the loop below takes it up
        self._performing = True
        try:
            while actions := self.server.take():
                for action in actions:
                    self._do(action)
        finally:
            self._performing = False
        self._outbox.pump()

    def _do(self, action: Action) -> None:
        match action:
            case SendMessage():
                self._outbox.append(action)
            case DropMessages():
                self._outbox.clear()
                for left in self._on_leave:
                    self.contain(left)
            case OpenChannel():
                self._open_channel(action)
            case CloseChannel(channel):
                if self.server.state is BusState.RESETTING:
                    self._close_soon(channel)
                else:
                    self._close_channel(channel)
            case RetargetChannel():
                self._retarget(action)
            case TlConnect():
                if not self.contain(self._on_connect, action):
                    self.server.refuse_connect(action)
            case ReleaseGpadl(channel, gpadl_id):
                self._release_gpadl(channel, gpadl_id)

    def contain(self, fn: Callable[..., object], *args: Any) -> bool:
        """Call what serves more than one channel, as deferred work of vsock; whether it raised nothing.

        What it raises is told, and costs nobody else.
        """
        try:
            fn(*args)
        except Exception as error:
            name = getattr(fn, "__qualname__", None) or repr(fn)
            self.server.reports.add("service failed", f"{name}: {fault_text(error)}")
            return False
        return True

    def _release_gpadl(self, channel: Channel, gpadl_id: int) -> None:
        device = self._devices.get(channel)
        if not isinstance(device, GpadlUser):
            return
        try:
            device.release_gpadl(gpadl_id)
        except Exception as error:
            # Called no more, it can hardly touch what it did not let go of.
            self._device_failed(channel, error)

    def _device_failed(self, channel: Channel, error: Exception) -> None:
        """A device's code raised: its channel is rescinded for the rest of the run, and says why."""
        reason = fault_text(error)
        self.server.reports.add("device failed", f"{channel}: {reason}")
        while len(self._ended) >= MAX_ENDED:
            del self._ended[next(iter(self._ended))]
        self._ended[channel.offer.name] = reason
        opened = self._open.get(channel)
        if opened is not None:
            opened.halt()
        # Deferred: it may be told from inside a ring's batch, or an action.
        self._soon(self._end_failed, channel)

    def _end_failed(self, channel: Channel) -> None:
        device = self._devices.get(channel)
        if device is not None and channel not in self._open:
            with suppress(Exception):  # told already; an open one hears it when its channel is closed
                device.closed()
        self.remove(channel)

    def _open_channel(self, request: OpenChannel) -> None:
        channel = request.channel
        try:
            opened = self._opened(request)
        except OPEN_FAILURES as error:
            self.server.reports.add("OPENCHANNEL failed", f"{channel}: {error}")
            self.server.opened(channel, vmbus.STATUS_INSUFFICIENT_RESOURCES)
            return
        self._open[channel] = opened
        self.server.opened(channel)
        # Behind the result's message: a guest's driver expects no interrupt before that.
        self._soon(self._start, channel, opened)

    def _opened(self, request: OpenChannel) -> OpenedChannel:
        channel = request.channel

        def broken(reason: str) -> None:
            # Deferred: it is told from inside the ring's own batch.
            self._soon(self._break, channel, opened, reason)

        opened = OpenedChannel(
            self._synic,
            self._memory,
            request,
            self.server.sint,
            self._devices[channel],
            broken,
            self._soon,
            partial(self._device_failed, channel),
        )
        return opened

    def _start(self, channel: Channel, opened: OpenedChannel) -> None:
        if self._open.get(channel) is opened:
            opened.start()
            self._perform()

    def _break(self, channel: Channel, opened: OpenedChannel, reason: str) -> None:
        if self._open.get(channel) is opened:  # else the guest was quicker to close it
            self.server.broken(channel, reason)
            self._perform()

    def _close_soon(self, channel: Channel) -> None:
        """The connection is over, and its end is answered behind the last of its channels: some a turn."""
        opened = self._open.get(channel)
        if opened is not None:
            opened.io.abandon()  # its pages may be another kernel's by now
        self._leaving.append(channel)
        if len(self._leaving) == 1:
            self._soon(self._close_some)

    def _close_some(self) -> None:
        for _ in range(TURN_CLOSES):
            if self._leaving:
                self._close_channel(self._leaving.popleft())
        if self._leaving:
            self._soon(self._close_some)
        self._perform()

    def _close_channel(self, channel: Channel) -> None:
        opened = self._open.pop(channel, None)
        if opened is not None:
            opened.close()
        if channel.withdrawn and not channel.broken:
            self._devices.pop(channel, None)
        self.server.closed(channel)

    def _retarget(self, request: RetargetChannel) -> None:
        opened = self._open.get(request.channel)
        status = vmbus.STATUS_SUCCESS
        try:
            if opened is not None:
                opened.retarget(request.target_vp)
        except OPEN_FAILURES as error:
            self.server.reports.add("MODIFYCHANNEL failed", f"{request.channel}: {error}")
            status = vmbus.STATUS_INSUFFICIENT_RESOURCES
        self.server.retargeted(request, status)

    def _soon(self, fn: Callable[..., object], *args: Any) -> None:
        try:
            self._call_soon(fn, *args)
        except Stopped:
            return

    # Our messages to the guest.

    def _resume(self) -> None:
        """There may be room for answers: look at what the guest has sent."""
        with self._lock:
            if self._scheduled or not self._inbox:
                return
            self._scheduled = True
        self._schedule()

    # At rest.

    def hold(self) -> None:
        """Touch no guest memory and send nothing until `go_on`. The vCPUs are paused. I/O loop."""
        while self._leaving:
            self._close_channel(self._leaving.popleft())
        self._perform()
        self._held = self._outbox.held = True
        for opened in self._open.values():
            opened.io.hold()

    def go_on(self) -> None:
        """Undo `hold`; idempotent."""
        if not self._held:
            return
        self._held = self._outbox.held = False
        for channel in self._strangers:
            self.remove(channel)
        self._strangers = []
        self._perform()
        for opened in list(self._open.values()):
            opened.resume()
        self._resume()

    def save(self) -> HostState:
        """Everything but the rings, which are RAM, and the devices, which know best. Held."""
        with self._lock:
            inbox = tuple(message.payload for message in self._inbox)
        started = tuple(channel.relid for channel, opened in self._open.items() if opened.started)
        return HostState(
            save_server(self.server), inbox, tuple(SavedMessage(*m) for m in self._outbox), started
        )

    def load(self, state: HostState, devices: Mapping[int, Any]) -> None:
        """Put it back: held, until `go_on`. `devices` has the states of the devices here, by their id().

        Before the guest runs, behind the SynIC and the vCPUs. ValueError, or one of
        OPEN_FAILURES.
        """
        self._held = self._outbox.held = True
        opens, self._strangers = load_server(self.server, state.server)
        strangers = set(self._strangers)
        for request in opens:
            if request.channel not in strangers:
                self._reopen(request, request.channel.relid in state.started, devices)
        for channel, device in self._devices.items():
            if channel not in self._open and isinstance(device, SavedDevice):
                device.load(None, devices[id(device)])
        for payload in state.inbox[:MAX_INBOX]:
            message = wire.parse(payload)
            if message is None:
                raise ValueError("a message of the guest that waits is none")
            self._inbox.append(message)
        for vp_index, sint, payload in state.outbox:
            if not self.server.valid_vp(vp_index) or not 0 <= sint < HV_SYNIC_SINT_COUNT:
                raise ValueError(f"a message waits for SINT {sint} of VP {vp_index}")
            self._outbox.append(SendMessage(vp_index, sint, payload[:HV_MESSAGE_PAYLOAD_BYTE_COUNT]))

    def _reopen(self, request: OpenChannel, started: bool, devices: Mapping[int, Any]) -> None:
        device = self._devices[request.channel]
        opened = self._open[request.channel] = self._opened(request)
        opened.io.hold()
        if started and isinstance(device, SavedDevice):
            opened.restart(lambda io: device.load(io, devices[id(device)]))
        else:
            # Behind `go_on`, which is queued already or runs next.
            self._soon(self._start, request.channel, opened)

    # Ends.

    def reset(self) -> None:
        """The machine is reset: vCPUs are paused, the SynIC is reset behind us (S7). I/O loop."""
        with self._lock:
            self._inbox.clear()
        self.server.reset()
        self._perform()
        while self._leaving:
            self._close_channel(self._leaving.popleft())
        self._perform()
        self._outbox.clear()

    def close(self) -> None:
        """Let go of everything. vCPU threads and the I/O loop have ended. Idempotent."""
        for conn_id in MESSAGE_CONNECTIONS:
            self._synic.connections.remove_message(conn_id)
        for opened in list(self._open.values()):
            opened.close()
        self._open.clear()
        self._outbox.clear()

    def snapshot(self) -> dict[str, object]:
        """The connection, each channel, and the rings of an open one. Any thread."""
        channels = []
        for channel in list(self.server.channels.all):
            gpadls = self.server.channels.gpadls.of_channel(channel.relid)
            opened = self._open.get(channel)
            channels.append(
                {
                    **channel.snapshot(),
                    "gpadls": {f"{gpadl.gpadl_id:#x}": gpadl.pages for gpadl in gpadls},
                    "open": None if opened is None else opened.snapshot(),
                }
            )
        waits = {"from_guest_waiting": len(self._inbox), "to_guest_waiting": len(self._outbox)}
        return {**self.server.snapshot(), **waits, "channels": channels, "ended": dict(self._ended)}
