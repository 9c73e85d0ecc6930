"""The guest side of VMBus, for tests: a client on the same wire table, with no kernel and no driver.

Why: the host's rules are worth as much as the guests that try them. This one
does what Linux's hv_vmbus does, message by message and in the test's own order,
so a test may also do what no driver would. It runs in one process with the
server (`vmbus_loopback`), on RAM that both see.

`post(payload)` is HvPostMessage and returns its status, `ring(connection_id)`
is HvSignalEvent. One thread.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

from hvkvm.abi import vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.abi.ring import Packet
from hvkvm.abi.vmbus_messages import Message
from hvkvm.memory.guest import GuestMemory
from hvkvm.vmbus.channel_io import ChannelIo
from hvkvm.vmbus.ring_reader import RingReader
from hvkvm.vmbus.ring_writer import RingWriter

PAGE = vmbus.HV_HYP_PAGE_SIZE


class GuestChannel:
    """An offered channel as the guest has it; `io` once it is open."""

    def __init__(self, offer: Message) -> None:
        self.offer = offer
        self.relid: int = offer["relid"]
        self.connection_id: int = offer["connection_id"]
        self.rescinded = False
        self.gpadl = 0
        self.pages: Sequence[int] = ()
        self.io: ChannelIo | None = None
        self.on_interrupt: Callable[[], object] | None = None
        """Called in place of draining, for who reads the ring by itself."""
        self.received: list[Packet] = []

    @property
    def opened(self) -> ChannelIo:
        """`io` of an open channel; AssertionError before."""
        assert self.io is not None, f"relid {self.relid} is not open"
        return self.io

    def interrupt(self) -> None:
        """The host has set this channel's event flag: take what is there."""
        if self.on_interrupt is not None:
            self.on_interrupt()
        elif self.io is not None:
            self.io.drain(self.received.append)


