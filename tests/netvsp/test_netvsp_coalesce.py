"""TCP packets that come one behind the other reach the guest as one, and nothing else does."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.abi.virtio_net_hdr import (
    PLAIN,
    VALID,
    VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_TCPV4,
    VnetHeader,
    parse,
)
from hvkvm.devices.synth.netvsp_coalesce import MAX_PACKET_BYTES, coalesced
from hvkvm.net.checksum import checksum

Make = Callable[..., Any]
OURS, PEER = bytes.fromhex("020304050607"), bytes.fromhex("020000000001")
ACK, PSH = 0x10, 0x08
STAMP = bytes.fromhex("0101080a0000000100000002")
MOST = MAX_PACKET_BYTES + 14


def tcp(
    version: int,
    sequence: int,
    data: bytes,
    *,
    flags: int = ACK,
    ack: int = 7,
    window: int = 512,
    port: int = 1000,
    options: bytes = STAMP,
    tos: int = 0,
    fragment: int = 0x4000,
) -> bytes:
    """A frame. Nobody looks at its TCP checksum: the wire vouches for it."""
    length = (20 + len(options)) // 4 << 4
    l4 = struct.pack(">HHIIBBHHH", port, 80, sequence & 0xFFFFFFFF, ack, length, flags, window, 0xBEEF, 0)
    l4 += options + data
    if version == 4:
        addresses = bytes([10, 0, 0, 1, 10, 0, 0, 2])
        head = struct.pack(">BBHHHBBH", 0x45, tos, 20 + len(l4), sequence & 0xFFFF, fragment, 64, 6, 0)
        head += addresses
        head = head[:10] + struct.pack(">H", checksum(head)) + head[12:]
        kind = 0x0800
    else:
        head = struct.pack(">IHBB", 6 << 28 | tos << 20, len(l4), 6, 64) + bytes(range(32))
        kind = 0x86DD
    return OURS + PEER + struct.pack(">H", kind) + head + l4


def joined(*frames: bytes, header: bytes = VALID, **options: Any) -> list[tuple[bytes, int]]:
    """What comes out, and of how many each was made."""
    settings: dict[str, Any] = {"four": True, "six": True, "most": MOST, "longest": 1518} | options
    made, counts = coalesced([(memoryview(header), memoryview(each)) for each in frames], **settings)
    assert all(len(view) for frame in made for view in frame)
    return [(b"".join(frame[1:]), count) for frame, count in zip(made, counts, strict=True)]


@pytest.mark.parametrize("version", [4, 6])
def test_a_stream_is_one_packet(version: int) -> None:
    start = 0xFFFFFF00  # sequence numbers begin anew
    parts = [bytes([n]) * (1000 + n) for n in range(20)]
    frames, at = [], start
    for n, part in enumerate(parts):
        frames.append(tcp(version, at, part, flags=ACK | PSH * (n == 19)))
        at += len(part)
    ((whole, count),) = joined(*frames)
    assert count == 20
    expected = bytearray(tcp(version, start, b"".join(parts), flags=ACK | PSH))
    assert whole == expected  # lengths and the IP header's checksum too


def test_it_is_told_as_a_large_packet() -> None:
    frames = [tcp(4, 0, bytes(1000)), tcp(4, 1000, bytes(10))]
    ((header, *_views),), _counts = coalesced(
        [(memoryview(VALID), memoryview(each)) for each in frames],
        four=True,
        six=False,
        most=MOST,
        longest=1518,
    )
    assert parse(header) == VnetHeader(
        VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4, 66, 1000, 34, 16
    )


@pytest.mark.parametrize("version", [4, 6])
def test_large_packets_are_joined_up_to_the_bound(version: int) -> None:
    large = VnetHeader(VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4, 66, 1448, 34, 16).pack()
    frames = [tcp(version, n * 30_000, bytes([n]) * 30_000, flags=ACK | PSH * (n == 2)) for n in range(5)]
    found = joined(*frames, header=large)
    assert found == [
        (tcp(version, 0, b"\0" * 30_000 + b"\1" * 30_000), 2),
        (tcp(version, 60_000, b"\2" * 30_000 + b"\3" * 30_000, flags=ACK | PSH), 2),
        (frames[4], 1),
    ]
    assert [count for _frame, count in joined(*frames, header=large, most=29_000)] == [1] * 5


A = tcp(4, 0, bytes(100))


@pytest.mark.parametrize(
    "second",
    [
        tcp(4, 101, bytes(100)),  # a gap
        tcp(4, 0, bytes(100)),  # again
        tcp(4, 100, bytes(100), ack=8),
        tcp(4, 100, bytes(100), window=511),
        tcp(4, 100, bytes(100), port=1001),
        tcp(4, 100, bytes(100), tos=2),  # congestion
        tcp(4, 100, bytes(100), options=STAMP[:-1] + b"\x03"),
        tcp(4, 100, bytes(100), options=b""),
        tcp(4, 100, b""),
        *(tcp(4, 100, bytes(100), flags=ACK | bit) for bit in (1, 2, 4, 0x20, 0x40, 0x80)),
        tcp(4, 100, bytes(100), fragment=0x2000),
        tcp(4, 100, bytes(100), fragment=5),
        tcp(4, 100, bytes(100))[:24] + b"\xde\xad" + tcp(4, 100, bytes(100))[26:],  # the header's checksum
        tcp(4, 100, bytes(100)) + b"pad",
        tcp(4, 100, bytes(100))[:-1],
        tcp(4, 100, bytes(1600)),  # longer than the guest's MTU
        tcp(6, 100, bytes(100)),
        OURS + PEER + b"\x81\0\0\x05" + tcp(4, 100, bytes(100))[12:],
        b"\xff" * 6 + tcp(4, 100, bytes(100))[6:],
    ],
)
def test_what_differs_stays_as_it_is(second: bytes) -> None:
    assert joined(A, second) == [(A, 1), (second, 1)]
    assert joined(second, A) == [(second, 1), (A, 1)]


def test_what_nobody_vouches_for_or_wants_stays_as_it_is() -> None:
    second = tcp(4, 100, bytes(100))
    assert [count for _frame, count in joined(A, second)] == [2]
    assert joined(A, second, header=PLAIN) == [(A, 1), (second, 1)]
    assert joined(A, second, four=False) == [(A, 1), (second, 1)]
    assert joined(A[:60], A[:20]) == [(A[:60], 1), (A[:20], 1)]


def test_a_push_is_kept_and_ends_nothing() -> None:
    frames = [tcp(4, n * 100, bytes(100), flags=ACK | PSH * (n == 1)) for n in range(4)]
    assert joined(*frames) == [(tcp(4, 0, bytes(400), flags=ACK | PSH), 4)]


CHOICES = [tcp(version, n * 100, bytes([n]) * 100) for n in range(6) for version in (4, 6)]


@given(st.lists(st.sampled_from(CHOICES), max_size=20))
def test_no_byte_is_lost_or_made(frames: list[bytes]) -> None:
    found = joined(*frames)
    assert sum(count for _frame, count in found) == len(frames)

    def data(frame: bytes) -> bytes:
        return frame[66:] if frame[12] == 8 else frame[86:]

    assert b"".join(data(frame) for frame, _count in found) == b"".join(map(data, frames))


@given(st.lists(st.tuples(st.sampled_from(CHOICES), st.integers(0, 99), st.binary(max_size=4)), max_size=8))
def test_nothing_is_raised_for_any_bytes(spoilt: list[tuple[bytes, int, bytes]]) -> None:
    frames = [whole[:at] + bad + whole[at + len(bad) :] for whole, at, bad in spoilt]
    frames += [whole[: 14 + at] for whole, at, _bad in spoilt]
    assert sum(count for _frame, count in joined(*frames)) == len(frames)


def test_the_guest_gets_it_as_one_and_what_finds_no_room_comes_again(lan: Make) -> None:
    net = lan()
    driver = net.driver.start(rsc=True, receive_pages=800)
    frames = [tcp(4, n * 1000, bytes([n]) * 1000) for n in range(10)]
    ((got, marks),) = net.inject(*frames, header=VALID)
    assert got == tcp(4, 0, b"".join(bytes([n]) * 1000 for n in range(10)))
    assert marks
    assert net.nic.receive.counters.large == 1
    driver.complete = False
    sent = 0
    while not net.port.waiting:
        assert sent < 10_000
        net.inject(*frames, header=VALID)
        sent += 1
    driver.complete = True
    while driver.held:
        driver.complete_all()
        net.loop.run()
    assert not net.port.waiting
    assert sum(len(frame) - 66 for frame, _marks in driver.received) == 10_000 * (1 + sent)
