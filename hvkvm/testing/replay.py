"""Plays a recording's guest against the host's code as it is now, and finds the first difference.

The bus and its utility devices run as in a machine, in one thread, on RAM of the same
size; the guest's messages and packets are the recording's, time is its time. So a
replay gives the same result each time. What the host says is compared with what it
said then, channel by channel, but for fields that are another at every run (times).

Devices that depend on more than their ring (disks, NICs, streams) have stand-ins that
say nothing: their channels open and close as recorded, their packets are only counted.
What `hvkvm ctl` asked of a device in the recorded run is not in a recording, so a
replay differs there.

Takes hostile files: ValueError for what is no recording of a whole connection.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from hvkvm.abi import vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.abi.device_layouts import protocol_of
from hvkvm.abi.layout import decode
from hvkvm.abi.record_format import ChannelEvent, Entry, Kind
from hvkvm.abi.ring import VM_PKT_COMP, Packet, packet_header
from hvkvm.devices.synth.heartbeat import Heartbeat
from hvkvm.devices.synth.keyboard import Keyboard
from hvkvm.devices.synth.kvp import Kvp
from hvkvm.devices.synth.shutdown import Shutdown
from hvkvm.devices.synth.timesync import TimeSync
from hvkvm.devices.synth.vss import Vss
from hvkvm.record import explain, words
from hvkvm.testing.vmbus_client import GuestChannel, VmbusClient
from hvkvm.testing.vmbus_loopback import MIB, Loopback
from hvkvm.vmbus.actions import TlConnect
from hvkvm.vmbus.device import Device, Done, StreamDevice
from hvkvm.vmbus.offer import Channel, Offer, only_instance
from hvkvm.vmbus.ring_reader import RingReader
from hvkvm.vmbus.ring_writer import RingWriter

SLACK_SECONDS = 1.0
"""How much later than recorded the host may say something: a timer's time is not exact."""
STEP_SECONDS = 0.05
MAX_GAP_SECONDS = 60.0
"""The most time between two entries that is played: none of the host's timers here is as long."""
MAX_CPUS = 254
MAX_MEMORY = 512 << 30


class Difference(NamedTuple):
    """Where host and recording part: the entry's number, its time in seconds, and both sides in words."""

    number: int
    seconds: float
    recorded: str
    now: str

    def __str__(self) -> str:
        where = f"entry {self.number}, at {self.seconds:.6f} s"
        return f"{where}\n  recorded: {self.recorded}\n  now:      {self.now}"


class Replayed(NamedTuple):
    """What a replay came to."""

    messages: int
    packets: int
    """Packets of the host that were compared."""
    skipped: dict[str, int]
    """Packets of devices that only have stand-ins, by protocol."""
    difference: Difference | None


class _StandIn:
    """A device that takes all and says nothing."""

    def __init__(self, offer: Offer) -> None:
        self.offer = offer

    def opened(self, io: object) -> None:
        """See vmbus.device."""

    def close(self, done: Done) -> None:
        """See vmbus.device."""
        done()

    def received(self, packet: Packet) -> None:
        """See vmbus.device."""

    def ready(self) -> None:
        """See vmbus.device."""


class _PlayedGuest(VmbusClient):
    """Takes what the host says, and does nothing by itself."""

    def __init__(self, player: _Player) -> None:
        super().__init__(player.memory, (), player.post, player.synic.signal)
        self.said: deque[bytes] = deque()
        self._player = player

    def contacts(self, message: wire.Message) -> None:
        """The guest contacts: its interrupt page is clear, if its version has one."""
        page = message["interrupt_page"] if message["version"] < vmbus.VERSION_WIN8 else 0
        self.interrupt_page = page if self.memory.contains(page, vmbus.HV_HYP_PAGE_SIZE) else 0
        if self.interrupt_page:
            self.memory.zero(page, vmbus.HV_HYP_PAGE_SIZE)

    def deliver(self, payload: bytes) -> None:
        """See VmbusClient."""
        self.said.append(payload)
        message = wire.parse(payload)
        if message is not None and message.kind.type == wire.OFFERCHANNEL:
            channel = GuestChannel(message)
            channel.on_interrupt = lambda: self._player.drain(channel.relid)
            self.offers[channel.relid] = channel


