"""The guest's side of vsock as Linux's hv_sock has it, on the loopback client, for tests.

Like Linux it gives room back only once it has read all, sets the pending size
of its ring once and for all, and closes nothing before the host rescinds.

One thread, driven step by step by `vsock_loopback`.
"""

from __future__ import annotations

from random import Random

from hvkvm.abi import hvsock as abi
from hvkvm.abi import vmbus_messages as wire
from hvkvm.abi.ring import (
    VM_PKT_DATA_INBAND,
    WORD_FEATURE_BITS,
    WORD_PENDING_SEND_SZ,
    WORD_READ_INDEX,
    WORD_WRITE_INDEX,
    Packet,
)
from hvkvm.testing.vmbus_client import GuestChannel
from hvkvm.testing.vmbus_loopback import Loopback
from hvkvm.vmbus.ring_reader import RingReader
from hvkvm.vmbus.ring_writer import RingWriter

SEND_BYTES = 4096 - 8
"""Most data that Linux puts into one packet."""
PENDING = 16 + 8 + SEND_BYTES + 8
"""What Linux sets as pending size of its ring, once and for all."""
RING_PAGES = 6


class GuestSocket:
    """A guest program's end: `outgoing` is what it has yet to send, `incoming` what came."""

    def __init__(self, guest: VsockGuest, channel: GuestChannel, out_pages: int, in_pages: int) -> None:
        self.guest = guest
        self.channel = channel
        self.port = abi.port_of(channel.offer["interface"])
        self.state = "gpadl"
        self.outgoing = bytearray()
        self.incoming = bytearray()
        self.finish = False
        """Send the empty packet behind `outgoing`."""
        self.fin_sent = self.fin_seen = False
        self.reads = True
        self.packets_read = 0
        self._pages = (out_pages, in_pages)
        client = guest.loopback.client
        client.prepare_rings(channel, out_pages, in_pages)
        memory, pages = client.memory, channel.pages
        self.writer = RingWriter(memory, pages[:out_pages])
        self.reader = RingReader(memory, pages[out_pages:])
        self._readable = self._writable = False
        channel.on_interrupt = self._interrupt

    def _interrupt(self) -> None:
        self._readable = self._writable = True

    @property
    def rescinded(self) -> bool:
        """Whether the host has taken the channel back."""
        return self.channel.rescinded

    def step(self, random: Random) -> bool:
        """Go on by one step; whether there was one to go."""
        client, relid = self.guest.loopback.client, self.channel.relid
        if self.state == "gpadl":
            if not any(
                m.kind.type == wire.GPADL_CREATED and m["gpadl"] == self.channel.gpadl
                for m in client.messages
            ):
                return False
            for ring in (self.writer, self.reader):
                ring.words[WORD_FEATURE_BITS] = 1
            client.post(
                wire.OPENCHANNEL,
                relid=relid,
                openid=self.channel.gpadl,
                ring_gpadl=self.channel.gpadl,
                target_vp=0,
                downstream_page_offset=self._pages[0],
            )
            self.state = "opening"
            return True
        if self.state == "opening":
            kind = wire.OPENCHANNEL_RESULT
            if not any(m.kind.type == kind and m["openid"] == self.channel.gpadl for m in client.messages):
                return self._gone()
            self.state = "open"
            self.writer.words[WORD_PENDING_SEND_SZ] = PENDING
            self._interrupt()
            return True
        if self.state != "open":
            return False
        return self._read(random) | self._write(random) | self._gone()

    def _gone(self) -> bool:
        if not self.rescinded:
            return False
        # The rescind may overtake the interrupt; what is in the ring counts.
        self._readable = self._readable or (self.state == "open" and self.reader.unmask())
        if self._readable:
            return False
        self.state = "gone"
        self.close()
        return True

    def _read(self, random: Random) -> bool:
        if not self.reads or not self._readable:
            return False
        for _ in range(random.randrange(1, 9)):
            packet = self.reader.get()
            if packet is None:
                # As hv_pkt_iter_next(): the room goes back when all is read.
                if self.reader.publish():
                    self._signal()
                self._readable = self.reader.unmask()
                break
            self._got(packet)
        return True

    def _got(self, packet: Packet) -> None:
        kind, size = abi.pipe_header.unpack_from(packet.payload)
        assert (packet.type, kind) == (VM_PKT_DATA_INBAND, abi.VMPIPE_TYPE_DATA)
        assert size <= abi.MAX_DATA_BYTES, "Linux takes no more"
        assert len(packet.payload) == 8 + (size + 7 & ~7)
        assert not self.fin_seen, "data behind the end"
        self.packets_read += 1
        self.incoming += packet.payload[8 : 8 + size]
        self.fin_seen = not size

    def _write(self, random: Random) -> bool:
        """As hvs_stream_enqueue(), which keeps room for the empty packet."""
        if self.rescinded or not self._writable or self.fin_sent:
            return False
        if not self.outgoing:
            if self.finish:
                self.fin_sent = True
                self.send_packet(b"")
                return True
            return False
        size = min(SEND_BYTES, len(self.outgoing), random.choice((7, 1000, SEND_BYTES, SEND_BYTES)))
        if self._writable_bytes() < size:
            size = self._writable_bytes()
        if size <= 0:
            self._writable = False  # until the host signals
            return True
        self.send_packet(bytes(self.outgoing[:size]))
        del self.outgoing[:size]
        return True

    def _writable_bytes(self) -> int:
        words, size = self.writer.words, self.writer.size
        free = size - (words[WORD_WRITE_INDEX] - words[WORD_READ_INDEX]) % size
        return (free - 40 - 32) & ~7 if free > 40 + 32 else 0

    def send_packet(
        self, data: bytes, *, header: bytes | None = None, kind: int = VM_PKT_DATA_INBAND
    ) -> None:
        """Put one packet into the ring; AssertionError if it is full. `header` to lie."""
        front = abi.pipe_header.pack(abi.VMPIPE_TYPE_DATA, len(data)) if header is None else header
        assert self.writer.put(kind, front + data), "the ring is full"
        self.writer.words[WORD_PENDING_SEND_SZ] = PENDING
        if self.writer.flush():
            self._signal()

    def _signal(self) -> None:
        self.guest.loopback.synic.signal(self.channel.connection_id)

    def close(self) -> None:
        """What the kernel does once the channel is rescinded and the program has closed."""
        client = self.guest.loopback.client
        if self.state != "gpadl":
            client.post(wire.CLOSECHANNEL, relid=self.channel.relid)
        client.post(wire.RELID_RELEASED, relid=self.channel.relid)
        del client.offers[self.channel.relid]
        client.reclaim(self.channel)
        self.state = "gone"


