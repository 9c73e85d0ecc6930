"""A VMBus device whose host side is a test: it offers, waits for the guest, answers, and makes faults.

The guest's driver sees a device like any other. The test calls from its own thread;
the work is done on the machine's I/O loop, which owns channels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from hvkvm.abi import vmbus
from hvkvm.abi.ring import (
    VM_PKT_COMP,
    VM_PKT_DATA_INBAND,
    VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED,
    Packet,
)
from hvkvm.testing.faults import Change, Faults, Outgoing, flip_first_bit
from hvkvm.vmbus.channel_io import ChannelIo
from hvkvm.vmbus.host import VmbusHost
from hvkvm.vmbus.offer import Channel, Offer, only_instance

T = TypeVar("T")

MAX_KEPT = 10_000
"""Packets of the guest that wait to be expected; with more the channel is left alone, as by a slow host,
until half of them have been taken."""


class Stage(Protocol):
    """Where a device is offered: `guest.Guest`, or `vmbus_loopback.Loopback` without any machine."""

    @property
    def host(self) -> VmbusHost: ...

    def call(self, fn: Callable[..., T], *args: Any) -> T: ...

    def later(self, seconds: float, fn: Callable[..., object], *args: Any) -> object: ...

    def wait_until(self, happened: Callable[[], T | None], what: str, seconds: float | None = None) -> T: ...


class _Side:
    """The device as the bus has it. The I/O loop."""

    def __init__(self, offer: Offer) -> None:
        self.offer = offer
        self.io: ChannelIo | None = None
        self.opens = 0
        self.stalled = False
        self.full = False
        """Whether it left packets in the ring, and no doorbell need tell of them."""
        self.received_packets: deque[Packet] = deque()
        self._unsent: deque[Outgoing] = deque()

    def opened(self, io: ChannelIo) -> None:
        """See vmbus.device."""
        self.io = io
        self.opens += 1

    def close(self, done: Callable[[], object]) -> None:
        """See vmbus.device."""
        self.io = None
        self._unsent.clear()
        done()

    def rung(self) -> None:
        """See vmbus.device.StreamDevice: the packets, unless the host is stalled."""
        io = self.io
        if io is None:
            return
        while not self.stalled:
            if len(self.received_packets) >= MAX_KEPT:
                self.full = True
                break
            packet = io.reader.get()
            if packet is not None:
                self.received_packets.append(packet)
            elif io.broken or io.rest():
                break
        self._send_waiting()

    def go_on(self) -> None:
        """Take what was left in the ring."""
        self.full = False
        if self.io is not None:
            self.io.again()

    def deliver(self, packet: Outgoing) -> None:
        """Put a packet behind those that wait for room."""
        self._unsent.append(packet)
        self._send_waiting()

    def _send_waiting(self) -> None:
        io = self.io
        while io is not None and self._unsent:
            packet = self._unsent[0]
            sent = io.send(
                packet.payload,
                kind=packet.kind,
                trans_id=packet.trans_id,
                flags=packet.flags,
                header=packet.header,
            )
            if not sent:
                return
            self._unsent.popleft()


class ScriptedDevice:
    """A device of `interface`, a GUID's text or its 16 wire bytes.

    Without `instance` it has the one that a machine's only device of this type has;
    give another beside a real one. `pipe` offers a message pipe. The methods are for
    the test's thread; each raises what `stage.wait_until` raises when time is over.
    """

    def __init__(
        self,
        interface: str | bytes,
        *,
        instance: str | bytes | None = None,
        name: str = "test device",
        pipe: bool = False,
        user_defined: bytes = b"",
        sub_channel_index: int = 0,
    ) -> None:
        kind = _guid(interface)
        flags = vmbus.VMBUS_CHANNEL_ENUMERATE_DEVICE_INTERFACE
        if pipe:
            flags |= vmbus.VMBUS_CHANNEL_NAMED_PIPE_MODE
            user_defined = user_defined or vmbus.VMBUS_PIPE_TYPE_MESSAGE.to_bytes(4, "little")
        self.description = Offer(
            kind,
            only_instance(kind) if instance is None else _guid(instance),
            name,
            flags=flags,
            user_defined=user_defined,
            sub_channel_index=sub_channel_index,
        )
        self._side = _Side(self.description)
        self._stage: Stage | None = None
        self._channel: Channel | None = None
        self.faults: Faults | None = None
        """What goes wrong on the way to the guest, from `offer` on."""

    # Being there.

    def offer(self, stage: Stage) -> None:
        """Offer it to the guest: before it starts, or while it runs (hot add)."""
        self._stage = stage
        self.faults = Faults(self._side.deliver, stage.later)
        self._channel = stage.call(stage.host.add, self._side)

    def rescind(self) -> None:
        """Take it back: the guest must let go of it. `offer` offers it anew."""
        stage, channel = self._on_stage()
        stage.call(stage.host.remove, channel)

    @property
    def is_open(self) -> bool:
        """Whether a driver has opened the channel."""
        return self._side.io is not None

    @property
    def opens(self) -> int:
        """How often the channel was opened."""
        return self._side.opens

    def wait_open(self, seconds: float | None = None, *, count: int = 1) -> None:
        """Until a driver has opened the channel `count` times, and it is open."""
        stage, _ = self._on_stage()
        stage.wait_until(
            lambda: self.is_open and self.opens >= count, f"open channel of {self.description.name}", seconds
        )

    def wait_closed(self, seconds: float | None = None) -> None:
        """Until the driver has closed the channel."""
        stage, _ = self._on_stage()
        stage.wait_until(lambda: not self.is_open, f"closed channel of {self.description.name}", seconds)

    # Talking.

    def expect(
        self,
        wanted: bytes | Callable[[Packet], object] | None = None,
        *,
        seconds: float | None = None,
    ) -> Packet:
        """The guest's next packet. AssertionError if it is not `wanted`: the beginning of its payload, or
        what `wanted(packet)` is true for.
        """
        __tracebackhide__ = True
        stage, _ = self._on_stage()
        packet = stage.wait_until(self._next, f"packet for {self.description.name}", seconds)
        if isinstance(wanted, bytes):
            if not packet.payload.startswith(wanted):
                raise AssertionError(f"not {wanted.hex(' ')}, but {self.told(packet)}")
        elif wanted is not None and not wanted(packet):
            raise AssertionError(f"not the one expected: {self.told(packet)}")
        return packet

    def expect_nothing(self, seconds: float) -> None:
        """AssertionError if a packet comes within so many seconds."""
        stage, _ = self._on_stage()
        waited: list[bool] = []
        stage.call(stage.later, seconds, waited.append, True)
        stage.wait_until(lambda: bool(waited) or bool(self._side.received_packets), "quiet", seconds + 30)
        if self._side.received_packets:
            raise AssertionError(
                f"nothing was expected, and it came {self.told(self._side.received_packets[0])}"
            )

    def _next(self) -> Packet | None:
        kept = self._side.received_packets
        packet = kept.popleft() if kept else None
        if self._side.full and len(kept) <= MAX_KEPT // 2:
            stage, _ = self._on_stage()
            stage.call(self._side.go_on)
        return packet

    def told(self, packet: Packet) -> str:
        """A packet in words, by the wire tables."""
        from hvkvm.record import words

        size = 16 + len(packet.header) + len(packet.payload)
        return words.packet(self.description.interface, words.Framed(*packet, size))

    def send(
        self,
        payload: bytes,
        *,
        trans_id: int = 0,
        completion: bool = False,
        kind: int = VM_PKT_DATA_INBAND,
        header: bytes = b"",
    ) -> None:
        """Send the guest a packet, as the faults have it; `completion` asks for an answer."""
        flags = VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED if completion else 0
        self._send(Outgoing(payload, kind, trans_id, flags, header))

    def complete(self, packet: Packet, payload: bytes = b"") -> None:
        """Answer a packet of the guest by its transaction, as the faults have it."""
        self._send(Outgoing(payload, VM_PKT_COMP, packet.trans_id))

    def _send(self, packet: Outgoing) -> None:
        stage, _ = self._on_stage()
        assert self.faults is not None
        stage.call(self.faults.send, packet)

    # Faults.

    def drop(self, count: int = 1) -> None:
        """Lose the next `count` packets to the guest."""
        self._with_faults(Faults.drop, count)

    def duplicate(self, count: int = 1) -> None:
        """Send each of the next `count` packets twice."""
        self._with_faults(Faults.duplicate, count)

    def delay(self, seconds: float, count: int = 1) -> None:
        """Send each of the next `count` packets so much later; those behind them overtake."""
        self._with_faults(Faults.delay, seconds, count)

    def reorder(self, count: int = 2) -> None:
        """Keep the next `count` packets until the last has come, and send them in reverse."""
        self._with_faults(Faults.reorder, count)

    def corrupt(self, change: Change = flip_first_bit, count: int = 1) -> None:
        """Send `change(payload)` in place of each of the next `count` payloads."""
        self._with_faults(Faults.corrupt, change, count)

    def stall(self) -> None:
        """Do nothing until `resume`: take no packet of the guest, send none."""

        def stop(faults: Faults) -> None:
            self._side.stalled = True
            faults.stall()

        self._with_faults(stop)

    def resume(self) -> None:
        """Undo `stall`: what has waited either way goes on."""

        def go_on(faults: Faults) -> None:
            self._side.stalled = False
            faults.resume()
            self._side.go_on()

        self._with_faults(go_on)

    def _with_faults(self, fn: Callable[..., object], *args: Any) -> None:
        stage, _ = self._on_stage()
        stage.call(fn, self.faults, *args)

    def _on_stage(self) -> tuple[Stage, Channel]:
        if self._stage is None or self._channel is None:
            raise AssertionError(f"{self.description.name} is not offered yet: call offer(guest) first")
        return self._stage, self._channel


def _guid(text: str | bytes) -> bytes:
    return vmbus.guid(text) if isinstance(text, str) else text
