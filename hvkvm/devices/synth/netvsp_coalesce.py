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
from struct import Struct

from hvkvm.abi.tcp import ACK, IPPROTO_TCP, PSH
from hvkvm.abi.virtio_net_hdr import (
    VIRTIO_NET_HDR_F_DATA_VALID,
    VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6,
    virtio_net_hdr_v1,
)
from hvkvm.net.port import ETHERNET_BYTES, Frame
from hvkvm.tuples import NamedTuple

MAX_PACKET_BYTES = 65535
"""Of an IP packet."""
_LOOK = 14 + 40 + 60
"""Ethernet, IPv6 and the longest TCP header."""
_COPIED = 128
"""The first packet's bytes that are copied, for its headers are changed."""
_VOUCHED = VIRTIO_NET_HDR_F_NEEDS_CSUM | VIRTIO_NET_HDR_F_DATA_VALID
_IPV4, _IPV6 = b"\x08\x00", b"\x86\xdd"
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
    summed: int | None
    """What length, identification and checksum of an IPv4 header that is right add up to, modulo 0xFFFF."""


def coalesced(
    frames: Sequence[Frame], *, four: bool, six: bool, most: int, longest: int
) -> tuple[list[Frame], list[int]]:
    """What the guest gets in place of `frames`, and of how many each was made.

    IPv4 is joined with `four`, IPv6 with `six`, up to `most` bytes a frame. A frame that is no large packet
    and longer than `longest` is left as it is.
    """
    made: list[Frame] = []
    counts: list[int] = []
    opening: Frame = ()
    rest: list[memoryview] = []  # the data of the packets behind the opening one
    first: _Part | None = None  # the packet with which the stream began that may go on
    key = mask = data = outside = count = following = segment = size = push = 0
    summed: int | None = None
    fields = _FIELDS[34]
    for frame in frames:
        # Most packets of a fast stream go on with the one before, which takes few looks to see.
        if first is not None and len(frame) == 2 and frame[0][0] & _VOUCHED:
            view = frame[1]
            whole = len(view)
            if data < whole and (whole <= longest or frame[0][1]):
                head = view[:data].tobytes()
                length, one, other, sequence, flags = fields.unpack_from(head)
                if (
                    sequence == following
                    and whole == outside + length
                    and int.from_bytes(head, "big") & mask == key
                    and (summed is None or (length + one + other) % 0xFFFF == summed)
                ):
                    following = (sequence + whole - data) & 0xFFFFFFFF
                    if size + whole - data <= most:
                        rest.append(view[data:])
                        count += 1
                        size += whole - data
                        push |= flags & PSH
                        continue
                    made.append(_joined(opening, rest, first, segment, size, push) if rest else opening)
                    counts.append(count)
                    opening, rest, count = frame, [], 1
                    segment, size, push = whole - data, whole, flags & PSH
                    continue
        part = _part(frame, four, six, longest)
        if first is not None:
            follows = part is not None and part[:4] == first[:4] and part.sequence == following
            if part is not None and follows and size + part.size - data <= most:
                rest += _behind(frame, data)
                count += 1
                size += part.size - data
                following = (following + part.size - data) & 0xFFFFFFFF
                push |= part.push
                continue
            made.append(_joined(opening, rest, first, segment, size, push) if rest else opening)
            counts.append(count)
        first = part
        if part is None:
            made.append(frame)
            counts.append(1)
        else:
            key, mask, transport, data, size, sequence, push, summed = part
            opening, rest, count = frame, [], 1
            fields, outside, segment = _FIELDS[transport], _OUTSIDE[transport], size - data
            following = (sequence + size - data) & 0xFFFFFFFF
    if first is not None:
        made.append(_joined(opening, rest, first, segment, size, push) if rest else opening)
        counts.append(count)
    return made, counts


