"""What an offload left undone, done here: checksums filled in, TCP packets cut into segments.

For wires that take whole frames only. A frame and its header are hostile: what lies gives no frame, and one
frame at most MAX_SEGMENTS. No state, no I/O.
"""

from __future__ import annotations

from struct import Struct

from hvkvm.abi import tcp as tcp_at
from hvkvm.abi.virtio_net_hdr import (
    VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6,
    VnetHeader,
)
from hvkvm.net.checksum import IPPROTO_TCP, checksum, transport_checksum
from hvkvm.net.port import ETHERNET_BYTES, VLAN_BYTES

MAX_SEGMENTS = 512
"""Of 65535 bytes with 128 a segment. Cutting one off costs some 5 us."""

_VLAN_TYPES = (b"\x81\x00", b"\x88\xa8")
_UDP_CHECKSUM_OFFSET = 6
_u16 = Struct(">H")
_u32 = Struct(">I")


def finish(header: VnetHeader, frame: bytes) -> list[bytes]:
    """The frames that `frame` is once what `header` leaves undone is done; none if the header lies."""
    kind = header.gso_type & ~VIRTIO_NET_HDR_GSO_ECN
    if kind == VIRTIO_NET_HDR_GSO_NONE:
        return _summed(header, frame) if header.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM else [frame]
    if kind == VIRTIO_NET_HDR_GSO_TCPV4:
        return _cut(header, frame, version=4)
    if kind == VIRTIO_NET_HDR_GSO_TCPV6:
        return _cut(header, frame, version=6)
    return []


def summed(start: int, offset: int, frame: bytearray) -> bytearray | None:
    """`frame` with the checksum of what begins at `start`, put `offset` bytes behind; None for a lie."""
    at = start + offset
    if start < ETHERNET_BYTES or at + 2 > len(frame):
        return None
    found = checksum(frame[start:])
    if found == 0 and offset == _UDP_CHECKSUM_OFFSET:
        found = 0xFFFF
    _u16.pack_into(frame, at, found)
    return frame


def _summed(header: VnetHeader, frame: bytes) -> list[bytes]:
    whole = summed(header.csum_start, header.csum_offset, bytearray(frame))
    return [] if whole is None else [bytes(whole)]


def _cut(header: VnetHeader, frame: bytes, version: int) -> list[bytes]:
    """TCP segments of at most `gso_size` bytes each."""
    ip = ETHERNET_BYTES
    if frame[ip - 2 : ip] in _VLAN_TYPES:
        ip += VLAN_BYTES
    tcp, size = header.csum_start, header.gso_size
    ip_bytes = 20 if version == 4 else 40
    if tcp < ip + ip_bytes or tcp + tcp_at.TCP_BYTES > len(frame) or frame[ip] >> 4 != version or not size:
        return []
    if version == 4 and (tcp != ip + (frame[ip] & 0xF) * 4 or frame[ip + 9] != IPPROTO_TCP):
        return []
    data = tcp + (frame[tcp + tcp_at.DATA_OFFSET] >> 4) * 4
    if data < tcp + tcp_at.TCP_BYTES or data > len(frame) or len(frame) - data > size * MAX_SEGMENTS:
        return []

    addresses = frame[ip + 12 : ip + 20] if version == 4 else frame[ip + 8 : ip + 40]
    front, transport, payload = bytearray(frame[:tcp]), bytearray(frame[tcp:data]), memoryview(frame)[data:]
    flags = transport[tcp_at.FLAGS]
    (sequence,) = _u32.unpack_from(transport, tcp_at.SEQUENCE)
    (identity,) = _u16.unpack_from(front, ip + 4)
    transport[tcp_at.CHECKSUM : tcp_at.CHECKSUM + 2] = bytes(2)

    segments = []
    for number, at in enumerate(range(0, len(payload) or 1, size)):
        part = payload[at : at + size]
        last = at + size >= len(payload)
        transport[tcp_at.FLAGS] = (
            flags & ~(0 if last else tcp_at.FIN | tcp_at.PSH) & ~(tcp_at.CWR if number else 0)
        )
        _u32.pack_into(transport, tcp_at.SEQUENCE, (sequence + at) & 0xFFFFFFFF)
        packet = transport + part
        _u16.pack_into(packet, tcp_at.CHECKSUM, transport_checksum(addresses, IPPROTO_TCP, packet))
        if version == 4:
            _u16.pack_into(front, ip + 2, tcp - ip + len(packet))
            _u16.pack_into(front, ip + 4, (identity + number) & 0xFFFF)
            _u16.pack_into(front, ip + 10, 0)
            _u16.pack_into(front, ip + 10, checksum(front[ip:tcp]))
        else:
            _u16.pack_into(front, ip + 4, tcp - ip - 40 + len(packet))
        segments.append(bytes(front + packet))
    return segments
