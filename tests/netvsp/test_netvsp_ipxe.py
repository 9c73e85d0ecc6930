"""What iPXE does to a bus and its NIC, message by message: VMBus 0.13 (and 1.1), NVSP 1, rings of one page.

By its sources (interface/hyperv/vmbus.c, drivers/net/netvsc.c, net/rndis.c). It polls: neither event flags
nor its half of the interrupt page are ever looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from hvkvm.abi import nvsp, rndis, vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.abi.ring import (
    VM_PKT_CANCEL_REQUEST,
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

Make = Callable[..., Any]
old = pytest.mark.parametrize("version", [vmbus.VERSION_WS2008, vmbus.VERSION_WIN7], ids=vmbus.version_text)
OURS, PEER = bytes.fromhex("020304050607"), bytes.fromhex("020000000001")
PAGE = 4096
PAGESET = 0xBEAD
RECEIVE_PAGES = 16
BASE_XID = 0x18AE0000
MOST_PACKET = 512
"""iPXE gives up a ring with a longer packet in it, all included."""
FILTER = (
    rndis.NDIS_PACKET_TYPE_DIRECTED | rndis.NDIS_PACKET_TYPE_ALL_MULTICAST | rndis.NDIS_PACKET_TYPE_BROADCAST
)


def frame(number: int, size: int = 100) -> bytes:
    return (OURS + PEER + b"\x88\xb5" + number.to_bytes(4, "little")).ljust(size, b"\x55")


class Ipxe:
    """The driver. What it asks is answered by the time it has polled."""

    def __init__(self, net: Any, version: int) -> None:
        self.net = net
        self.loop = net.loop
        self.client = net.loop.client
        self.version = version
        self.received: list[bytes] = []
        self.answers: list[bytes] = []
        self.completions: dict[int, bytes] = {}
        self.client.take_marks = list

    def contact(self, version: int) -> None:
        pages = {"monitor_page1": 0x5000, "monitor_page2": 0x6000}
        self.client.contact(version, interrupt_page=0x4000, **pages)
        self.loop.run()
        assert self.client.last(wire.VERSION_RESPONSE)["version_supported"]

    def unload(self) -> None:
        self.client.post(wire.UNLOAD)
        self.loop.run()
        assert self.client.messages[-1].kind.type == wire.UNLOAD_RESPONSE

    def probe(self) -> None:
        """Whether the host knows 3.0, then the oldest version that there is."""
        self.contact(vmbus.VERSION_WIN8_1)
        self.unload()
        self.contact(self.version)
        self.client.post(wire.REQUESTOFFERS)
        self.loop.run()
        self.channel = self.client.by_interface(nvsp.HV_NIC_GUID)
        assert not self.channel.offer["monitor_allocated"]

    def open(self) -> None:
        """The receive buffer is described before the channel is open."""
        self.pages = self.client.free_pages[:RECEIVE_PAGES]
        del self.client.free_pages[:RECEIVE_PAGES]
        self.gpadl = self.client.post_gpadl(self.channel.relid, self.pages)
        self.loop.run()
        assert self.client.last(wire.GPADL_CREATED)["status"] == 0
        self.loop.open(self.channel)
        self.channel.on_interrupt = lambda: None
        answer = self.ask(nvsp.init.pack(nvsp.NVSP_MSG_TYPE_INIT, 2, 2))
        assert nvsp.init_complete.unpack(answer)[3] == nvsp.NVSP_STAT_SUCCESS
        self.ask(nvsp.ndis_version.pack(nvsp.NVSP_MSG1_TYPE_SEND_NDIS_VER, 6, 1))
        lend = nvsp.send_buf.pack(nvsp.NVSP_MSG1_TYPE_SEND_RECV_BUF, self.gpadl, PAGESET)
        kind, status, count, *_ = nvsp.recv_buf_complete.unpack(self.ask(lend))
        assert (kind, status, count) == (nvsp.NVSP_MSG1_TYPE_SEND_RECV_BUF_COMPLETE, 1, 1)

    def start(self) -> None:
        """The NIC open, its address known, its filter set."""
        self.open()
        kind, _length, _id, status, *_ = rndis.initialize_complete.unpack(
            self.control(rndis.initialize.pack(rndis.RNDIS_MSG_INIT, 24, 1, 1, 0, 1514))
        )
        assert (kind, status) == (0x80000002, 0)
        query = rndis.request.pack(
            rndis.RNDIS_MSG_QUERY, 28, 2, rndis.RNDIS_OID_802_3_PERMANENT_ADDRESS, 0, 20, 0
        )
        answer = self.control(query)
        _kind, _length, _id, status, size, offset = rndis.query_complete.unpack_from(answer)
        assert (status, answer[8 + offset : 8 + offset + size]) == (0, OURS)
        self.set_filter(FILTER)

    def set_filter(self, value: int) -> None:
        oid = rndis.RNDIS_OID_GEN_CURRENT_PACKET_FILTER
        message = rndis.request.pack(rndis.RNDIS_MSG_SET, 32, 3, oid, 4, 20, 0)
        answer = rndis.complete.unpack(self.control(message + value.to_bytes(4, "little")))
        assert answer[3] == 0

    def stop(self, unacknowledged: int = 0) -> None:
        """Filter off, halt, revoke, cancel what it has not seen completed, close, tear down."""
        self.set_filter(0)
        self.transmit(rndis.header.pack(rndis.RNDIS_MSG_HALT, 12) + bytes(4), nvsp.RMC_CONTROL)
        self.ask(nvsp.revoke_buf.pack(nvsp.NVSP_MSG1_TYPE_REVOKE_RECV_BUF, PAGESET))
        for ident in range(unacknowledged):
            self.send(b"", kind=VM_PKT_CANCEL_REQUEST, trans_id=BASE_XID + ident)
        self.client.close(self.channel)
        self.loop.run()
        self.client.post(wire.GPADL_TEARDOWN, relid=self.channel.relid, gpadl=self.gpadl)
        self.loop.run()
        assert self.client.count(wire.GPADL_TORNDOWN) >= 2
        assert self.client.messages[-1]["gpadl"] == self.gpadl
        self.client.reclaim(self.channel)
        self.client.free_pages += self.pages

    # Packets.

    def send(self, payload: bytes, **options: Any) -> None:
        assert self.channel.opened.send(payload, **options)

    def ask(self, payload: bytes) -> bytes:
        """What completes a message, which always has 32 bytes."""
        ident = BASE_XID + 0x20 + len(self.completions)
        flags = VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED
        self.send(payload.ljust(32, b"\0"), kind=VM_PKT_DATA_INBAND, trans_id=ident, flags=flags)
        self.poll()
        return self.completions[ident]

    def transmit(self, message: bytes, channel_type: int = nvsp.RMC_DATA, *, ident: int = 0) -> None:
        """An RNDIS message in one range, wherever it lies, never by a send buffer."""
        pages = self.client.free_pages[:2]
        at = PAGE - 24
        self.loop.memory.write(pages[0] * PAGE + at, message[:24])
        self.loop.memory.write(pages[1] * PAGE, message[24:])
        used = pages[: 1 + (len(message) > 24)]
        self.send(
            nvsp.rndis_pkt.pack(
                nvsp.NVSP_MSG1_TYPE_SEND_RNDIS_PKT, channel_type, nvsp.NETVSC_INVALID_INDEX, 0
            )[:32],
            kind=VM_PKT_DATA_USING_GPA_DIRECT,
            trans_id=BASE_XID + ident,
            flags=VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED,
            header=gpa_direct_header([GpaRange(len(message), at, tuple(used))]),
        )
        self.poll()

    def control(self, message: bytes) -> bytes:
        before = len(self.answers)
        self.transmit(message, nvsp.RMC_CONTROL)
        assert len(self.answers) == before + 1
        return self.answers[-1]

    def transmit_frame(self, data: bytes, ident: int = 0) -> None:
        head = rndis.packet.pack(1, 44 + len(data), 36, len(data), 0, 0, 0, 0, 0, 0, 0)
        self.transmit(head + data, ident=ident)

    def poll(self) -> None:
        """Take what is in the ring, and let the host go on, until neither has more."""
        packets: list[Packet] = []
        self.loop.run()
        while self.channel.opened.drain(packets.append) or packets:
            for packet in packets:
                self._take(packet)
            packets.clear()
            self.loop.run()

    def _take(self, packet: Packet) -> None:
        size = 16 + len(packet.header) + len(packet.payload) + 8
        assert size <= MOST_PACKET
        if packet.type == VM_PKT_COMP:
            self.completions[packet.trans_id] = packet.payload
            return
        assert packet.type == VM_PKT_DATA_USING_XFER_PAGES, "iPXE knows no other control packets"
        assert len(packet.payload) >= 32
        ranges = parse_transfer_pages(packet, PAGESET, RECEIVE_PAGES * PAGE)
        assert ranges is not None
        assert len(ranges) == 1, "iPXE takes several in the wrong order"
        for length, offset in ranges:
            data = b"".join(self.loop.memory.read(pfn * PAGE, PAGE) for pfn in self.pages)
            self._message(data[offset : offset + length])
        self.send(b"", kind=VM_PKT_COMP, trans_id=packet.trans_id)

    def _message(self, data: bytes) -> None:
        kind, length = rndis.header.unpack_from(data)
        assert length == len(data)
        if kind == rndis.RNDIS_MSG_PACKET:
            at, size = rndis.packet.unpack_from(data)[2:4]
            self.received.append(data[8 + at : 8 + at + size])
        elif kind != rndis.RNDIS_MSG_INDICATE:
            self.answers.append(data)


@old
@pytest.mark.parametrize("random", [None, Random(3)], ids=["in order", "3"])
def test_all_that_ipxe_does_from_probe_to_boot(lan: Make, version: int, random: Random | None) -> None:
    """The NIC is opened to be looked at, closed, opened for the network, closed for the kernel."""
    net = lan(random=random)
    ipxe = Ipxe(net, version)
    ipxe.probe()
    for round_ in range(3):
        ipxe.start()
        for number in range(50):
            ipxe.transmit_frame(frame(number), number % 32)
            net.port.inject(frame(number), frame(number + 1, 1514))
            ipxe.poll()
        assert [data for _, data in net.port.sent] == [frame(number) for number in range(50)]
        wanted = [one for number in range(50) for one in (frame(number), frame(number + 1, 1514))]
        assert ipxe.received == wanted
        assert net.nic.receive.pieces.lent == 0
        net.port.sent.clear()
        ipxe.received.clear()
        ipxe.stop(unacknowledged=2 * round_)
    ipxe.unload()
    assert net.complaints == {}
    assert net.loop.synic.events == {}
    # The kernel that iPXE has started.
    net.loop.client.take_marks = list
    net.loop.connect(vmbus.VERSION_WIN10_V5_3)
    assert net.loop.client.by_interface(nvsp.HV_NIC_GUID)


@old
def test_a_kernel_finds_its_bus_though_ipxe_never_left(lan: Make, version: int) -> None:
    """iPXE is cut short with its NIC open, as by a reset of its SynIC: nothing of it is touched any more."""
    net = lan()
    ipxe = Ipxe(net, version)
    ipxe.probe()
    ipxe.start()
    net.loop.connect(vmbus.VERSION_WIN10_V5_3)
    for pfn in (4, *ipxe.pages):
        net.loop.memory.write(pfn * PAGE, b"\xa5" * PAGE)
    net.port.inject(frame(1))
    net.loop.run()
    for pfn in (4, *ipxe.pages):
        assert net.loop.memory.read(pfn * PAGE, PAGE) == b"\xa5" * PAGE
    assert net.complaints == {}
    ipxe = Ipxe(net, version)
    ipxe.probe()
    ipxe.start()


@old
def test_frames_burst_into_a_small_ring_and_buffer(lan: Make, version: int) -> None:
    """More than its ring, its buffer and a packet of 512 bytes hold, while iPXE does something else."""
    net = lan()
    ipxe = Ipxe(net, version)
    ipxe.probe()
    ipxe.start()
    burst = [frame(number, 60 + number % 1400) for number in range(600)]
    net.port.inject(*burst)
    net.loop.run()
    ipxe.poll()
    assert ipxe.received == burst
    assert net.complaints == {}


@old
def test_a_saved_nic_goes_on(lan: Make, version: int) -> None:
    net = lan()
    ipxe = Ipxe(net, version)
    ipxe.probe()
    ipxe.start()
    for number in range(6):
        ipxe.transmit_frame(frame(number))
        net.go_on_with_another()
        net.port.inject(frame(number), frame(number))
        ipxe.poll()
    assert ipxe.received == [frame(number // 2) for number in range(12)]
    assert len(net.port.sent) == 6
    ipxe.stop()
    ipxe.unload()
    assert net.complaints == {}
