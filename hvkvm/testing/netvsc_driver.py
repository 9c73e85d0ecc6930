"""The guest's NIC driver in the loopback: what Linux's hv_netvsc does, message by message.

Why: a test wants each form of a packet at a time of its choosing, and forms that no driver makes. Frames that
come are completed at once unless `complete` is off. For tests; one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hvkvm.abi import ndis, nvsp, rndis, vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.abi.ring import (
    VM_PKT_COMP,
    VM_PKT_DATA_INBAND,
    VM_PKT_DATA_USING_GPA_DIRECT,
    VM_PKT_DATA_USING_XFER_PAGES,
    VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED,
    GpaRange,
    Packet,
    gpa_direct_header,
    parse_transfer_pages,
)
from hvkvm.testing.vmbus_client import GuestChannel
from hvkvm.testing.vmbus_loopback import Loopback

PAGE = vmbus.HV_HYP_PAGE_SIZE
RECEIVE_SET = 0xCAFE
ANY = (
    rndis.NDIS_PACKET_TYPE_DIRECTED | rndis.NDIS_PACKET_TYPE_BROADCAST | rndis.NDIS_PACKET_TYPE_ALL_MULTICAST
)


def data_message(
    frame: bytes, infos: Sequence[tuple[int, int]] = (), *, pad: int = 0, split: bool = False
) -> bytes:
    """A RNDIS_MSG_PACKET with values as marks; with `split` without the frame, which follows elsewhere."""
    marks = b"".join(rndis.value_info.pack(16, kind, 12, value) for kind, value in infos)
    data = rndis.packet.size + len(marks)
    head = rndis.packet.pack(
        rndis.RNDIS_MSG_PACKET,
        data + len(frame) + pad,
        data - rndis.BODY,
        len(frame),
        0,
        0,
        0,
        rndis.packet.size - rndis.BODY if marks else 0,
        len(marks),
        0,
        0,
    )
    return head + marks + (b"" if split else frame + bytes(pad))


class NetvscDriver:
    """A driver on an offered NIC. The host has the device already; `start` does all up to a set filter."""

    def __init__(self, loop: Loopback, *, connect: bool = True, ring_pages: int = 16) -> None:
        self.loop = loop
        self.ring_pages = ring_pages
        if connect:
            loop.connect(vmbus.VERSION_WIN10_V5_3)
        self.channel = loop.client.by_interface(nvsp.HV_NIC_GUID)
        self.complete = True
        self.strict = True
        """Whether what comes must make sense: it need not to a guest that gives back what it has not read."""
        self.received: list[tuple[bytes, dict[int, int]]] = []
        """Each frame, and its marks."""
        self.indications: list[int] = []
        self.answers: list[bytes] = []
        self.completions: list[tuple[int, bytes]] = []
        self.inband: list[bytes] = []
        self.held: list[tuple[GuestChannel, int]] = []
        """Transfers that are not completed yet."""
        self.transfers = 0
        self.receive_pages: list[int] = []
        self.send_pages: list[int] = []
        self.receive_gpadl = self.send_gpadl = 0
        self.section = self.sections = 0
        self.subs: dict[int, GuestChannel] = {}
        """Open sub-channels by index."""
        self.came: list[tuple[int, bytes]] = []
        """Each frame that came, and the index of its channel."""
        self.completed_on: dict[int, GuestChannel] = {}
        self._next = 1

    # The steps of a driver.

    def start(self, version: int = nvsp.NVSP_PROTOCOL_VERSION_61, **options: Any) -> NetvscDriver:
        """Open, agree, lend buffers, initialize, let everything through."""
        self.open()
        assert self.init(version) == nvsp.NVSP_STAT_SUCCESS
        self.configure(options.pop("mtu", 1500))
        self.lend_receive(options.pop("receive_pages", 768))
        self.lend_send(options.pop("send_pages", 24))
        assert self.control(rndis.initialize.pack(2, 24, 1, 1, 0, 4096))
        if options.pop("rsc", False):
            self.set_rsc(True)
        self.set(rndis.RNDIS_OID_GEN_CURRENT_PACKET_FILTER, options.pop("filter", ANY).to_bytes(4, "little"))
        assert not options
        return self

    def open(self) -> None:
        """Rings; the ring is taken by this class from now on."""
        pages = self.ring_pages
        self.loop.open(self.channel, out_pages=pages, in_pages=pages)
        self.channel.on_interrupt = lambda: self.take(self.channel)

    def open_sub(self, index: int) -> None:
        """Open a sub-channel that was offered."""
        channel = self.loop.client.by_interface(nvsp.HV_NIC_GUID, index)
        self.loop.open(channel, out_pages=8, in_pages=8, vp_index=index % 2)
        channel.on_interrupt = lambda: self.take(channel)
        self.subs[index] = channel

    def scale(self, table: Sequence[int], key: bytes) -> int:
        """RSS parameters; the status."""
        table_at = ndis.recv_scale_param.size
        key_at = table_at + 4 * len(table)
        params = ndis.recv_scale_param.pack(
            ndis.NDIS_OBJECT_TYPE_RSS_PARAMETERS,
            2,
            table_at,
            0,
            0,
            0x701,
            4 * len(table),
            0,
            table_at,
            len(key),
            0,
            key_at,
        )
        data = params + b"".join(one.to_bytes(4, "little") for one in table) + key
        return self.set(rndis.OID_GEN_RECEIVE_SCALE_PARAMETERS, data)

    def leave(self) -> None:
        """As Linux's driver goes: halt, revoke, close, tear down, sub-channels released; all pages back."""
        client = self.loop.client
        self.control(rndis.header.pack(rndis.RNDIS_MSG_HALT, 12) + bytes(4))
        self.post(nvsp.revoke_buf.pack(nvsp.NVSP_MSG1_TYPE_REVOKE_RECV_BUF, RECEIVE_SET))
        self.post(nvsp.revoke_buf.pack(nvsp.NVSP_MSG1_TYPE_REVOKE_SEND_BUF, 0))
        client.close(self.channel)
        self.loop.run()
        for gpadl in (self.receive_gpadl, self.send_gpadl):
            client.post(wire.GPADL_TEARDOWN, relid=self.channel.relid, gpadl=gpadl)
        self.loop.run()
        for sub in self.subs.values():
            assert sub.rescinded
            client.release(sub)
            client.reclaim(sub)
        self.loop.run()
        client.reclaim(self.channel)
        client.free_pages += self.receive_pages + self.send_pages
        self.subs = {}
        self.held = []

    def init(self, version: int) -> int:
        """The status of INIT."""
        answer = self.ask(nvsp.init.pack(nvsp.NVSP_MSG_TYPE_INIT, version, version))
        return int(nvsp.init_complete.unpack(answer)[3])

    def configure(self, mtu: int) -> None:
        """NDIS_CONFIG and the NDIS version, which nobody answers."""
        caps = nvsp.NDIS_CONFIG_IEEE8021Q | nvsp.NDIS_CONFIG_RSC
        self.post(nvsp.ndis_config.pack(nvsp.NVSP_MSG2_TYPE_SEND_NDIS_CONFIG, mtu + 14, 0, caps))
        self.post(nvsp.ndis_version.pack(nvsp.NVSP_MSG1_TYPE_SEND_NDIS_VER, 6, 30))

    def lend_receive(self, pages: int) -> int:
        """The receive buffer; the status."""
        self.receive_pages = self.take_pages(pages)
        self.receive_gpadl = self.loop.client.post_gpadl(self.channel.relid, self.receive_pages)
        self.loop.run()
        kind = nvsp.NVSP_MSG1_TYPE_SEND_RECV_BUF
        answer = nvsp.recv_buf_complete.unpack(
            self.ask(nvsp.send_buf.pack(kind, self.receive_gpadl, RECEIVE_SET) + bytes(30))
        )
        self.section, self.sections = answer[4], answer[5]
        return int(answer[1])

    def lend_send(self, pages: int) -> int:
        """The send buffer; the status."""
        self.send_pages = self.take_pages(pages)
        self.send_gpadl = self.loop.client.post_gpadl(self.channel.relid, self.send_pages)
        self.loop.run()
        kind = nvsp.NVSP_MSG1_TYPE_SEND_SEND_BUF
        answer = self.ask(nvsp.send_buf.pack(kind, self.send_gpadl, 0) + bytes(30))
        return int(nvsp.send_buf_complete.unpack(answer)[1])

    def take_pages(self, count: int) -> list[int]:
        """Pages of the guest's."""
        client = self.loop.client
        pages, client.free_pages = client.free_pages[:count], client.free_pages[count:]
        assert len(pages) == count, "the guest has no pages left"
        return pages

    def set_rsc(self, on: bool) -> int:
        """OFFLOAD_PARAMETERS as Linux sets them: the status."""
        params = bytearray(28)
        ndis.object_header.pack_into(params, 0, ndis.NDIS_OBJECT_TYPE_DEFAULT, 3, 28)
        params[22] = params[23] = 2 if on else 1
        return self.set(rndis.OID_TCP_OFFLOAD_PARAMETERS, bytes(params))

    # Packets.

    def post(
        self, payload: bytes, *, wants: bool = False, channel: GuestChannel | None = None, **options: Any
    ) -> int:
        """One packet, and whatever follows from it; its transaction id."""
        ident = self._next
        self._next += 1
        flags = VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED if wants else 0
        options.setdefault("kind", VM_PKT_DATA_INBAND)
        payload = payload.ljust(nvsp.MESSAGE_BYTES, b"\0")
        assert (channel or self.channel).opened.send(payload, trans_id=ident, flags=flags, **options)
        self.loop.run()
        return ident

    def ask(self, payload: bytes) -> bytes:
        """What completes a message. AssertionError if nothing does."""
        ident = self.post(payload, wants=True)
        found = [data for one, data in self.completions if one == ident]
        assert len(found) == 1, f"{len(found)} completions of {payload[:16].hex()}"
        return found[0]

    def rndis(self, channel_type: int, index: int, size: int) -> bytes:
        """An RNDIS packet's NVSP message."""
        return nvsp.rndis_pkt.pack(nvsp.NVSP_MSG1_TYPE_SEND_RNDIS_PKT, channel_type, index, size)

    def put(self, data: bytes, *, at: int = 0, pages: Sequence[int] | None = None) -> list[GpaRange]:
        """Lay bytes into pages of the guest, `at` bytes into the first: one range a page, as Linux has it."""
        count = (at + len(data) + PAGE - 1) // PAGE
        pages = self.take_pages(count) if pages is None else pages
        ranges = []
        for pfn in pages:
            part, data = data[: PAGE - at], data[PAGE - at :]
            self.loop.memory.write(pfn * PAGE + at, part)
            ranges.append(GpaRange(len(part), at, (pfn,)))
            at = 0
        return ranges

    def send_pages_of(self, data: bytes, *, channel_type: int = nvsp.RMC_DATA, at: int = 0) -> int:
        """RNDIS messages by a page list."""
        ranges = self.put(data, at=at)
        ident = self.post(
            self.rndis(channel_type, nvsp.NETVSC_INVALID_INDEX, 0),
            wants=True,
            kind=VM_PKT_DATA_USING_GPA_DIRECT,
            header=gpa_direct_header(ranges),
        )
        self.loop.client.free_pages += [one.pfns[0] for one in ranges]
        return ident

    def lay(self, index: int, data: bytes) -> None:
        """Lay bytes into a section of the send buffer."""
        at = index * 6144
        for offset in range(0, len(data), 512):
            part = data[offset : offset + 512]
            page, inside = divmod(at + offset, PAGE)
            first = part[: PAGE - inside]
            self.loop.memory.write(self.send_pages[page] * PAGE + inside, first)
            if len(first) < len(part):
                self.loop.memory.write(self.send_pages[page + 1] * PAGE, part[len(first) :])

    def send_section(
        self,
        index: int,
        data: bytes,
        rest: Sequence[GpaRange] = (),
        *,
        channel: GuestChannel | None = None,
    ) -> int:
        """RNDIS messages by a section of the send buffer, and what goes on in pages."""
        self.lay(index, data)
        message = self.rndis(nvsp.RMC_DATA, index, len(data))
        if not rest:
            return self.post(message, wants=True, channel=channel)
        header = gpa_direct_header(list(rest))
        return self.post(message, wants=True, kind=VM_PKT_DATA_USING_GPA_DIRECT, header=header)

    def control(self, message: bytes) -> bytes:
        """The answer to an RNDIS control message; empty for none."""
        before = len(self.answers)
        self.send_pages_of(message, channel_type=nvsp.RMC_CONTROL)
        assert len(self.answers) <= before + 1
        return self.answers[-1] if len(self.answers) > before else b""

    def query(self, oid: int, data: bytes = b"") -> bytes | None:
        """What a query answers, as Linux reads it; None if it is refused."""
        head = rndis.request.pack(rndis.RNDIS_MSG_QUERY, 28 + len(data), 7, oid, len(data), 20, 0)
        answer = self.control(head + data)
        kind, _length, ident, status, size, offset = rndis.query_complete.unpack_from(answer)
        assert (kind, ident) == (rndis.RNDIS_MSG_QUERY | rndis.RNDIS_MSG_COMPLETION, 7)
        return answer[8 + offset : 8 + offset + size] if not status and offset >= 16 else None

    def set(self, oid: int, data: bytes) -> int:
        """The status of a set."""
        head = rndis.request.pack(rndis.RNDIS_MSG_SET, 28 + len(data), 9, oid, len(data), 20, 0)
        kind, _length, ident, status = rndis.complete.unpack(self.control(head + data))
        assert (kind, ident) == (rndis.RNDIS_MSG_SET | rndis.RNDIS_MSG_COMPLETION, 9)
        return int(status)

    # What comes.

    def take(self, channel: GuestChannel) -> None:
        """Take what is in a channel's ring."""
        if channel.io is not None:
            channel.io.drain(lambda packet: self._taken(channel, packet))

    def _taken(self, channel: GuestChannel, packet: Packet) -> None:
        if packet.type == VM_PKT_COMP:
            self.completions.append((packet.trans_id, packet.payload))
            self.completed_on[packet.trans_id] = channel
        elif packet.type == VM_PKT_DATA_USING_XFER_PAGES:
            self._transfer(channel, packet)
        else:
            self.inband.append(packet.payload)

    def _transfer(self, channel: GuestChannel, packet: Packet) -> None:
        size = len(self.receive_pages) * PAGE
        ranges = parse_transfer_pages(packet, RECEIVE_SET, size)
        assert ranges is not None, "transfer pages outside the receive buffer"
        assert packet.wants_completion
        self.transfers += 1
        for length, offset in ranges:
            assert length <= self.section
            data = self._receive_bytes(offset, length)
            self._message(channel, data, packet.payload[4])
        if self.complete:
            self.complete_one(channel, packet.trans_id)
        else:
            self.held.append((channel, packet.trans_id))

    def complete_one(self, channel: GuestChannel, trans_id: int) -> None:
        """Give a transfer back."""
        payload = nvsp.rndis_pkt_complete.pack(
            nvsp.NVSP_MSG1_TYPE_SEND_RNDIS_PKT_COMPLETE, nvsp.NVSP_STAT_SUCCESS
        )
        assert channel.opened.send(payload, kind=VM_PKT_COMP, trans_id=trans_id)

    def complete_all(self) -> None:
        """Give back what is held, and let happen what follows."""
        held, self.held = self.held, []
        for channel, trans_id in held:
            self.complete_one(channel, trans_id)
        self.loop.run()

    def _receive_bytes(self, offset: int, length: int) -> bytes:
        parts = []
        while length:
            page, at = divmod(offset, PAGE)
            n = min(length, PAGE - at)
            parts.append(self.loop.memory.read(self.receive_pages[page] * PAGE + at, n))
            offset += n
            length -= n
        return b"".join(parts)

    def _message(self, channel: GuestChannel, data: bytes, channel_type: int) -> None:
        kind, length = rndis.header.unpack_from(data)
        if not self.strict and (
            length != len(data) or (kind == rndis.RNDIS_MSG_PACKET) == bool(channel_type)
        ):
            return
        assert length == len(data), "one RNDIS message a range"
        if kind == rndis.RNDIS_MSG_PACKET:
            assert channel_type == nvsp.RMC_DATA
            parsed = rndis.parse_packet(data, 0, length)
            assert parsed is not None
            frame = data[parsed.offset : parsed.offset + parsed.length]
            self.received.append((frame, parsed.info))
            self.came.append((channel.offer["sub_channel_index"], frame))
        elif kind == rndis.RNDIS_MSG_INDICATE:
            self.indications.append(rndis.indicate.unpack_from(data)[2])
        else:
            assert channel_type == nvsp.RMC_CONTROL
            self.answers.append(data)
