"""How a frame is made ready for the guest: whether it fits, its RNDIS header, checksums and segments.

Whatever a frame holds, a whole vnet header is made out of it: see `netvsp_offload`. Owner: the I/O loop.
Nothing here raises for what a frame holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct

from hvkvm.abi import rndis
from hvkvm.abi.virtio_net_hdr import (
    VIRTIO_NET_HDR_F_DATA_VALID,
    VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6,
    virtio_net_hdr_v1,
)
from hvkvm.devices.synth import netvsp_offload as offload
from hvkvm.devices.synth.netvsp_rndis import Control
from hvkvm.net.port import ETHERNET_BYTES, Frame
from hvkvm.net.segment import summed
from hvkvm.tuples import NamedTuple

HEADERS = 64
"""So many bytes of a frame are looked at: Ethernet, VLAN tag, IP addresses, ports."""

_packet = rndis.packet
_PPI_OFFSET = _packet.size - rndis.BODY
_VOUCHED = _packet.size + rndis.VALUE_INFO_BYTES
_vouched = Struct("<IIII12xII8xIIII")
"""A `rndis.packet` with one `rndis.value_info`, as most frames have."""
_tuple = tuple.__new__
_MOST_KNOWN = 64
_GSO_FAMILY = {VIRTIO_NET_HDR_GSO_TCPV4: 4, VIRTIO_NET_HDR_GSO_TCPV6: 6}


class Laid(NamedTuple):
    """What is to lie in the buffer: an RNDIS header with marks, then `views`, `size` bytes in all."""

    head: bytes
    views: Sequence[memoryview]
    size: int


def _marked(size: int, marks: Sequence[tuple[int, int]]) -> tuple[int, bytes]:
    """The head of an RNDIS message of a frame of `size` bytes: how long it is, and itself."""
    infos = len(marks) * rndis.VALUE_INFO_BYTES
    data = _packet.size + infos
    head = _packet.pack(
        rndis.RNDIS_MSG_PACKET,
        data + size,
        data - rndis.BODY,
        size,
        0,
        0,
        0,
        _PPI_OFFSET if infos else 0,
        infos,
        0,
        0,
    )
    for mark, value in marks:
        head += rndis.value_info.pack(rndis.VALUE_INFO_BYTES, mark, rndis.per_packet_info.size, value)
    return data, head


class Layer:
    """Makes `Laid` of frames, as the guest has set it up."""

    def __init__(self, control: Control) -> None:
        self.control = control
        self.section = 0
        """Most bytes of a message."""
        self.vlan_marks = False
        """Whether the guest takes VLAN tags as marks."""
        self.max_frame = 0
        """Longest frame of the guest's MTU, with a VLAN tag."""
        self._known: dict[tuple[bytes, bytes, int], tuple[bytes, int, tuple[int, int] | None]] = {}
        """Heads of messages, their bytes, and where to sum what to, by vnet header, Ethernet header and size
        of frames to which no more is done: those of a stream are all the same."""

    def forget(self) -> None:
        """The guest may have changed what it wants to have."""
        self._known.clear()

    def laid(self, frame: Frame) -> Laid | str:
        """How a frame goes to the guest, or the counter of why it does not."""
        views = frame[1:]
        first = views[0]
        outside = frame[0].tobytes(), first[:ETHERNET_BYTES].tobytes(), len(first)
        known = self._known.get(outside) if len(views) == 1 else None
        if known is not None:
            head, size, sums = known
            if sums is not None:
                whole = summed(*sums, bytearray(first))
                if whole is None:
                    return "malformed"
                views = (memoryview(whole),)
            return _tuple(Laid, (head, views, size))
        sums = None
        flags, gso, _hdr, _mss, start, offset, _n = virtio_net_hdr_v1.unpack(outside[0])
        if len(first) < HEADERS and len(views) > 1:
            views = (memoryview(b"".join(views)),)
            first = views[0]
        size = len(first) if len(views) == 1 else sum(map(len, views))
        if size < ETHERNET_BYTES:
            return "malformed"
        control = self.control
        destination = first[:6].tobytes()
        directed = control.packet_filter & rndis.NDIS_PACKET_TYPE_DIRECTED
        if (not directed or destination != control.address) and not control.wants(destination):
            return "filtered"
        if gso:
            family = _GSO_FAMILY.get(gso & ~VIRTIO_NET_HDR_GSO_ECN)
            if not (control.rsc4 if family == 4 else control.rsc6 and family == 6):
                # The wire was told otherwise, and this one was on its way: its sender sends it again.
                return "too_long"
        elif size > self.max_frame:
            return "too_long"
        elif flags & VIRTIO_NET_HDR_F_NEEDS_CSUM:
            # A guest that looks at checksums itself (ethtool rx off) does not tell us.
            sums = start, offset
            whole = summed(start, offset, bytearray().join(views))
            if whole is None:
                return "malformed"
            first = memoryview(whole)
            views = (first,)
        kind = first[12] << 8 | first[13]
        vouched = flags & (VIRTIO_NET_HDR_F_NEEDS_CSUM | VIRTIO_NET_HDR_F_DATA_VALID)
        if kind == offload.ETH_P_8021Q and self.vlan_marks and size >= ETHERNET_BYTES + 4:
            tag = first[14] << 8 | first[15]
            marks = [(rndis.IEEE_8021Q_INFO, tag >> 13 | (tag >> 12 & 1) << 3 | (tag & 0xFFF) << 4)]
            kind = first[16] << 8 | first[17]
            views = (first[:12], first[16:], *views[1:])
            size -= 4
            if vouched:
                marks.append((rndis.TCPIP_CHKSUM_PKTINFO, offload.received_marks(flags, offset, kind)))
            data, head = _marked(size, marks)
        elif vouched:
            data = _VOUCHED
            value = offload.received_marks(flags, offset, kind)
            head = _vouched.pack(
                rndis.RNDIS_MSG_PACKET,
                data + size,
                data - rndis.BODY,
                size,
                _PPI_OFFSET,
                rndis.VALUE_INFO_BYTES,
                rndis.VALUE_INFO_BYTES,
                rndis.TCPIP_CHKSUM_PKTINFO,
                rndis.per_packet_info.size,
                value,
            )
        else:
            data, head = _marked(size, ())
        if data + size > self.section:
            return "too_long"
        if len(frame) == 2 and first is views[0] and (sums or first is frame[1]) and not gso:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[outside] = head, data + size, sums
        return _tuple(Laid, (head, views, data + size))
