"""Checksums and segmentation both ways, against the packets' own arithmetic."""

from __future__ import annotations

import struct
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from hvkvm.abi import nvsp, rndis
from hvkvm.abi.ring import VM_PKT_DATA_INBAND, Packet
from hvkvm.abi.virtio_net_hdr import (
    VIRTIO_NET_HDR_F_DATA_VALID,
    VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6,
    VIRTIO_NET_HDR_GSO_UDP,
    VnetHeader,
    parse,
)
from hvkvm.devices.synth.netvsp_rss import Toeplitz, hash_input
from hvkvm.net.checksum import checksum, transport_checksum
from hvkvm.net.segment import finish
from hvkvm.testing.netvsc_driver import data_message

Make = Callable[..., Any]
OURS, PEER = bytes.fromhex("020304050607"), bytes.fromhex("020000000001")
V4 = bytes([10, 0, 0, 1, 10, 0, 0, 2])
V6 = bytes(range(32))


def packet(
    version: int, protocol: int, payload: bytes, *, linux_lso: bool = False, vlan: int | None = None
) -> bytes:
    """A whole frame with right checksums; with `linux_lso` as Linux hands one to be segmented."""
    if protocol == 6:
        l4 = struct.pack(">HHIIBBHHH", 1000, 2000, 1, 2, 0x50, 0x18, 512, 0, 0) + payload
        field = 16
    else:
        l4 = struct.pack(">HHHH", 1000, 2000, 8 + len(payload), 0) + payload
        field = 6
    addresses = V4 if version == 4 else V6
    total = transport_checksum(addresses, protocol, l4)
    if linux_lso:
        total = 0xFFFF - checksum(addresses + struct.pack(">HH", 0, protocol))
    l4 = l4[:field] + struct.pack(">H", total) + l4[field + 2 :]
    if version == 4:
        length = 0 if linux_lso else 20 + len(l4)
        head = struct.pack(">BBHHHBBH", 0x45, 0, length, 7, 0x4000, 64, protocol, 0) + V4
        if not linux_lso:
            head = head[:10] + struct.pack(">H", checksum(head)) + head[12:]
        kind = 0x0800
    else:
        head = struct.pack(">IHBB", 0x60000000, 0 if linux_lso else len(l4), protocol, 64) + V6
        kind = 0x86DD
    tag = b"" if vlan is None else struct.pack(">HH", 0x8100, vlan)
    return OURS + PEER + tag + struct.pack(">H", kind) + head + l4


def spoil(frame: bytes, field: int, value: bytes = b"\xde\xad") -> bytes:
    return frame[:field] + value + frame[field + 2 :]


@pytest.mark.parametrize("vlan", [None, 5])
@pytest.mark.parametrize("protocol", [6, 17])
@pytest.mark.parametrize("version", [4, 6])
def test_a_checksum_that_a_guest_leaves_is_right_once_the_wire_makes_it(
    lan: Make, version: int, protocol: int, vlan: int | None
) -> None:
    net = lan()
    driver = net.driver.start()
    whole = packet(version, protocol, bytes(range(250)) + b"odd")
    l4 = 14 + (20 if version == 4 else 40)
    left = spoil(whole, l4 + (16 if protocol == 6 else 6))
    if version == 4:
        left = spoil(left, 24)  # the IP header's
    marks = rndis.CSUM_TX_IPV4 | rndis.CSUM_TX_IP_HEADER if version == 4 else rndis.CSUM_TX_IPV6
    marks |= (rndis.CSUM_TX_TCP if protocol == 6 else rndis.CSUM_TX_UDP) | l4 << 16
    infos = [(rndis.TCPIP_CHKSUM_PKTINFO, marks)]
    if vlan is not None:
        infos.append((rndis.IEEE_8021Q_INFO, 3 | vlan << 4))
        whole = packet(version, protocol, bytes(range(250)) + b"odd", vlan=3 << 13 | vlan)
    for send in (driver.send_pages_of, lambda data: driver.send_section(1, data)):
        send(data_message(left, infos))
    assert len(net.port.sent) == 2
    for vnet, frame in net.port.sent:
        assert parse(vnet).flags == VIRTIO_NET_HDR_F_NEEDS_CSUM
        assert finish(parse(vnet), frame) == [whole]


