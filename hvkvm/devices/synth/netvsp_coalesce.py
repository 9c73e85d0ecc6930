"""TCP packets of one stream that came one behind the other, made one packet (receive segment coalescing).

Why: a packet costs us and the guest the same whether it holds 1 KiB or 64 KiB. Linux's TCP sends short ones
while a connection is slow, so that it stays slow. What is joined differs in nothing but sequence number,
length, PSH, checksums and IP identification, as Linux's GRO has it, and for each the wire vouches. PSH ends
no packet: Linux sets it in all that it leaves to a NIC to cut, and nothing waits here for more to come.
Bytes are not copied, but for the first packet's headers.

Owner: the I/O loop. Nothing here raises for what a frame holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hvkvm.abi.virtio_net_hdr import (
    VIRTIO_NET_HDR_F_DATA_VALID,
    VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6,
    VnetHeader,
)
from hvkvm.net.checksum import checksum
from hvkvm.net.port import ETHERNET_BYTES, Frame

MAX_PACKET_BYTES = 65535
"""Of an IP packet."""
_LOOK = 14 + 40 + 60
"""Ethernet, IPv6 and the longest TCP header."""
_COPIED = 128
"""The first packet's bytes that are copied, for its headers are changed."""
_VOUCHED = VIRTIO_NET_HDR_F_NEEDS_CSUM | VIRTIO_NET_HDR_F_DATA_VALID
_IPV4, _IPV6 = b"\x08\x00", b"\x86\xdd"
_TCP = 6
_ACK, _PSH = 0x10, 0x08
_CHECKSUM_OFFSET = 16


class _Part(NamedTuple):
    """A TCP packet that may be joined with others: what they must share, and where its data begins.

    `key` is its headers as a number, without the bits that `mask` has not.
    """

    key: int
    mask: int
    transport: int
    data: int
    size: int
    sequence: int
    push: int


def coalesced(
    frames: Sequence[Frame], *, four: bool, six: bool, most: int, longest: int
) -> tuple[list[Frame], list[int]]:
    """What the guest gets in place of `frames`, and of how many each was made.

    IPv4 is joined with `four`, IPv6 with `six`, up to `most` bytes a frame. A frame that is no large packet
    and longer than `longest` is left as it is.
    """
    made: list[Frame] = []
    counts: list[int] = []
    run: list[Frame] = []
    first: _Part | None = None
    following = size = push = 0
    for frame in frames:
        part = _part(frame, four, six, longest)
        if first is not None and part is not None:
            key, mask, _transport, data, whole, sequence, pushed = part
            if (
                key == first.key
                and mask == first.mask
                and sequence == following
                and size + whole - data <= most
            ):
                run.append(frame)
                size += whole - data
                following = (sequence + whole - data) & 0xFFFFFFFF
                push |= pushed
                continue
        if first is not None:
            made.append(_joined(run, first, size, push) if run[1:] else run[0])
            counts.append(len(run))
        first = part
        if part is None:
            made.append(frame)
            counts.append(1)
        else:
            run, size, push = [frame], part.size, part.push
            following = (part.sequence + size - part.data) & 0xFFFFFFFF
    if first is not None:
        made.append(_joined(run, first, size, push) if run[1:] else run[0])
        counts.append(len(run))
    return made, counts


def _part(frame: Frame, four: bool, six: bool, longest: int) -> _Part | None:
    header, first = frame[0], frame[1]
    if not header[0] & _VOUCHED:
        return None
    head = first[:_LOOK].tobytes()
    if len(head) < 54:
        return None
    kind = head[12:14]
    if kind == _IPV4:
        # No options, and no fragment; a header whose checksum is wrong must not become right.
        if not four or head[14] != 0x45 or head[23] != _TCP or head[20] & 0x3F or head[21]:
            return None
        if int.from_bytes(head[14:34], "big") % 0xFFFF:
            return None
        at, size = 34, ETHERNET_BYTES + (head[16] << 8 | head[17])
    elif kind == _IPV6:
        if not six or head[14] >> 4 != 6 or head[20] != _TCP or len(head) < 74:
            return None
        at, size = 54, ETHERNET_BYTES + 40 + (head[18] << 8 | head[19])
    else:
        return None
    data = at + (head[at + 12] >> 4) * 4
    flags = head[at + 13]
    if flags & ~_PSH != _ACK or not at + 20 <= data <= len(head) or size <= data:
        return None
    whole = len(first) if len(frame) == 2 else sum(map(len, frame[1:]))
    if whole != size or (not header[1] and size > longest):
        return None  # padded, say
    mask = _MASKS[at][data - at]
    key = int.from_bytes(head[:data], "big") & mask
    sequence = int.from_bytes(head[at + 4 : at + 8], "big")
    return _Part(key, mask, at, data, size, sequence, flags & _PSH)


def _mask(at: int, length: int) -> int:
    """The bits in which the headers of packets that are joined are the same, of a TCP header of `length`."""
    same = bytearray(b"\xff" * (at + length))
    # IPv4: total length, identification, checksum; IPv6: payload length. TCP: sequence number, PSH, checksum.
    for begin, end in ((16, 20), (24, 26)) if at == 34 else ((18, 20),):
        same[begin:end] = bytes(end - begin)
    same[at + 4 : at + 8] = bytes(4)
    same[at + 13] = 0xFF & ~_PSH
    same[at + 16 : at + 18] = b"\0\0"
    return int.from_bytes(same, "big")


_MASKS = {at: {length: _mask(at, length) for length in range(20, 61, 4)} for at in (34, 54)}


def _joined(run: Sequence[Frame], first: _Part, size: int, push: int) -> Frame:
    """One frame of `size` bytes: the first one's headers, and the data of all."""
    begin = run[0][1]
    head = bytearray(begin[:_COPIED])
    at = first.transport
    if at == 34:
        head[16:18] = (size - ETHERNET_BYTES).to_bytes(2, "big")
        head[24:26] = b"\0\0"
        head[24:26] = checksum(head[14:34]).to_bytes(2, "big")
        kind = VIRTIO_NET_HDR_GSO_TCPV4
    else:
        head[18:20] = (size - ETHERNET_BYTES - 40).to_bytes(2, "big")
        kind = VIRTIO_NET_HDR_GSO_TCPV6
    head[at + 13] |= push
    header = VnetHeader(
        VIRTIO_NET_HDR_F_NEEDS_CSUM, kind, first.data, first.size - first.data, at, _CHECKSUM_OFFSET
    )
    views = [memoryview(header.pack()), memoryview(head), begin[_COPIED:], *run[0][2:]]
    for frame in run[1:]:
        skip = first.data  # as long in all: the length of the header is part of the key
        for view in frame[1:]:
            views.append(view[skip:] if skip < len(view) else view[:0])
            skip = max(0, skip - len(view))
    return [view for view in views if len(view)]
