"""A VMBus host on a SynIC: carries messages in, actions out, and devices along.

The guest's messages come by way of `inbox`, ours leave through `outbox`; both are
bounded. `server` says what they mean, and what is to be done about it: `actions`,
which are carried out here, in order. `channel_devices` has the devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from hvkvm.abi import vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.abi.hv_synic import hv_post_message_input
from hvkvm.errors import Stopped
from hvkvm.events import NULL_OBSERVER, Observer
from hvkvm.runtime.guard import fault_text, is_callers
from hvkvm.runtime.protocols import CallLater
from hvkvm.vmbus.actions import (
    Action,
    CloseChannel,
    DropMessages,
    ForgetChannel,
    OpenChannel,
    ReleaseGpadl,
    RetargetChannel,
    SendMessage,
    SharePage,
    TlConnect,
)
from hvkvm.vmbus.channel_devices import ChannelDevices
from hvkvm.vmbus.device import Device, StreamDevice
from hvkvm.vmbus.gpadl import Gpadl
from hvkvm.vmbus.inbox import Inbox
from hvkvm.vmbus.offer import Channel
from hvkvm.vmbus.open_channel import OPEN_FAILURES, SynicUser
from hvkvm.vmbus.outbox import Outbox
from hvkvm.vmbus.pages import Ram
from hvkvm.vmbus.saved_host import HostState, load_host, save_host
from hvkvm.vmbus.server import BusState, Server
from hvkvm.vmbus.tap import Both, Tap

TURN_MESSAGES = 4
"""Messages of the guest taken a turn of the I/O loop."""

TURN_PAGES = 2048
"""Pages of GPADLs looked at a turn: the message that completes one and goes beyond is the turn's last. The
longest GPADL has 8190, and takes a millisecond or two."""

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

MESSAGE_CONNECTIONS = (vmbus.VMBUS_MESSAGE_CONNECTION_ID, vmbus.VMBUS_MESSAGE_CONNECTION_ID_4)


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
        self._call_soon = call_soon
        self.inbox = Inbox(partial(self._soon, self._receive))
        self.outbox = Outbox(synic, call_later, self.server.reports, self.inbox.resume)
        self.devices = ChannelDevices(self.server, synic, memory, self._soon, self._perform)
        self._performing = False
        self._resting = False  # on the way to rest, or there: no message of the guest is looked at
        self._held = False  # at rest: nothing is done at all
        self._strangers: list[Channel] = []
        """Channels of a restored guest that have no device here."""
        self._on_connect: Callable[[TlConnect], object] = self.server.refuse_connect
        self._on_leave: list[Callable[[], object]] = []

    def attach(self) -> None:
        """Hear messages on connections 1 and 4. ValueError if somebody does already."""
        for conn_id in MESSAGE_CONNECTIONS:
            if self._synic.connections.add_message(conn_id, self.post):
                raise ValueError(f"message connection {conn_id} is taken")

    def post(self, message: hv_post_message_input) -> int:
        """The guest's HvPostMessage: see `Inbox.post`. A vCPU's thread."""
        status = self.inbox.post(message)
        if status and self.tap is not None:
            self.tap.refused(message.connection_id, bytes(message.payload)[: message.payload_size], status)
        return status

    @property
    def tap(self) -> Tap | None:
        """Who listens to the bus."""
        return self.devices.tap

    def listen(self, tap: Tap) -> None:
        """Tell `tap` what crosses the bus, beside those who listen already. Before the guest runs."""
        before = self.devices.tap
        self.devices.tap = tap if before is None else Both(before, tap)

    # Devices.

    def add(self, device: Device | StreamDevice) -> Channel:
        """Offer a device. ValueError if its GUIDs are offered already."""
        channel = self.server.offer(device.offer)
        self.devices.adopt(channel, device)
        self._perform()
        return channel

    def remove(self, channel: Channel, done: Callable[[], object] = lambda: None) -> None:
        """Rescind a device, and its sub-channels. Idempotent; `done()` when it has closed, now or later.

        What is in its rings is not published any more: `flush` before.
        """
        self.devices.rescind(channel)
        self.devices.when_closed(channel, done)

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
            self.devices.adopt(channel, device)
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

    # The guest's messages, and what is to be done.

    def _soon(self, fn: Callable[..., object], *args: Any) -> None:
        try:
            self._call_soon(fn, *args)
        except Stopped:
            return  # the machine is ending: nobody waits for an answer

    def _receive(self) -> None:
        """Take a turn's share of what is queued, while the guest takes our answers. I/O loop."""
        gpadls = self.server.channels.gpadls
        most = gpadls.checked + TURN_PAGES
        for _ in range(TURN_MESSAGES):
            message = self.inbox.take(crowded=self.outbox.full, held=self._resting)
            if message is None:
                return
            if self.tap is not None:
                self.tap.received(message.payload)
            self.server.receive(message)
            self._perform()
            if message.kind.type in COSTLY_MESSAGES or gpadls.checked > most:
                break
        self._soon(self._receive)

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
        self.outbox.pump()

    def _do(self, action: Action) -> None:
        match action:
            case SendMessage():
                if self.tap is not None:
                    self.tap.sent(*action)
                self.outbox.append(action)
            case DropMessages():
                self.outbox.clear()
                self.devices.shared.close()
                for left in self._on_leave:
                    self.contain(left)
            case SharePage(gpa):
                status = vmbus.STATUS_SUCCESS
                try:
                    self.devices.shared.open(gpa)
                except OPEN_FAILURES as error:
                    self.server.reports.add("INITIATE_CONTACT failed", str(error))
                    status = vmbus.STATUS_INSUFFICIENT_RESOURCES
                self.server.shared(action, status)
            case OpenChannel():
                self.devices.open(action)
            case CloseChannel(channel):
                if self.server.state is BusState.RESETTING:
                    self.devices.close_soon(channel)
                else:
                    self.devices.close(channel)
            case RetargetChannel():
                self.devices.retarget(action)
            case ForgetChannel(channel):
                self.devices.forget(channel)
            case TlConnect():
                if not self.contain(self._on_connect, action):
                    self.server.refuse_connect(action)
            case ReleaseGpadl(channel, gpadl_id):
                self.devices.release_gpadl(channel, gpadl_id)

    def contain(self, fn: Callable[..., object], *args: Any) -> bool:
        """Call what serves more than one channel, as deferred work of vsock; whether it raised nothing.

        What it raises is told, and costs nobody else; what a caller's own code raises ends the run.
        """
        try:
            fn(*args)
        except Exception as error:
            name = getattr(fn, "__qualname__", None) or repr(fn)
            self.server.reports.add("service failed", f"{name}: {fault_text(error)}")
            if is_callers(error):
                self.devices.on_callers_error(error)
            return False
        return True

    # At rest.

    def stop(self, done: Callable[[], object]) -> None:
        """Touch no guest memory and send nothing until `go_on`; `done()` once it is so. vCPUs are paused.

        It is so when no device has work in flight and none is being closed.
        """

        def rested() -> None:
            self._held = True
            done()

        self.devices.close_leaving()
        self._perform()
        self._resting = self.outbox.held = True
        self.devices.rest(rested)

    def go_on(self) -> None:
        """Undo `stop`; idempotent."""
        if not self._resting:
            return
        self._resting = self._held = self.outbox.held = False
        for channel in self._strangers:
            self.remove(channel)
        self._strangers = []
        self._perform()
        self.devices.go_on()
        self.inbox.resume()

    def save(self) -> HostState:
        """Everything but the rings, which are RAM, and the devices, which know best. Stopped.

        Before the devices' states are taken: what came up at rest (a stream that ended, a device that came
        or went) is carried out first, and what the guest is to hear of it is saved. StateError.
        """
        held, self._held = self._held, False
        self._perform()
        self._held = held
        return save_host(self.server, self.inbox, self.outbox, self.devices)

    def load(self, state: HostState, devices: Mapping[int, Any]) -> None:
        """Put it back: stopped, until `go_on`. `devices` has the states of the devices here, by their id().

        Before the guest runs, behind the SynIC and the vCPUs. ValueError, or one of
        OPEN_FAILURES.
        """
        self._resting = self._held = self.outbox.held = True
        self._strangers = load_host(state, self.server, self.inbox, self.outbox, self.devices, devices)

    # Ends.

    def reset(self) -> None:
        """The machine is reset: it is at rest, and the SynIC is reset behind us (S7). I/O loop."""
        self.inbox.clear()
        held, self._held = self._held, False
        self.server.reset()
        self._perform()
        self.devices.close_leaving()
        self._perform()
        self.outbox.clear()
        self._held = held

    def close(self) -> None:
        """Let go of everything. vCPU threads and the I/O loop have ended. Idempotent."""
        for conn_id in MESSAGE_CONNECTIONS:
            self._synic.connections.remove_message(conn_id)
        self.devices.end()
        self.outbox.clear()

    def snapshot(self) -> dict[str, object]:
        """The connection, each channel, and the rings of an open one. Any thread."""
        channels = []
        for channel in list(self.server.channels.all):
            gpadls = self.server.channels.gpadls.of_channel(channel.relid)
            opened = self.devices.opened(channel)
            channels.append(
                {
                    **channel.snapshot(),
                    "gpadls": {f"{gpadl.gpadl_id:#x}": gpadl.pages for gpadl in gpadls},
                    "open": None if opened is None else opened.snapshot(),
                }
            )
        waits = {"from_guest_waiting": len(self.inbox), "to_guest_waiting": len(self.outbox)}
        return {**self.server.snapshot(), **waits, "channels": channels, "ended": dict(self.devices.ended)}
