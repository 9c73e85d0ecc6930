"""An open channel tied to the SynIC: rings, the guest's doorbell, and the interrupt back.

Owner: `host.VmbusHost`, on the I/O loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from hvkvm.abi.vmbus import VMBUS_EVENT_CONNECTION_ID, VP_INVALID
from hvkvm.errors import GuestMemoryError, RouteError, Stopped
from hvkvm.vmbus.actions import OpenChannel
from hvkvm.vmbus.channel_io import ChannelIo
from hvkvm.vmbus.device import Device, Done, StreamDevice
from hvkvm.vmbus.interrupt_page import InterruptPage
from hvkvm.vmbus.pages import Ram
from hvkvm.vmbus.ring_reader import RingReader
from hvkvm.vmbus.ring_writer import RingWriter
from hvkvm.vmbus.tap import TO_GUEST, TO_HOST, Tap, TappedReader, TappedWriter


class Route(Protocol):
    """What is needed of `hyperv.sint_route.SintRoute`."""

    def post(self, message_type: int, payload: bytes) -> int: ...

    def retry(self) -> None: ...

    def set_event_flag(self, number: int) -> int: ...

    def close(self) -> None: ...


class EventTable(Protocol):
    """What is needed of `hyperv.connections.Connections`."""

    def add_message(self, conn_id: int, handler: Callable[[Any], int]) -> int: ...

    def remove_message(self, conn_id: int) -> int: ...

    def add_event(self, conn_id: int, callback: Callable[[], object]) -> int: ...

    def remove_event(self, conn_id: int) -> int: ...


class SynicUser(Protocol):
    """What is needed of `hyperv.partition.Partition`."""

    @property
    def connections(self) -> EventTable: ...

    def open_route(
        self, vp_index: int, sint: int, on_complete: Callable[[int], None] | None = None
    ) -> Route: ...


class OpenedChannel:
    """One open channel. `OPEN_FAILURES` when it cannot be had.

    `on_fault(error)` hears what the device's code raises: whoever made this then halts and closes it.
    """

    def __init__(
        self,
        synic: SynicUser,
        memory: Ram,
        request: OpenChannel,
        sint: int,
        device: Device | StreamDevice,
        on_broken: Callable[[str], object],
        call_soon: Callable[..., object],
        on_fault: Callable[[Exception], object],
        tap: Tap | None = None,
        page: InterruptPage | None = None,
    ) -> None:
        self._channel = request.channel
        self._tap = tap if tap is not None and tap.wants_rings else None
        self._synic = synic
        self._sint = sint
        self._device = device
        self._serve = device.rung if isinstance(device, StreamDevice) else partial(self._drain, device)
        self._call_soon = call_soon
        self._on_fault = on_fault
        self._flag = request.event_flag
        self._connection_id = request.connection_id
        self._page = page
        self._own_doorbell = request.connection_id != VMBUS_EVENT_CONNECTION_ID
        self._route: Route | None = None
        self._started = False
        self._closed = False
        self._asked = False  # a turn is pending: one a channel, whoever asks how often
        split = request.split
        reader, writer = self._rings(memory, request.pages[:split], request.pages[split:])
        self.io = ChannelIo(reader, writer, self._interrupt, on_broken, self._again)
        if self._tap is not None:
            self.io.pointed = partial(self._tap.pointed, request.channel)
        self.retarget(request.target_vp)
        try:
            rung = self._doorbell if self._tap is None else self._tapped_doorbell
            status = synic.connections.add_event(self._connection_id, rung) if self._own_doorbell else 0
            if status:
                raise OSError(-status, f"doorbell {self._connection_id:#x}")
        except BaseException:
            self._drop_route()
            raise

    def _rings(
        self, memory: Ram, from_guest: Sequence[int], to_guest: Sequence[int]
    ) -> tuple[RingReader, RingWriter]:
        tap = self._tap
        if tap is None:
            return RingReader(memory, from_guest), RingWriter(memory, to_guest)
        return (
            TappedReader(memory, from_guest, partial(tap.ring, self._channel, TO_HOST)),
            TappedWriter(memory, to_guest, partial(tap.ring, self._channel, TO_GUEST)),
        )

    def start(self) -> None:
        """Let the device begin, and look into the ring: what rang before was not heeded."""
        self._started = True
        try:
            self._device.opened(self.io)
        except Exception as error:
            self._on_fault(error)
            return
        self._doorbell()

    @property
    def started(self) -> bool:
        """Whether the device has been told of the open channel."""
        return self._started

    def resume(self) -> None:
        """The machine goes on, here or from a file: look into the ring, whatever rang meanwhile."""
        self.io.release()
        self._doorbell()

    def restart(self, load: Callable[[ChannelIo], object]) -> None:
        """Begin where a saved device was: `load(io)` gives it its state. Held until `resume`."""
        self.io.hold()
        self._started = True
        load(self.io)

    def halt(self) -> None:
        """The device failed: it is called no more, but for `close`, and its rings are left alone."""
        self._started = False
        self.io.abandon()

    def retarget(self, vp_index: int) -> None:
        """Interrupt another VP. RouteError when that cannot be, and then the old one stays."""
        route = None if vp_index == VP_INVALID else self._synic.open_route(vp_index, self._sint)
        self._drop_route()
        self._route = route

    def _drop_route(self) -> None:
        route, self._route = self._route, None
        if route is not None:
            route.close()

    def _interrupt(self) -> None:
        if self._tap is not None:
            self._tap.signal(self._channel, TO_GUEST)
        if self._page is not None:
            self._page.mark(self._channel.relid)
        if self._route is not None:
            # A guest that switched its event page off hears nothing: its own choice.
            self._route.set_event_flag(self._flag)

    def _again(self) -> None:
        if not self._asked:
            self._asked = True
            self._call_soon(self._go_on)

    def _go_on(self) -> None:
        self._asked = False
        self._doorbell()

    def ring(self) -> None:
        """The guest has set this channel's bit in the interrupt page: look into the ring soon.

        A turn for each channel, since one doorbell may mean all of them.
        """
        if self._tap is not None:
            self._tap.signal(self._channel, TO_HOST)
        self._again()

    def _tapped_doorbell(self) -> None:
        if self._tap is not None:
            self._tap.signal(self._channel, TO_HOST)
        self._doorbell()

    def _doorbell(self) -> None:
        # A guest rings as soon as it has the result, which may be before `start` has its turn on the loop.
        # While a turn is pending a doorbell brings nothing new, and must not be a second turn a round.
        if self._asked or self._closed or not self._started or self.io.held:
            return
        try:
            with self.io:
                self._serve()
        except Exception as error:
            self._on_fault(error)

    def _drain(self, device: Device) -> None:
        self.io.drain(device.received)
        if not self._closed:
            device.ready()

    def snapshot(self) -> dict[str, object]:
        """How it interrupts, and both rings as they are now. Any thread."""
        io, route = self.io, self._route
        return {
            "interrupt_vp": getattr(route, "vp_index", None),
            "interrupt_sint": self._sint,
            "event_flag": self._flag,
            "doorbell": self._connection_id,
            "signals": io.signals,
            "from_guest": {"packets": io.reader.packets, **io.reader.snapshot()},
            "to_guest": {"packets": io.writer.packets, **io.writer.snapshot()},
        }

    def close(self, done: Done) -> None:
        """Stop; when this returns nothing touches the rings. Once.

        `done()` once, here or later, when the device touches no other memory of the guest.
        """
        self._closed = True
        self.io.abandon()
        if self._own_doorbell:
            self._synic.connections.remove_event(self._connection_id)
        try:
            self._device.close(done)
        except Exception as error:
            self._on_fault(error)
            done()  # called no more, it can hardly touch what it did not let go of
        finally:
            self._drop_route()


OPEN_FAILURES = (RouteError, GuestMemoryError, OSError, Stopped)
"""What making an `OpenedChannel` may raise."""