@pytest.mark.parametrize("vlan", [None, 9])
@pytest.mark.parametrize("version", [4, 6])
def test_a_large_send_of_linux_is_made_whole_for_virtio(lan: Make, version: int, vlan: int | None) -> None:
    net = lan()
    driver = net.driver.start()
    payload = bytes(n * 7 % 251 for n in range(50_001))
    frame = packet(version, 6, payload, linux_lso=True)
    lso = 1448 | (14 + (20 if version == 4 else 40)) << 20 | rndis.LSO_TYPE_V2 | (version == 6) << 31
    infos = [(rndis.TCP_LARGESEND_PKTINFO, lso)] + (
        [] if vlan is None else [(rndis.IEEE_8021Q_INFO, vlan << 4)]
    )
    driver.send_pages_of(data_message(frame, infos), at=3000)
    ((vnet, sent),) = net.port.sent
    header = parse(vnet)
    assert header.gso_type == (VIRTIO_NET_HDR_GSO_TCPV4 if version == 4 else VIRTIO_NET_HDR_GSO_TCPV6)
    assert header.gso_size == 1448
    l4 = 14 + 4 * (vlan is not None) + (20 if version == 4 else 40)
    whole = packet(version, 6, payload, vlan=vlan)
    assert spoil(sent, l4 + 16) == spoil(whole, l4 + 16)  # all but the sum that the wire completes
    segments = finish(header, sent)
    assert b"".join(one[l4 + 20 :] for one in segments) == payload
    assert len(segments) == -(-len(payload) // 1448)
    for one in segments:
        assert transport_checksum(
            V4 if version == 4 else V6, 6, spoil(one[l4:], 16, b"\0\0")
        ) == int.from_bytes(one[l4 + 16 : l4 + 18], "big")


def test_marks_that_cannot_be_are_dropped_and_completed(lan: Make) -> None:
    net = lan()
    driver = net.driver.start()
    tcp, csum, lso = packet(4, 6, b"x" * 100), rndis.TCPIP_CHKSUM_PKTINFO, rndis.TCP_LARGESEND_PKTINFO
    bad: list[tuple[bytes, list[tuple[int, int]]]] = [
        (tcp, [(lso, rndis.LSO_TYPE_V2)]),  # no segment size
        (tcp, [(lso, 100)]),  # the older kind
        (tcp, [(lso, 100 | rndis.LSO_TYPE_V2 | rndis.LSO_IPV6)]),  # the other family
        (packet(4, 17, b"x" * 100), [(lso, 100 | rndis.LSO_TYPE_V2)]),
        (tcp[:30], [(csum, rndis.CSUM_TX_TCP)]),
        (spoil(tcp, 16, b"\xff\xff"), [(csum, rndis.CSUM_TX_TCP)]),  # longer than its frame
        (spoil(tcp, 20, b"\x20\x00"), [(csum, rndis.CSUM_TX_TCP)]),  # a fragment
        (spoil(tcp, 14, b"\x4f\x00"), [(csum, rndis.CSUM_TX_UDP)]),
        (bytes(12) + b"\x88\xb5" + bytes(50), [(csum, rndis.CSUM_TX_TCP)]),
        (bytes(1600), []),  # longer than the wire's MTU
        (bytes(10), []),
    ]
    idents = [driver.send_pages_of(data_message(frame, infos)) for frame, infos in bad]
    assert net.port.sent == []
    assert net.nic.send.counters.dropped == len(bad)
    assert [one for one, _ in driver.completions if one in idents] == idents
    assert net.complaints == {}


@pytest.mark.parametrize("rsc", [False, True])
@pytest.mark.parametrize("protocol", [6, 17])
def test_a_checksum_that_the_wire_leaves_is_right_for_the_guest(lan: Make, protocol: int, rsc: bool) -> None:
    net = lan()
    net.driver.start(rsc=rsc)
    whole = packet(4, protocol, b"some bytes")
    field = 16 if protocol == 6 else 6
    l4 = whole[34 : 34 + field] + b"\0\0" + whole[36 + field :]
    pseudo = 0xFFFF - checksum(V4 + struct.pack(">HH", len(l4), protocol))
    header = VnetHeader(VIRTIO_NET_HDR_F_NEEDS_CSUM, csum_start=34, csum_offset=field)
    ((got, marks),) = net.inject(spoil(whole, 34 + field, struct.pack(">H", pseudo)), header=header.pack())
    assert got == whole
    good = rndis.CSUM_RX_TCP_SUCCEEDED if protocol == 6 else rndis.CSUM_RX_UDP_SUCCEEDED
    assert marks == {rndis.TCPIP_CHKSUM_PKTINFO: good | rndis.CSUM_RX_IP_SUCCEEDED}
    valid = VnetHeader(VIRTIO_NET_HDR_F_DATA_VALID).pack()
    ((got, marks),) = net.inject(whole, header=valid)
    assert got == whole
    assert marks[rndis.TCPIP_CHKSUM_PKTINFO] & good
    assert net.inject(whole) == [(whole, {})]


def test_a_packet_longer_than_a_segment_comes_in_one_piece_if_the_guest_takes_it(lan: Make) -> None:
    net = lan()
    driver = net.driver.start(rsc=True, receive_pages=800)
    assert net.port.wanted[-1] == (True, True, True)
    large = packet(4, 6, bytes(60_000))
    header = VnetHeader(VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4, 54, 1448, 34, 16).pack()
    ((got, marks),) = net.inject(large, header=header)
    assert got == large
    assert marks
    assert net.nic.receive.counters.large == 1
    udp = VnetHeader(VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_UDP, 42, 1448, 34, 6).pack()
    assert net.inject(large, header=udp) == []
    driver.set_rsc(False)
    assert net.port.wanted[-1] == (False, False, False)
    assert net.inject(large, header=header) == []
    assert net.nic.receive.counters.too_long == 2


def test_a_tag_is_a_mark_both_ways(lan: Make) -> None:
    net = lan()
    net.driver.start()
    ((got, marks),) = net.inject(packet(4, 17, b"tagged", vlan=0xB005))
    assert got == packet(4, 17, b"tagged")
    assert marks == {rndis.IEEE_8021Q_INFO: 5 | 1 << 3 | 5 << 4}


def test_the_hash_is_the_one_that_is_published() -> None:
    # The verification suite of "Verifying the RSS Hash Calculation", Microsoft.
    key = bytes.fromhex("6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa")
    toeplitz = Toeplitz(key)
    four = bytes([66, 9, 149, 187, 161, 142, 100, 80]) + struct.pack(">HH", 2794, 1766)
    assert toeplitz.hash(four) == 0x51CCC178
    assert toeplitz.hash(four[:8]) == 0x323E8FC2
    six = bytes.fromhex("3ffe250102001fff0000000000000007") + bytes.fromhex(
        "3ffe2501020000030000000000000001"
    )
    assert toeplitz.hash(six + struct.pack(">HH", 2794, 1766)) == 0x40207D3D
    assert toeplitz.hash(six) == 0x2CC18CD5
    frame = packet(4, 6, b"")
    assert hash_input(frame) == V4 + struct.pack(">HH", 1000, 2000)
    assert hash_input(packet(6, 17, b"")) == V6 + struct.pack(">HH", 1000, 2000)
    assert hash_input(spoil(frame, 20, b"\x00\x07")) == V4
    assert hash_input(bytes(60)) == b""


def test_the_short_way_is_the_long_one(lan: Make) -> None:
    """A message as most are makes the same frame on either way, whatever is wrong with it."""
    net = lan()
    driver = net.driver.start()
    send, random, quick = net.nic.send, Random(12), 0
    for _ in range(3000):
        body = packet(
            random.choice([4, 6]), random.choice([6, 17]), random.randbytes(random.choice([0, 9, 900]))
        )
        csum = random.choice([rndis.CSUM_TX_TCP, rndis.CSUM_TX_UDP]) | rndis.CSUM_TX_IPV4
        marks = [(rndis.TCPIP_CHKSUM_PKTINFO, csum)] * random.choice([0, 1, 1])
        marks += [(rndis.NBL_HASH_VALUE, 5)] * random.choice([0, 0, 1])
        data = bytearray(data_message(body, marks, pad=random.choice([0, 0, 4])))
        for _ in range(random.choice([0, 0, 1, 3])):
            at = random.randrange(0, min(len(data), 140))
            data[at] = random.choice([0, 1, 4, 12, 16, 36, 44, 60, 0x20, 255, random.randrange(256)])
        driver.lay(0, bytes(data))
        size = random.choice([len(data)] * 9 + [len(data) - 1])
        payload = driver.rndis(nvsp.RMC_DATA, 0, size)
        packed = Packet(VM_PKT_DATA_INBAND, 1, 1, b"", payload)
        short = send.quick(packed)
        if short is not None:
            found = send.bytes_of(packed)
            assert not isinstance(found, str)
            long = send.frames_of(*found)
            assert not isinstance(long, str)
            assert [b"".join(one) for one in long] == [b"".join(short)]
            assert long[0][0] == short[0]
            quick += 1
    assert quick > 1000