class VsockGuest:
    """The guest's kernel: takes offers for ports in `listening` and for its own connects."""

    def __init__(self, loopback: Loopback, *, pages: int = RING_PAGES) -> None:
        self.loopback = loopback
        self.pages = pages
        self.listening: set[int] = set()
        self.connects: dict[int, int] = {}
        """Local port to service port of connects under way."""
        self.sockets: list[GuestSocket] = []
        self.ignored: set[int] = set()
        self._local_port = 0xC0000000

    def connect(self, port: int) -> int:
        """Ask the host for a connection; its local port."""
        self._local_port += 1
        self.connects[self._local_port] = port
        self.loopback.client.post(
            wire.TL_CONNECT_REQUEST,
            endpoint_id=abi.service_guid(self._local_port),
            service_id=abi.service_guid(port),
        )
        return self._local_port

    def step(self, random: Random) -> bool:
        """Take new offers and let each socket go on; whether anything happened."""
        moved = False
        known = {s.channel.relid for s in self.sockets if s.state != "gone"}
        for relid, channel in list(self.loopback.client.offers.items()):
            if relid in known:
                continue
            if relid not in self.ignored and not channel.rescinded:
                moved |= self._offered(channel)
            elif channel.rescinded:
                self.loopback.client.post(wire.RELID_RELEASED, relid=relid)
                del self.loopback.client.offers[relid]
                self.ignored.discard(relid)
                moved = True
        sockets = list(self.sockets)
        random.shuffle(sockets)
        for one in sockets:
            moved |= one.step(random)
        return moved

    def _offered(self, channel: GuestChannel) -> bool:
        offer = channel.offer
        assert offer["flags"] == abi.OFFER_FLAGS
        to_guest = offer["user_defined"][4]
        port = abi.port_of(offer["interface"])
        local = abi.port_of(offer["instance"])
        wanted = port in self.listening if to_guest else self.connects.pop(local or 0, None) == port
        if not wanted:
            self.ignored.add(channel.relid)
            return True
        self.sockets.append(GuestSocket(self, channel, self.pages, self.pages))
        return True
