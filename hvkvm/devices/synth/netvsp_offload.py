"""What a frame leaves to others: from the marks of a guest's RNDIS packet to a vnet header, and back.

NDIS and virtio mean the same work by different words. A packet that Linux's hv_netvsc wants segmented has
IPv4's total length, its header checksum and IPv6's payload length 0, and a pseudo-header's sum without a
length (netvsc_xmit()); virtio wants all of them right. So they are made here from the addresses and the
frame's own length, whatever the guest has put there.

Everything is decided on a copy of the frame's first bytes, which is what goes out too. Pure; any thread.
Nothing here raises for what a frame holds.
"""

from __future__ import annotations

from struct import Struct

from hvkvm.abi import rndis
from hvkvm.abi.virtio_net_hdr import (
    PLAIN,
    VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6,
    virtio_net_hdr_v1,
)
from hvkvm.net.checksum import IPPROTO_TCP, IPPROTO_UDP, checksum
from hvkvm.net.port import ETHERNET_BYTES

ADDRESSES_BYTES = 12
"""Both MAC addresses: a VLAN tag goes behind them."""
ETH_P_IP = 0x0800
ETH_P_IPV6 = 0x86DD
ETH_P_8021Q = 0x8100
TCP_CHECKSUM, UDP_CHECKSUM = 16, 6
"""Where the checksum fields are in their headers."""
_TCP_BYTES, _UDP_BYTES = 20, 8
_IPV4_BYTES, _IPV6_BYTES = 20, 40
_TCP_CWR = 0x80
_be16 = Struct(">H")


def _put_pseudo_sum(front: bytearray, ip: int, version: int, protocol: int, length: int, field: int) -> None:
    """The sum of the pseudo-header, not complemented, into the checksum field at `field`."""
    addresses = front[ip + 12 : ip + 20] if version == 4 else front[ip + 8 : ip + 40]
    total = 0xFFFF - checksum(addresses) + protocol + (length >> 16) + (length & 0xFFFF)
    _be16.pack_into(front, field, (total - 1) % 0xFFFF + 1)


def put_ip_checksum(front: bytearray, ip: int, size: int) -> None:
    """The checksum of an IPv4 header of `size` bytes at `ip`."""
    _be16.pack_into(front, ip + 10, 0)
    _be16.pack_into(front, ip + 10, checksum(front[ip : ip + size]))


def outgoing(front: bytearray, size: int, info: dict[int, int]) -> bytes | None:
    """The vnet header of a frame of `size` bytes that a guest sends with these marks; None: drop it.

    `front` is its beginning, which is changed as need be, and has a VLAN tag in it if there is one.
    """
    csum = info.get(rndis.TCPIP_CHKSUM_PKTINFO, 0)
    lso = info.get(rndis.TCP_LARGESEND_PKTINFO, 0)
    if not csum and not lso:
        return PLAIN
    ip = ETHERNET_BYTES
    if len(front) < ip + _IPV4_BYTES:
        return None
    kind = front[12] << 8 | front[13]
    if kind == ETH_P_8021Q:
        kind = front[16] << 8 | front[17]
        ip += 4
    elif not lso:
        quick = plain_ipv4(front, size, csum)
        if quick is not None:
            return quick
    if kind == ETH_P_IP:
        header = (front[ip] & 15) * 4 if len(front) > ip else 0
        if header < _IPV4_BYTES or ip + header > len(front):
            return None
        version, l4, protocol = 4, ip + header, front[ip + 9]
    elif kind == ETH_P_IPV6 and len(front) >= ip + _IPV6_BYTES:
        version, l4, protocol = 6, _l4_of_ipv6(front, ip, csum, lso), 0
        if not ip + _IPV6_BYTES <= l4 <= len(front):
            return None
    else:
        return None
    if lso:
        return _large(front, size, lso, ip, version, l4)
    return _checked(front, size, csum, ip, version, l4, protocol)


def plain_ipv4(front: bytearray, size: int, csum: int) -> bytes | None:
    """As `outgoing`, for IPv4 without tag, options and segmentation, as most are; None: ask that one."""
    if len(front) < _L4 or front[12:15] != _IPV4_WITHOUT_OPTIONS or csum & rndis.CSUM_TX_IP_HEADER:
        return None
    wanted = _PLAIN_IPV4.get(csum & (rndis.CSUM_TX_TCP | rndis.CSUM_TX_UDP))
    if wanted is None:
        return None
    protocol, least, field, header = wanted
    if len(front) < _L4 + least:
        return None
    length, fragment, found, source, destination = _ipv4_words.unpack_from(front, ETHERNET_BYTES)
    length -= _IPV4_BYTES
    if found != protocol or fragment & 0x3FFF or length < least or _L4 + length > size:
        return None
    total = source + destination + protocol + length
    _be16.pack_into(front, field, (total - 1) % 0xFFFF + 1)
    return header


