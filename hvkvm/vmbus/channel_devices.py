"""The devices behind a bus's channels, and the channels that are open: begun, moved, closed, failed.

Whatever the code of a device of ours raises ends that device alone (`guard`), that of a caller's
the run. A device may take
its time to close; `server` hears of it when it is done.

Owner: `host.VmbusHost`, on the I/O loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from hvkvm.abi import vmbus
from hvkvm.runtime.guard import Guarded, fault_text, is_callers, is_callers_module
from hvkvm.vmbus.actions import OpenChannel, RetargetChannel
from hvkvm.vmbus.device import BusyDevice, Device, GpadlUser, MultiChannel, SavedDevice, StreamDevice
from hvkvm.vmbus.offer import Channel
from hvkvm.vmbus.open_channel import OPEN_FAILURES, OpenedChannel, SynicUser
from hvkvm.vmbus.pages import Ram
from hvkvm.vmbus.pending import Pending
from hvkvm.vmbus.server import Server
from hvkvm.vmbus.shared_doorbell import SharedDoorbell
from hvkvm.vmbus.sub_channels import BoundSubChannels
from hvkvm.vmbus.tap import Tap

TURN_CLOSES = 4
"""Channels closed a turn when a connection ends with many: KVM may take milliseconds to let go of each."""

MAX_ENDED = 16
"""Devices that ended by their own fault, of which the reason is kept."""


class ChannelDevices:
    """`soon(fn, *args)` defers to the I/O loop; `perform()` has the server's actions carried out."""

    def __init__(
        self,
        server: Server,
        synic: SynicUser,
        memory: Ram,
        soon: Callable[..., None],
        perform: Callable[[], None],
    ) -> None:
        self._server = server
        self._synic = synic
        self._memory = memory
        self._soon = soon
        self._perform = perform
        self._devices: dict[Channel, Device | StreamDevice] = {}
        self._open: dict[Channel, OpenedChannel] = {}
        self._leaving: deque[Channel] = deque()
        self.shared = SharedDoorbell(synic, memory, self._rang)
        """Of versions before 2.4."""
        self._pending = Pending()
        self._closed: dict[Channel, list[Callable[[], object]]] = {}
        self.tap: Tap | None = None
        """Who listens to channels that open from now on."""
        self.on_callers_error: Callable[[Exception], object] = lambda _error: None
        """Hears what a caller's own code raised: in a device of the caller's, or called by one of ours."""
        self.ended: dict[str, str] = {}
        """Devices that ended by their own fault, by name: why."""

    # Who is there.

    def adopt(self, channel: Channel, device: Device | StreamDevice) -> None:
        """`device` is behind `channel` from now on."""
        self._devices[channel] = device
        if isinstance(device, Guarded):
            device.guard.attach(partial(self.fail, channel))
        if isinstance(device, MultiChannel) and not channel.offer.sub_channel_index:
            device.bind(BoundSubChannels(channel, device, self, self._server, self._perform))

    def forget(self, channel: Channel) -> None:
        """The channel is gone. Idempotent."""
        if channel not in self._open:
            self._devices.pop(channel, None)

    def of(self, channel: Channel) -> Device | StreamDevice | None:
        """The device behind a channel."""
        return self._devices.get(channel)

    def __iter__(self) -> Iterator[tuple[Channel, Device | StreamDevice]]:
        return iter(list(self._devices.items()))

    def opened(self, channel: Channel) -> OpenedChannel | None:
        """The channel as it is open; None if it is not."""
        return self._open.get(channel)

    def when_closed(self, channel: Channel, done: Callable[[], object]) -> None:
        """`done()` once the device of a channel that was withdrawn uses nothing of the guest's."""
        if channel.in_use:
            self._closed.setdefault(channel, []).append(done)
        else:
            done()

    # Opening.

    def open(self, request: OpenChannel) -> None:
        """Open a channel for the guest, and answer."""
        channel = request.channel
        try:
            opened = self.make(request)
        except OPEN_FAILURES as error:
            self._server.reports.add("OPENCHANNEL failed", f"{channel}: {error}")
            self._note(channel, "failed")
            self._server.opened(channel, vmbus.STATUS_INSUFFICIENT_RESOURCES)
            return
        self._server.opened(channel)
        # Behind the result's message: a guest's driver expects no interrupt before that.
        self.start_soon(channel, opened)

    def make(self, request: OpenChannel) -> OpenedChannel:
        """The open channel, its device not told yet. OPEN_FAILURES."""
        channel = request.channel

        def broken(reason: str) -> None:
            # Deferred: it is told from inside the ring's own batch.
            self._soon(self._break, channel, opened, reason)

        opened = OpenedChannel(
            self._synic,
            self._memory,
            request,
            self._server.sint,
            self._devices[channel],
            broken,
            self._soon,
            partial(self.fail, channel),
            self.tap,
            self.shared.page,
        )
        self._open[channel] = opened
        self._note(channel, "opened")
        return opened

    def _note(self, channel: Channel, what: str) -> None:
        if self.tap is not None:
            self.tap.channel(channel, what)

    def start_soon(self, channel: Channel, opened: OpenedChannel) -> None:
        """Tell the device that its channel is open."""
        self._soon(self._start, channel, opened)

    def _start(self, channel: Channel, opened: OpenedChannel) -> None:
        if self._open.get(channel) is opened:
            opened.start()
            self._perform()

    def _break(self, channel: Channel, opened: OpenedChannel, reason: str) -> None:
        if self._open.get(channel) is opened:  # else the guest was quicker to close it
            self._server.broken(channel, reason)
            self._perform()

    def retarget(self, request: RetargetChannel) -> None:
        """Interrupt another VP, and answer."""
        opened = self._open.get(request.channel)
        status = vmbus.STATUS_SUCCESS
        try:
            if opened is not None:
                opened.retarget(request.target_vp)
        except OPEN_FAILURES as error:
            self._server.reports.add("MODIFYCHANNEL failed", f"{request.channel}: {error}")
            status = vmbus.STATUS_INSUFFICIENT_RESOURCES
        self._server.retargeted(request, status)

    def _rang(self, relid: int) -> None:
        channel = self._server.channels.by_relid.get(relid)
        opened = None if channel is None else self._open.get(channel)
        if opened is not None:
            opened.ring()

    # Letting go.

    def close(self, channel: Channel) -> None:
        """Close it, and answer when its device has stopped."""
        opened = self._open.pop(channel, None)
        if opened is None:
            self._has_closed(channel)
        else:
            opened.close(self._pending.begin(partial(self._has_closed, channel)))

    def _has_closed(self, channel: Channel) -> None:
        self._note(channel, "closed")
        if channel.withdrawn and not channel.broken:
            self._devices.pop(channel, None)
        self._server.closed(channel)
        for done in self._closed.pop(channel, ()):
            done()
        self._perform()

    def close_soon(self, channel: Channel) -> None:
        """The connection is over, and its end is answered behind the last of its channels: some a turn."""
        opened = self._open.get(channel)
        if opened is not None:
            opened.io.lose()
        self._leaving.append(channel)
        if len(self._leaving) == 1:
            self._soon(self._close_some)

    def _close_some(self) -> None:
        for _ in range(TURN_CLOSES):
            if self._leaving:
                self.close(self._leaving.popleft())
        if self._leaving:
            self._soon(self._close_some)
        self._perform()

    def close_leaving(self) -> None:
        """Do all that `close_soon` put off."""
        while self._leaving:
            self.close(self._leaving.popleft())

    def release_gpadl(self, channel: Channel, gpadl_id: int) -> None:
        """Have the device let go of a GPADL, and answer when it has."""
        device, opened = self._devices.get(channel), self._open.get(channel)

        def released() -> None:
            # Once the channel is closed, or open anew, this answers nothing any more.
            if opened is not None and self._open.get(channel) is opened:
                self._server.gpadl_released(channel, gpadl_id)
                self._perform()

        if opened is None or not isinstance(device, GpadlUser):
            self._server.gpadl_released(channel, gpadl_id)
            return
        done = self._pending.begin(released)
        try:
            device.release_gpadl(gpadl_id, done)
        except Exception as error:
            # Called no more, it can hardly touch what it did not let go of.
            self.fail(channel, error)
            done()

    # Faults.

    def fail(self, channel: Channel, error: Exception) -> None:
        """A device's code raised: its channels are rescinded for the rest of the run, and say why."""
        reason = fault_text(error)
        self._server.reports.add("device failed", f"{channel}: {reason}")
        while len(self.ended) >= MAX_ENDED:
            del self.ended[next(iter(self.ended))]
        self.ended[channel.offer.name] = reason
        opened = self._open.get(channel)
        if opened is not None:
            opened.halt()
        # Deferred: it may be told from inside a ring's batch, or an action.
        self._soon(self._end_failed, self._server.channels.primary(channel))
        if is_callers(error) or is_callers_module(type(self._devices.get(channel)).__module__):
            self.on_callers_error(error)

    def _end_failed(self, channel: Channel) -> None:
        device = self._devices.get(channel)
        if device is not None and channel not in self._open:
            with suppress(Exception):  # told already; an open one hears it when its channel is closed
                device.close(lambda: None)
        self.rescind(channel)

    def rescind(self, channel: Channel) -> None:
        """Take a channel back. Idempotent."""
        self._server.rescind(channel)
        if not channel.in_use:  # else it goes when it is closed
            self._devices.pop(channel, None)
        self._perform()

    # At rest.

    def rest(self, done: Callable[[], object]) -> None:
        """Touch no guest memory: `done()` when every device's work in flight has ended."""
        self.shared.held = True
        for opened in self._open.values():
            opened.io.hold()
        for channel, device in self:
            if isinstance(device, BusyDevice):
                rested = self._pending.begin(lambda: None)
                try:
                    device.rest(rested)
                except Exception as error:
                    self.fail(channel, error)
                    rested()
        self._pending.when_none(done)

    def go_on(self) -> None:
        """Undo `rest`."""
        self.shared.held = False
        for opened in list(self._open.values()):
            opened.resume()

    @property
    def started(self) -> tuple[int, ...]:
        """The relids of open channels whose devices know of it."""
        return tuple(channel.relid for channel, opened in self._open.items() if opened.started)

    def reopen(self, request: OpenChannel, started: bool, state: Any) -> None:
        """Open a saved channel with its device's `state`: held. ValueError, OPEN_FAILURES."""
        channel = request.channel
        device, opened = self._devices[channel], self.make(request)
        opened.io.hold()
        if started and isinstance(device, SavedDevice):
            opened.restart(lambda io: device.load(io, state))
        else:
            if isinstance(device, SavedDevice) and state is not None:
                device.load(None, state)
            # Behind the machine's going on, which is queued already or runs next.
            self.start_soon(channel, opened)

    def end(self) -> None:
        """Close all. vCPU threads and the I/O loop have ended."""
        self.shared.close()
        for channel in list(self._open):
            self._open.pop(channel).close(lambda: None)