class _Ends(NamedTuple):
    """The guest's ends of an open channel."""

    writer: RingWriter
    reader: RingReader


class _Player(Loopback):
    """The host of the recorded machine."""

    def __init__(self, facts: dict[str, Any]) -> None:
        cpus, memory = facts.get("cpus"), facts.get("memory", 4 * MIB)
        if not isinstance(cpus, int) or not 1 <= cpus <= MAX_CPUS:
            raise ValueError("it does not say how many vCPUs its machine had")
        if not isinstance(memory, int) or not MIB <= memory <= MAX_MEMORY or memory % 4096:
            raise ValueError("it does not say how much memory its machine had")
        versions = {vmbus.version_text(version): version for version in vmbus.HOST_VERSIONS}
        newest = versions.get(str(facts.get("vmbus_max_version")), vmbus.HOST_VERSIONS[-1])
        super().__init__(vp_count=cpus, memory_bytes=memory, max_version=newest)
        self.guest = _PlayedGuest(self)
        self.client = self.guest
        self.ends: dict[int, _Ends] = {}
        self.packets: dict[int, deque[Packet]] = {}

    def drain(self, relid: int) -> None:
        """Take what the host has written."""
        ends = self.ends.get(relid)
        if ends is None:
            return
        while (packet := ends.reader.get()) is not None:
            self.packets.setdefault(relid, deque()).append(packet)
        ends.reader.publish()

    def channel(self, relid: int) -> Channel | None:
        """The channel of this relid."""
        return next((channel for channel in self.host.server.channels.all if channel.relid == relid), None)

    def prepare(self, message: wire.Message) -> None:
        """The guest opens a channel: its rings are clear, and its ends there."""
        channel = self.channel(message["relid"])
        gpadl = None if channel is None else self.host.gpadl(channel, message["ring_gpadl"])
        pages = None if gpadl is None else gpadl.ring_pages()
        split = message["downstream_page_offset"]
        if pages is None or not 2 <= split <= len(pages) - 2:
            return
        for pfn in pages:
            self.memory.zero(pfn * vmbus.HV_HYP_PAGE_SIZE, vmbus.HV_HYP_PAGE_SIZE)
        writer, reader = RingWriter(self.memory, pages[:split]), RingReader(self.memory, pages[split:])
        writer.announce()
        self.ends[message["relid"]] = _Ends(writer, reader)

    def write(self, entry: Entry) -> bool:
        """The guest's packet into its ring, and the doorbell; False if there is no such ring, or no room."""
        ends, channel = self.ends.get(entry.relid), self.channel(entry.relid)
        found = next(words.packets(entry.data), "")
        if ends is None or channel is None or isinstance(found, str):
            return False
        put = ends.writer.put(
            found.type, found.payload, trans_id=found.trans_id, flags=found.flags, header=found.header
        )
        ends.writer.flush()
        if channel.connection_id == vmbus.VMBUS_EVENT_CONNECTION_ID:
            self.guest.mark(entry.relid)
        self.synic.signal(channel.connection_id)
        self.run()
        return put


def replay(file: BinaryIO) -> Replayed:
    """Play a recording of depth "full". ValueError."""
    entries = [(at, entry) for at, entry in explain.read(file)]
    if not entries or entries[0][1].kind is not Kind.MACHINE:
        raise ValueError("it does not begin with its machine")
    try:
        facts = json.loads(entries[0][1].data)
    except (ValueError, RecursionError):
        raise ValueError("what it says of its machine is not JSON") from None
    if not isinstance(facts, dict) or facts.get("depth", "full") != "full":
        raise ValueError("only a recording with depth=full can be played")
    player = _Player(facts)
    try:
        return _Replay(player, entries).run()
    finally:
        player.close()