class VmbusClient:
    """A guest. `free_pages` are PFNs of `memory` that it may use for rings."""

    def __init__(
        self,
        memory: GuestMemory,
        free_pages: Sequence[int],
        post: Callable[[bytes], int],
        ring: Callable[[int], object],
    ) -> None:
        self.memory = memory
        self.free_pages = list(free_pages)
        self.interrupt_page = 0
        """Its address, while the connection's version has one."""
        self._post = post
        self._ring = ring
        self._next_gpadl = 0xE1E10
        self.version = 0
        self.features = 0
        self.messages: list[Message] = []
        """Everything the host has sent."""
        self.offers: dict[int, GuestChannel] = {}
        self.offers_delivered = 0

    def post(self, type_or_name: int | str, tail: bytes = b"", **values: Any) -> int:
        """Post one message of the table; the hypercall's status."""
        return self._post(wire.build(type_or_name, tail, **values))

    def deliver(self, payload: bytes) -> None:
        """A message of the host. AssertionError if it is not in the table, short, or meant for hosts."""
        message = wire.parse(payload)
        assert message is not None, f"unknown message {payload.hex()}"
        assert not message.kind.to_host, f"{message} is for hosts"
        assert len(payload) >= message.kind.size
        self.messages.append(message)
        number = message.kind.type
        if number == wire.OFFERCHANNEL:
            relid = message["relid"]
            assert 1 <= relid <= vmbus.MAX_RELID
            assert relid not in self.offers, f"relid {relid} offered twice"
            self.offers[relid] = GuestChannel(message)
        elif number == wire.RESCIND_CHANNELOFFER:
            self.offers[message["relid"]].rescinded = True
        elif number == wire.ALLOFFERS_DELIVERED:
            self.offers_delivered += 1

    def last(self, number: int) -> Message:
        """The latest message of this type. AssertionError if there is none."""
        for message in reversed(self.messages):
            if message.kind.type == number:
                return message
        raise AssertionError(f"no {wire.KINDS[number].name} came; {[str(m) for m in self.messages]}")

    def count(self, number: int) -> int:
        """How many messages of this type came."""
        return sum(message.kind.type == number for message in self.messages)

    # The steps of a driver.

    def contact(
        self, version: int, *, vp_index: int = 0, sint: int = 2, features: int = 0, **more: Any
    ) -> int:
        """INITIATE_CONTACT; forgets all of an earlier connection, as a new kernel does."""
        self.offers.clear()
        self.messages.clear()
        page = more.pop("interrupt_page", PAGE)
        self.interrupt_page = page if version < vmbus.VERSION_WIN8 else 0
        if self.interrupt_page and self.memory.contains(page, PAGE):
            self.memory.zero(page, PAGE)
        if version >= vmbus.VERSION_WIN10_V5:
            page = sint | features << 32
        self.version = version
        return self.post(
            wire.INITIATE_CONTACT, version=version, target_vcpu=vp_index, interrupt_page=page, **more
        )

    def _bit(self, half: int, relid: int) -> tuple[int, int]:
        """Where a channel's bit is in the interrupt page."""
        return self.interrupt_page + half + relid // 8, 1 << relid % 8

    def mark(self, relid: int) -> None:
        """Set a channel's bit in the half of the interrupt page that the host looks at."""
        at, bit = self._bit(vmbus.SEND_HALF, relid)
        self.memory.write(at, bytes([self.memory.read(at, 1)[0] | bit]))

    def take_marks(self) -> list[int]:
        """The relids whose bits the host has set, which are cleared."""
        found = []
        for relid in range(vmbus.MAX_RELID + 1):
            at, bit = self._bit(0, relid)
            byte = self.memory.read(at, 1)[0]
            if byte & bit:
                self.memory.write(at, bytes([byte & ~bit]))
                found.append(relid)
        return found

    def by_interface(self, interface: bytes, index: int = 0) -> GuestChannel:
        """The channel of this type. AssertionError if none was offered."""
        for channel in self.offers.values():
            if channel.offer["interface"] == interface and channel.offer["sub_channel_index"] == index:
                return channel
        raise AssertionError("no such offer")

    def post_gpadl(self, relid: int, pfns: Sequence[int], *, gpadl: int | None = None) -> int:
        """Describe whole pages, in as many messages as it takes; the GPADL's id."""
        if gpadl is None:
            gpadl, self._next_gpadl = self._next_gpadl, self._next_gpadl + 1
        for payload in gpadl_messages(relid, gpadl, [(len(pfns) * PAGE, 0, list(pfns))]):
            self._post(payload)
        return gpadl

    def prepare_rings(self, channel: GuestChannel, out_pages: int = 2, in_pages: int = 2) -> None:
        """Take pages for both rings, clear them, and describe them to the host."""
        count = out_pages + in_pages
        channel.pages, self.free_pages = self.free_pages[:count], self.free_pages[count:]
        assert len(channel.pages) == count, "the guest has no pages left"
        for pfn in channel.pages:
            self.memory.zero(pfn * PAGE, PAGE)
        channel.gpadl = self.post_gpadl(channel.relid, channel.pages)

    def open(self, channel: GuestChannel, *, vp_index: int = 0, out_pages: int = 2, **more: Any) -> int:
        """Open `channel` on the rings that were prepared; drains them from now on."""
        writer = RingWriter(self.memory, channel.pages[:out_pages])
        reader = RingReader(self.memory, channel.pages[out_pages:])
        writer.announce()
        reader.words[16] = 1
        connection_id = more.get("connection_id") or channel.connection_id

        def doorbell() -> None:
            if self.version < vmbus.VERSION_WIN7:
                self.mark(channel.relid)
                self._ring(vmbus.VMBUS_EVENT_CONNECTION_ID)
            else:
                self._ring(connection_id)

        channel.io = ChannelIo(reader, writer, doorbell, lambda reason: None, channel.interrupt)
        return self.post(
            wire.OPENCHANNEL,
            relid=channel.relid,
            openid=channel.relid,
            ring_gpadl=channel.gpadl,
            target_vp=vp_index,
            downstream_page_offset=out_pages,
            **more,
        )

    def close(self, channel: GuestChannel) -> None:
        """CLOSECHANNEL and the teardown of its rings."""
        channel.io = None
        self.post(wire.CLOSECHANNEL, relid=channel.relid)
        self.post(wire.GPADL_TEARDOWN, relid=channel.relid, gpadl=channel.gpadl)

    def reclaim(self, channel: GuestChannel) -> None:
        """Take the pages back, once the host has said GPADL_TORNDOWN."""
        self.free_pages += channel.pages
        channel.pages = ()

    def release(self, channel: GuestChannel) -> None:
        """After a rescind: give up the relid, closing first if it was open."""
        if channel.io is not None:
            channel.io = None
            self.post(wire.CLOSECHANNEL, relid=channel.relid)
        del self.offers[channel.relid]
        self.post(wire.RELID_RELEASED, relid=channel.relid)


def gpadl_messages(relid: int, gpadl: int, ranges: Sequence[tuple[int, int, Sequence[int]]]) -> list[bytes]:
    """GPADL_HEADER and as many GPADL_BODYs as (byte_count, byte_offset, pfns) ranges take."""
    data = b"".join(
        count.to_bytes(4, "little") + offset.to_bytes(4, "little") + array("Q", pfns).tobytes()
        for count, offset, pfns in ranges
    )
    head, body = vmbus.GPADL_HEADER_VALUES * 8, vmbus.GPADL_BODY_VALUES * 8
    messages = [
        wire.build(
            wire.GPADL_HEADER,
            data[:head],
            relid=relid,
            gpadl=gpadl,
            range_buflen=len(data) & 0xFFFF,
            rangecount=len(ranges),
        )
    ]
    for number, at in enumerate(range(head, len(data), body)):
        messages.append(wire.build(wire.GPADL_BODY, data[at : at + body], msgnumber=number, gpadl=gpadl))
    return messages