def _l4_of_ipv6(front: bytearray, ip: int, csum: int, lso: int) -> int:
    """Where TCP or UDP begins: as the guest says, since there may be extension headers before it."""
    if front[ip + 6] in (IPPROTO_TCP, IPPROTO_UDP):
        return ip + _IPV6_BYTES
    at = lso >> rndis.LSO_HEADER_SHIFT & rndis.LSO_HEADER_MASK
    at = at or csum >> rndis.CSUM_TX_HEADER_SHIFT & rndis.CSUM_TX_HEADER_MASK
    return at + ip - ETHERNET_BYTES


def _checked(
    front: bytearray, size: int, csum: int, ip: int, version: int, l4: int, protocol: int
) -> bytes | None:
    """A packet whose checksums are to be made."""
    if version == 4 and csum & rndis.CSUM_TX_IP_HEADER:
        put_ip_checksum(front, ip, l4 - ip)
    if csum & rndis.CSUM_TX_TCP:
        wanted, least, offset = IPPROTO_TCP, _TCP_BYTES, TCP_CHECKSUM
    elif csum & rndis.CSUM_TX_UDP:
        wanted, least, offset = IPPROTO_UDP, _UDP_BYTES, UDP_CHECKSUM
    else:
        return PLAIN
    if version == 4:
        # Of a fragment nobody can make the checksum.
        if protocol != wanted or (front[ip + 6] & 0x3F) or front[ip + 7]:
            return None
        length = _be16.unpack_from(front, ip + 2)[0] - (l4 - ip)
    else:
        length = _be16.unpack_from(front, ip + 4)[0] - (l4 - ip - _IPV6_BYTES)
    if length < least or l4 + length > size or l4 + least > len(front):
        return None
    _put_pseudo_sum(front, ip, version, wanted, length, l4 + offset)
    return virtio_net_hdr_v1.pack(VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE, 0, 0, l4, offset, 1)


def _large(front: bytearray, size: int, lso: int, ip: int, version: int, l4: int) -> bytes | None:
    """A TCP packet to be segmented."""
    mss = lso & rndis.LSO_MSS_MASK
    if not lso & rndis.LSO_TYPE_V2 or bool(lso & rndis.LSO_IPV6) != (version == 6) or not 0 < mss <= 0xFFFF:
        return None
    if l4 + _TCP_BYTES > len(front) or (version == 4 and front[ip + 9] != IPPROTO_TCP):
        return None
    headers = l4 + (front[l4 + 12] >> 4) * 4
    length = size - l4
    if not l4 + _TCP_BYTES <= headers <= min(size, len(front)):
        return None
    if version == 4:
        if size - ip > 0xFFFF:
            return None
        _be16.pack_into(front, ip + 2, size - ip)
        put_ip_checksum(front, ip, l4 - ip)
    else:
        if size - ip - _IPV6_BYTES > 0xFFFF:
            return None
        _be16.pack_into(front, ip + 4, size - ip - _IPV6_BYTES)
    _put_pseudo_sum(front, ip, version, IPPROTO_TCP, length, l4 + TCP_CHECKSUM)
    if size - headers <= mss:
        kind = mss = headers = VIRTIO_NET_HDR_GSO_NONE
    else:
        kind = VIRTIO_NET_HDR_GSO_TCPV4 if version == 4 else VIRTIO_NET_HDR_GSO_TCPV6
        if front[l4 + 13] & _TCP_CWR:
            kind |= VIRTIO_NET_HDR_GSO_ECN
    return virtio_net_hdr_v1.pack(VIRTIO_NET_HDR_F_NEEDS_CSUM, kind, headers, mss, l4, TCP_CHECKSUM, 1)


_L4 = ETHERNET_BYTES + _IPV4_BYTES
_IPV4_WITHOUT_OPTIONS = b"\x08\x00\x45"
_ipv4_words = Struct(">2xH2xHxB2xII")
"""Total length, fragment, protocol, addresses."""


def _for_ipv4(protocol: int, least: int, offset: int) -> tuple[int, int, int, bytes]:
    flags, none = VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE
    return protocol, least, _L4 + offset, virtio_net_hdr_v1.pack(flags, none, 0, 0, _L4, offset, 1)


_PLAIN_IPV4 = {
    rndis.CSUM_TX_TCP: _for_ipv4(IPPROTO_TCP, _TCP_BYTES, TCP_CHECKSUM),
    rndis.CSUM_TX_UDP: _for_ipv4(IPPROTO_UDP, _UDP_BYTES, UDP_CHECKSUM),
}


def received_marks(flags: int, csum_offset: int, kind: int) -> int:
    """The checksum value for a frame whose sender, or whose wire, vouches for its checksums.

    `kind` is its ethertype. Which protocol it is the sum's place says, where there is one.
    """
    marks = rndis.CSUM_RX_IP_SUCCEEDED if kind == ETH_P_IP else 0
    if flags & VIRTIO_NET_HDR_F_NEEDS_CSUM:
        udp = csum_offset == UDP_CHECKSUM
        return marks | (rndis.CSUM_RX_UDP_SUCCEEDED if udp else rndis.CSUM_RX_TCP_SUCCEEDED)
    return marks | rndis.CSUM_RX_TCP_SUCCEEDED | rndis.CSUM_RX_UDP_SUCCEEDED