class _Replay:
    """One run through the entries."""

    def __init__(self, player: _Player, entries: list[tuple[int, Entry]]) -> None:
        self._player = player
        self._entries = entries
        self._began = self._before = entries[0][0]
        self._played = 0.0
        self._real: set[bytes] = set()
        self._offers = list(_offers(entry for _at, entry in entries))
        self._messages = self._packets = 0
        self._skipped: dict[str, int] = {}
        self._add_devices()

    def _add_devices(self) -> None:
        """What the machine had when its guest asked, in the same order; the guest's connects later."""
        player = self._player
        made: dict[bytes, Callable[[], Device | StreamDevice]] = {
            vmbus.HV_HEART_BEAT_GUID: lambda: Heartbeat(player.call_later),
            vmbus.HV_SHUTDOWN_GUID: Shutdown,
            vmbus.HV_TS_GUID: lambda: TimeSync(player.call_later, lambda: 0, lambda: 0),
            vmbus.HV_KVP_GUID: Kvp,
            vmbus.HV_VSS_GUID: lambda: Vss(player.call_later),
            vmbus.HV_KBD_GUID: Keyboard,
        }
        for offer in _first_offers(entry for _at, entry in self._entries):
            make = made.get(offer.interface)
            try:
                if make is not None and offer.instance == only_instance(offer.interface):
                    player.host.add(make())
                    self._real.add(offer.interface)
                else:
                    player.host.add(_StandIn(offer))
            except ValueError:
                continue  # offered twice: the messages will differ
        player.host.serve_connects(self._connect)

    def _connect(self, request: TlConnect) -> None:
        for offer in self._offers:
            if (offer.interface, offer.instance) == (request.service_id, request.endpoint_id):
                self._player.host.accept_connect(request, _StandIn(offer))
                return
        self._player.host.refuse_connect(request)

    def run(self) -> Replayed:
        """All of it, or up to the first difference."""
        difference = None
        for number, (at, entry) in enumerate(self._entries):
            seconds = (at - self._began) / 1e9
            self._player.run()
            self._pass(at)
            self._player.run()
            found = self._from_guest(entry) if entry.to_host else self._from_host(entry, seconds)
            if found is not None:
                difference = Difference(number, seconds, explain.described(entry), found)
                break
        return Replayed(self._messages, self._packets, self._skipped, difference)

    def _pass(self, at: int) -> None:
        """Let time pass up to an entry that was recorded `at`.

        It was taken from the recorded host's clock, which somebody may have set, or which went on while
        that host slept. A gap that is too long, or goes back, is played as the longest: what the host says
        too early waits for its entry, and what it says too late would be a difference.
        """
        gap = (at - self._before) / 1e9
        self._before = at
        self._played += gap if 0 <= gap <= MAX_GAP_SECONDS else MAX_GAP_SECONDS
        self._player.advance(max(0.0, self._played - self._player.now))

    def _from_guest(self, entry: Entry) -> str | None:
        player = self._player
        if entry.kind is Kind.LOST:
            raise ValueError("entries are lost in it")
        if entry.kind is Kind.MESSAGE and not entry.value:
            message = wire.parse(entry.data)
            if message is None:
                raise ValueError("a message of the guest in it is none")
            if message.kind.type == wire.OPENCHANNEL:
                player.prepare(message)
            elif message.kind.type == wire.INITIATE_CONTACT:
                player.guest.contacts(message)
            player.post(entry.data)
            player.run()
            self._messages += 1
        elif entry.kind is Kind.PACKET and entry.interface in self._real:
            if not player.write(entry):
                return "the guest's ring is not there, or has no room: the host has not read it"
        elif entry.kind is Kind.PACKET:
            self._skip(entry)
        elif entry.kind is Kind.CHANNEL and entry.value != ChannelEvent.OPENED:
            player.ends.pop(entry.relid, None)
        return None

    def _skip(self, entry: Entry) -> None:
        name = protocol_of(entry.interface).name
        self._skipped[name] = self._skipped.get(name, 0) + 1

    def _from_host(self, entry: Entry, seconds: float) -> str | None:
        if entry.kind is Kind.MESSAGE:
            self._act_for_stand_ins(entry)
            said = self._next(lambda: self._player.guest.said)
            self._messages += 1
            if said is None:
                return "nothing"
            return None if said == entry.data else words.message(said)
        if entry.kind is not Kind.PACKET:
            return None
        if entry.interface not in self._real:
            self._skip(entry)
            return None
        packet = self._next(lambda: self._player.packets.get(entry.relid, deque()))
        self._packets += 1
        if packet is None:
            return "nothing"
        raw = packet_header(packet.type, packet.header, len(packet.payload), packet.trans_id, packet.flags)
        raw += packet.payload
        if _comparable(entry.interface, raw) == _comparable(entry.interface, entry.data):
            return None
        return next(words.ring(entry.interface, raw), "nothing")

    def _next(self, queue: Callable[[], deque[Any]]) -> Any:
        """The next of what the host says, within SLACK_SECONDS; None if nothing comes."""
        waited = 0.0
        while not queue() and waited < SLACK_SECONDS:
            self._player.advance(STEP_SECONDS)
            self._player.run()
            waited += STEP_SECONDS
        return queue().popleft() if queue() else None

    def _act_for_stand_ins(self, entry: Entry) -> None:
        """What the recorded host did to them by itself: a device was added, or ended its channel."""
        message = wire.parse(entry.data)
        if message is None or self._player.guest.said:
            return
        host = self._player.host
        if message.kind.type == wire.RESCIND_CHANNELOFFER:
            channel = self._player.channel(message["relid"])
            if channel is not None and channel.offer.interface not in self._real:
                host.remove(channel)
        elif message.kind.type == wire.OFFERCHANNEL and message["interface"] not in self._real:
            try:
                host.add(_StandIn(_offer_of(message)))
            except ValueError:
                return  # it is offered already: the comparison says what is wrong
        self._player.run()


