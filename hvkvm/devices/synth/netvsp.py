"""A NIC for a guest's netvsc driver: hv_netvsc of Linux, iPXE's and Windows's own.

The guest and its host agree in three layers. NVSP, here: version, buffers, sub-channels. RNDIS, in
`netvsp_rndis`: what the NIC is, what it shall let through and leave undone. Frames: `netvsp_send` out of the
guest, `netvsp_receive` into it, `netvsp_channel` for each ring. The other end is a `net.port.Port`.

A guest that breaks the protocol loses its channel, and gets it again with its next connection. Owner: the I/O
loop, for every method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import monotonic

from hvkvm.abi import nvsp, rndis
from hvkvm.abi.ring import Packet
from hvkvm.abi.vmbus import GUID_BYTES, VMBUS_CHANNEL_ENUMERATE_DEVICE_INTERFACE
from hvkvm.devices.synth.netvsp_agreement import Agreement
from hvkvm.devices.synth.netvsp_channel import ChannelState, NvspChannel
from hvkvm.devices.synth.netvsp_laid import Laid
from hvkvm.devices.synth.netvsp_receive import MAX_CONTROL_WAITING, Receive
from hvkvm.devices.synth.netvsp_rndis import Control, ControlState, NicFacts
from hvkvm.devices.synth.netvsp_rss import Toeplitz, hash_input
from hvkvm.devices.synth.netvsp_send import Send
from hvkvm.digest import sha256
from hvkvm.net.port import MAX_MTU, MAX_QUEUES, MIN_MTU, Frame, Offloads, Port
from hvkvm.runtime.guard import Guard
from hvkvm.runtime.protocols import CallLater
from hvkvm.tuples import NamedTuple
from hvkvm.vmbus.channel_io import ChannelIo
from hvkvm.vmbus.device import SubChannels
from hvkvm.vmbus.offer import Offer
from hvkvm.vmbus.pages import Ram

SPEED = 100_000_000
"""10 Gbit/s, in units of 100 bit/s: what RNDIS asks for."""


class NetvspState(NamedTuple):
    """What is agreed, lent and owed."""

    version: int
    mtu: int
    vlan_marks: bool
    receive_gpadl: int | None
    receive_set: int
    pieces: tuple[tuple[int, int, int], ...]
    send_gpadl: int | None
    control: ControlState
    waiting: tuple[bytes, ...]
    """RNDIS messages for the guest."""
    told_link: bool | None
    channels: dict[int, ChannelState]
    """By index."""
    subchannels: int


class Netvsp:
    """One NIC. `name` tells it from others of this VM, and is the same at each boot.

    A `vmbus.device.StreamDevice` to its guest, a `net.port.Receiver` to its port.
    """

    State = NetvspState

    def __init__(
        self,
        memory: Ram,
        port: Port,
        *,
        name: str,
        address: bytes,
        queues: int = 1,
        speed: int = SPEED,
        later: CallLater | None = None,
    ) -> None:
        """`address`: MAC, 6 bytes, unicast (ValueError). `queues`: most channels, where RSS pays.

        `later` is the loop's `call_later`; without it no completion is kept back.
        """
        if len(address) != 6 or address[0] & 1:
            raise ValueError(f"{address.hex(':')}: no MAC address of a NIC")
        self.name = name
        self.port = port
        self.address = address
        self.guard = Guard()
        self.later = later
        self._speed = speed
        self._queues = max(1, min(queues, MAX_QUEUES))
        self._wire_up = False
        self._went_down = False  # since the guest last heard
        self._unplugged = False  # for good
        self._taken = 0
        self._starved = False  # the port waits for room
        self._toeplitz: Toeplitz | None = None
        self.control_state = Control(address, self._facts, self._counters)
        self.receive = Receive(self.control_state, self.fail)
        self.send = Send(memory)
        self._channels: dict[int, NvspChannel] = {0: NvspChannel(self, self._offer(0))}
        self._saved: dict[int, ChannelState] = {}
        self._settled: tuple[bool, bool] | None = None
        """What the port was told of the guest's RSC, over IPv4 and IPv6."""
        self.agreed = Agreement(memory, self.send, self.receive, port.mtu, self._queues, self.fail)
        self._clear()

    def _clear(self) -> None:
        """As a NIC that no driver has taken."""
        self._told_link: bool | None = None
        self.telling_link = False
        """Whether an indication of the link is on its way: the guest has not given it back yet."""
        self.link_waits = False
        """Whether there is another to be sent behind that one."""
        self.link_heard = 0.0
        """When the guest last gave one back (time.monotonic)."""
        self.receive.forget()
        self.control_state.clear()
        self.agreed.clear()
        self.room()

    def _offer(self, index: int) -> Offer:
        instance = sha256(f"hvkvm netvsp {self.name}".encode()).digest()[:GUID_BYTES]
        flags = VMBUS_CHANNEL_ENUMERATE_DEVICE_INTERFACE
        return Offer(nvsp.HV_NIC_GUID, instance, self.name, flags=flags, sub_channel_index=index)

    # vmbus.device.StreamDevice, GpadlUser, MultiChannel

    @property
    def offer(self) -> Offer:
        """The primary channel."""
        return self._channels[0].offer

    def opened(self, io: ChannelIo) -> None:
        """The guest speaks first."""
        self._clear()
        self._channels[0].opened(io)

    def rung(self) -> None:
        """See `vmbus.device.StreamDevice`."""
        self._channels[0].rung()

    def close(self, done: Callable[[], object]) -> None:
        """The driver has left. Sub-channels go by themselves."""
        self._channels[0].clear()
        self._clear()
        self._settle_offloads()
        done()

    @property
    def in_use(self) -> bool:
        """Whether a guest has it open."""
        return any(channel.io is not None for channel in self._channels.values())

    @property
    def packets(self) -> int:
        """How many were taken from the rings that are open."""
        return sum(one.io.reader.packets for one in self._channels.values() if one.io is not None)

    def unplug(self) -> None:
        """Pull the cable for good: what is sent is lost and completed at once, and the wire heard no more."""
        self.link(False)
        self._unplugged = True
        self.later = None  # no completion is kept back any more
        self.writable()

    def finish(self) -> None:
        """Complete what the guest has sent by now."""
        for channel in list(self._channels.values()):
            if channel.io is not None:
                with channel.io:
                    channel.rung()

    def release_gpadl(self, gpadl_id: int, done: Callable[[], object]) -> None:
        """See `vmbus.device.GpadlUser`. Nothing that is under way touches it."""
        self.agreed.release(gpadl_id)
        self.room()
        done()

    def bind(self, sub_channels: SubChannels) -> None:
        """See `vmbus.device.MultiChannel`."""
        self.agreed.sub_channels = sub_channels

    def sub_channel(self, index: int) -> NvspChannel:
        """See `vmbus.device.MultiChannel`."""
        if not 0 < index < self._queues:
            raise ValueError(f"the NIC {self.name} has no channel {index}")
        channel = self._channels[index] = NvspChannel(self, self._offer(index))
        channel.saved = self._saved.pop(index, None)
        return channel

    # vmbus.device.SavedDevice

    def save(self) -> NetvspState:
        """See `vmbus.device.SavedDevice`."""
        receive, send = self.receive.buffer, self.send.buffer
        return NetvspState(
            self.agreed.version,
            self.agreed.mtu,
            self.receive.vlan_marks,
            None if receive is None else receive.gpadl_id,
            self.receive.set_id,
            self.receive.pieces.save(),
            None if send is None else send.gpadl_id,
            self.control_state.save(),
            tuple(self.receive.waiting),
            self._told_link,
            {index: one.save() for index, one in self._channels.items() if one.io is not None},
            self.agreed.subchannels,
        )

    def load(self, io: ChannelIo | None, state: NetvspState) -> None:
        """See `vmbus.device.SavedDevice`."""
        self.control_state.load(state.control)
        if io is None:
            self.control_state.clear()
            return
        known = state.version in (0, *nvsp.NVSP_VERSIONS) and MIN_MTU <= state.mtu <= MAX_MTU
        if not known or len(state.waiting) > MAX_CONTROL_WAITING or not 0 <= state.receive_set <= 0xFFFF:
            raise ValueError(f"the NIC {self.name} has agreed on what it cannot")
        self.agreed.agree(state.version)
        self._told_link = state.told_link
        if state.told_link is not None:
            self.link_heard = monotonic()  # at the latest
        self.agreed.set_mtu(state.mtu)
        self.receive.vlan_marks = state.vlan_marks
        if state.receive_gpadl is not None:
            buffer = self.agreed.buffer(state.receive_gpadl)
            if buffer is None or not self.receive.lend(buffer, state.receive_set, state.mtu):
                raise ValueError(f"the NIC {self.name} has a receive buffer that is none")
            self.receive.pieces.load(state.pieces)
        if state.send_gpadl is not None:
            self.send.buffer = self.agreed.send_buffer(state.send_gpadl)
            if self.send.buffer is None:
                raise ValueError(f"the NIC {self.name} has a send buffer that is none")
        self.receive.waiting.extend(state.waiting)
        self.agreed.subchannels = max(0, min(state.subchannels, self._queues - 1))
        self.telling_link = self.receive.indicating
        self._saved = dict(state.channels)
        self._channels[0].load(io, self._saved.pop(0, None))
        for index, channel in self._channels.items():
            channel.saved = self._saved.pop(index, None)
        self._scaling_changed()
        self._settled = None  # the port is new, and is told when the guest goes on

    # netvsp_channel.Nic

    def fail(self, reason: str) -> None:
        """The guest broke a rule: its channel ends."""
        primary = self._channels[0]
        primary.fail(reason)
        if primary.io is not None:
            primary.io.again()

    def request(self, packet: Packet) -> bytes | None:
        """A message of the guest that is no RNDIS; what completes it."""
        return self.agreed.request(packet)

    def control(self, _io: ChannelIo, message: bytes) -> None:
        """An RNDIS control message."""
        before = self.control_state.packet_filter
        self.receive.forget()
        answer = self.control_state.handle(message)
        if answer is not None:
            self.receive.tell(answer)
        self._scaling_changed()
        if not before and self.control_state.packet_filter:
            self._tell_link()

    def transmit(self, frames: list[Frame], queue: int) -> int:
        """Frames of channel `queue` to the wire; how many were taken."""
        if self._unplugged:
            self.send.counters.lost += len(frames)
            return len(frames)
        return self.port.send(frames, queue)

    def after(self, io: ChannelIo) -> None:
        """A channel's turn is at its end: what others wait for."""
        if self.telling_link and not self.receive.indicating:
            self.telling_link, self.link_heard = False, monotonic()
        if self.link_waits:
            self._tell_link()
        primary = self._channels[0].io
        offers = io is primary and self.agreed.unoffered
        if (offers or self.receive.waiting) and primary is not None and not primary.broken:
            with primary:
                self.receive.pump(primary)
                if offers:
                    self.agreed.offer_sub_channels(primary)
        if (self.control_state.rsc4, self.control_state.rsc6) != self._settled:
            self._settle_offloads()
        self.room()

    def room(self) -> None:
        """See `netvsp_channel.Nic`. Without a guest too: the port gives what it keeps, and that is dropped.

        A port that is not told reads nothing more, whoever opens the NIC next.
        """
        if self._starved:
            self._starved = False
            self.port.resume()

    def _settle_offloads(self) -> None:
        four, six = self.control_state.rsc4, self.control_state.rsc6
        if (four, six) != self._settled:
            self._settled = four, six
            self.port.set_offloads(Offloads(four or six, four, six).within(self.port.offloads))

    def _scaling_changed(self) -> None:
        control = self.control_state
        if not control.scaling:
            self._toeplitz = None
        elif self._toeplitz is None or self._toeplitz.key != control.key:
            self._toeplitz = Toeplitz(control.key)

    def _channel_for(self, laid: Laid) -> ChannelIo | None:
        channels = self._channels
        if self._toeplitz is not None and len(channels) > 1:
            data = hash_input(bytes(laid.views[0][:64]))
            if data:
                table = self.control_state.table
                chosen = channels.get(table[self._toeplitz.hash(data) % len(table)])
                if chosen is not None and chosen.io is not None:
                    if chosen.kept:
                        with chosen.io:
                            chosen.release(chosen.io)
                    return chosen.io
        return channels[0].io

    # net.port.Receiver

    def frames(self, frames: Sequence[Frame]) -> int:
        """See `net.port.Receiver`."""
        self._taken = len(frames)
        self.guard.run(self._frames, frames)
        return self._taken

    def _frames(self, frames: Sequence[Frame]) -> None:
        primary = self._channels[0]
        io = primary.io
        if io is None or self._unplugged or ((io.reader.broken or io.writer.broken) and not io.held):
            self.receive.counters.unready += len(frames)
            return
        if io.held:
            taken = 0
        else:
            with io:
                if primary.kept:
                    primary.release(io)
                taken = self.receive.deliver(frames, self._channel_for)
            if taken < len(frames) and self.receive.starved:
                for channel in self._channels.values():
                    channel.starved()
        if taken < len(frames):
            self._starved = True
            self._taken = taken

    def writable(self) -> None:
        """See `net.port.Receiver`."""
        for channel in self._channels.values():
            self.guard.run(channel.writable)

    def link(self, up: bool) -> None:
        """See `net.port.Receiver`."""
        if self._unplugged:
            return
        self._wire_up = up
        self._went_down = self._went_down or not up
        self.guard.run(self._tell_link)

    def _tell_link(self) -> None:
        """Indicate what has changed since the guest last heard: one change at a time.

        A peer may come and go as often as it likes, and shall not use up the guest's receive buffer.
        """
        io = self._channels[0].io
        if io is None or not self.control_state.initialized:
            return
        self.link_waits = self.receive.indicating
        if self.link_waits:
            return  # `after` comes back to it
        # A wire that was down for a moment is told as such: it may lead elsewhere now, which a guest has to
        # find out by new addresses and neighbours.
        up = self._wire_up and not (self._went_down and self._told_link)
        self._went_down = False
        if up == self._told_link:
            return
        self._told_link, self.telling_link = up, True
        self.link_waits = up != self._wire_up
        status = rndis.RNDIS_STATUS_MEDIA_CONNECT if up else rndis.RNDIS_STATUS_MEDIA_DISCONNECT
        self.receive.tell(rndis.indicate.pack(rndis.RNDIS_MSG_INDICATE, rndis.indicate.size, status, 0, 0))
        io.again()  # sent in a turn of our own

    # Telling.

    def _facts(self) -> NicFacts:
        offloads = self.port.offloads
        large = self.agreed.version >= nvsp.NVSP_PROTOCOL_VERSION_61
        return NicFacts(
            self.port.mtu,
            self._wire_up,
            self._speed,
            offloads.csum,
            offloads.csum and offloads.tso4,
            offloads.csum and offloads.tso6,
            large and offloads.csum and offloads.tso4 and offloads.tso6,
            self._queues if self.agreed.version >= nvsp.NVSP_PROTOCOL_VERSION_5 else 1,
        )

    def _counters(self) -> dict[int, int]:
        sent, received = self.send.counters, self.receive.counters
        return {
            rndis.RNDIS_OID_GEN_XMIT_OK: sent.frames,
            rndis.RNDIS_OID_GEN_RCV_OK: received.frames,
            rndis.RNDIS_OID_GEN_XMIT_ERROR: sent.dropped + sent.lost,
            rndis.RNDIS_OID_GEN_RCV_ERROR: received.malformed,
            rndis.RNDIS_OID_GEN_RCV_NO_BUFFER: 0,
        }

    def inspect(self) -> Mapping[str, object]:
        """For dumps and `hvkvm ctl`. Any thread."""
        sent, received, control = self.send.counters, self.receive.counters, self.control_state
        channels = list(self._channels.values())  # the loop may add some meanwhile
        return {
            "name": self.name,
            "address": control.address.hex(":"),
            "link": "up" if self._wire_up else "down",
            "nvsp": f"{self.agreed.version:#x}",
            "mtu": self.agreed.mtu,
            "filter": control.packet_filter,
            "rsc": [control.rsc4, control.rsc6],
            "channels": sum(one.io is not None for one in channels),
            "receive_buffer": 0 if self.receive.buffer is None else self.receive.buffer.size,
            "receive_sections": self.receive.sections,
            "pieces_out": self.receive.pieces.lent,
            "sent": {name: getattr(sent, name) for name in sent.__slots__},
            "received": {name: getattr(received, name) for name in received.__slots__},
            "waiting": sum(one.waiting for one in channels),
        }


def address_of(vm_name: str, index: int) -> bytes:
    """A MAC address that a VM's NIC has at each boot: locally administered, from the VM's name."""
    return b"\x02" + sha256(f"hvkvm mac {vm_name} {index}".encode()).digest()[:5]