def _part(frame: Frame, four: bool, six: bool, longest: int) -> _Part | None:
    header, first = frame[0], frame[1]
    if not header[0] & _VOUCHED:
        return None
    head = first[:_LOOK].tobytes()
    if len(head) < 54:
        return None
    kind = head[12:14]
    summed = None
    if kind == _IPV4:
        # No options, and no fragment; a header whose checksum is wrong must not become right.
        if not four or head[14] != 0x45 or head[23] != IPPROTO_TCP or head[20] & 0x3F or head[21]:
            return None
        if int.from_bytes(head[14:34], "big") % 0xFFFF:
            return None
        at, size = 34, ETHERNET_BYTES + (head[16] << 8 | head[17])
        length, ident, check, _sequence, _flags = _FIELDS[34].unpack_from(head)
        summed = (length + ident + check) % 0xFFFF
    elif kind == _IPV6:
        if not six or head[14] >> 4 != 6 or head[20] != IPPROTO_TCP or len(head) < 74:
            return None
        at, size = 54, ETHERNET_BYTES + 40 + (head[18] << 8 | head[19])
    else:
        return None
    data = at + (head[at + 12] >> 4) * 4
    flags = head[at + 13]
    if flags & ~PSH != ACK or not at + 20 <= data <= len(head) or size <= data:
        return None
    whole = len(first) if len(frame) == 2 else sum(map(len, frame[1:]))
    if whole != size or (not header[1] and size > longest):
        return None  # padded, say
    mask = _MASKS[at][data - at]
    key = int.from_bytes(head[:data], "big") & mask
    sequence = int.from_bytes(head[at + 4 : at + 8], "big")
    return _Part(key, mask, at, data, size, sequence, flags & PSH, summed)


def _mask(at: int, length: int) -> int:
    """The bits in which the headers of packets that are joined are the same, of a TCP header of `length`."""
    same = bytearray(b"\xff" * (at + length))
    # IPv4: total length, identification, checksum; IPv6: payload length. TCP: sequence number, PSH, checksum.
    for begin, end in ((16, 20), (24, 26)) if at == 34 else ((18, 20),):
        same[begin:end] = bytes(end - begin)
    same[at + 4 : at + 8] = bytes(4)
    same[at + 13] = 0xFF & ~PSH
    same[at + 16 : at + 18] = b"\0\0"
    return int.from_bytes(same, "big")


_MASKS = {at: {length: _mask(at, length) for length in range(20, 61, 4)} for at in (34, 54)}


_FIELDS = {34: Struct(">16xHH4xH12xI5xB"), 54: Struct(">18xHBB36xI5xB")}
"""IP length, two words that are IPv4's identification and checksum, sequence number, flags."""
_OUTSIDE = {34: ETHERNET_BYTES, 54: ETHERNET_BYTES + 40}
"""The bytes of a frame that its IP length does not count."""
_be16 = Struct(">H")


def _behind(frame: Frame, skip: int) -> list[memoryview]:
    """A frame without its first `skip` bytes."""
    views = []
    for view in frame[1:]:
        if skip < len(view):
            views.append(view[skip:])
        skip = max(0, skip - len(view))
    return views


def _joined(
    opening: Frame, rest: list[memoryview], first: _Part, segment: int, size: int, push: int
) -> Frame:
    """One frame of `size` bytes: the opening one, with `segment` bytes of data, and the data behind it."""
    begin = opening[1]
    head = bytearray(begin[:_COPIED])
    at = first.transport
    if first.summed is not None:
        length = size - ETHERNET_BYTES
        _be16.pack_into(head, 16, length)
        # What a checksum is made of, but for these, is the same for all packets of the stream.
        _be16.pack_into(head, 24, (first.summed - length - (head[18] << 8 | head[19])) % 0xFFFF)
        kind = VIRTIO_NET_HDR_GSO_TCPV4
    else:
        _be16.pack_into(head, 18, size - ETHERNET_BYTES - 40)
        kind = VIRTIO_NET_HDR_GSO_TCPV6
    head[at + 13] |= push
    header = virtio_net_hdr_v1.pack(
        VIRTIO_NET_HDR_F_NEEDS_CSUM, kind, first.data, segment, at, _CHECKSUM_OFFSET, 0
    )
    views = [memoryview(header), memoryview(head)]
    if len(begin) > _COPIED:
        views.append(begin[_COPIED:])
    return [*views, *opening[2:], *rest]