def _comparable(interface: bytes, raw: bytes) -> tuple[bytes, ...]:
    """A packet's bytes without those fields that are another at every run."""
    offset = int.from_bytes(raw[2:4], "little") * 8
    head, payload = raw[:offset], bytearray(raw[offset:])
    if int.from_bytes(raw[:2], "little") != VM_PKT_COMP or payload:
        for value in decode(bytes(payload), protocol_of(interface).payload).values:
            if value.field.volatile:
                payload[value.offset : value.offset + value.field.size] = bytes(value.field.size)
    return head, bytes(payload)


def _offers(entries: Iterable[Entry]) -> Iterator[Offer]:
    for entry in entries:
        if entry.kind is Kind.MESSAGE and not entry.to_host:
            message = wire.parse(entry.data)
            if message is not None and message.kind.type == wire.OFFERCHANNEL:
                yield _offer_of(message)


def _first_offers(entries: Iterable[Entry]) -> Iterator[Offer]:
    """Those up to the first ALLOFFERS_DELIVERED."""
    for entry in entries:
        if entry.kind is not Kind.MESSAGE or entry.to_host:
            continue
        message = wire.parse(entry.data)
        if message is None:
            continue
        if message.kind.type == wire.ALLOFFERS_DELIVERED:
            return
        if message.kind.type == wire.OFFERCHANNEL:
            yield _offer_of(message)


def _offer_of(message: wire.Message) -> Offer:
    return Offer(
        message["interface"],
        message["instance"],
        protocol_of(message["interface"]).name,
        flags=message["flags"],
        user_defined=message["user_defined"],
        sub_channel_index=message["sub_channel_index"],
        mmio_megabytes=message["mmio_megabytes"],
        mmio_megabytes_optional=message["mmio_megabytes_optional"],
    )
