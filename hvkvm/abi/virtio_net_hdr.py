"""The header in front of every frame between a NIC and its wire: checksum and segmentation left to others.

struct virtio_net_hdr_v1 of include/uapi/linux/virtio_net.h, little endian, and the TUN_F_* of linux/if_tun.h
that say who may leave what to whom. `csum_start` counts from the frame's first byte, its Ethernet header, and
the checksum field lies `csum_offset` bytes behind it. Layout only; anyone may import it.
"""

from __future__ import annotations

from struct import Struct

from hvkvm.tuples import NamedTuple

VIRTIO_NET_HDR_F_NEEDS_CSUM = 1
"""The checksum field holds the pseudo-header's sum; the rest is to be summed from `csum_start` on."""
VIRTIO_NET_HDR_F_DATA_VALID = 2
"""The checksum was verified, so that nobody needs to do it again."""

VIRTIO_NET_HDR_GSO_NONE = 0
VIRTIO_NET_HDR_GSO_TCPV4 = 1
VIRTIO_NET_HDR_GSO_UDP = 3
VIRTIO_NET_HDR_GSO_TCPV6 = 4
VIRTIO_NET_HDR_GSO_UDP_L4 = 5
VIRTIO_NET_HDR_GSO_ECN = 0x80
"""A bit beside the type."""

virtio_net_hdr_v1 = Struct("<BBHHHHH")
VIRTIO_NET_HDR_BYTES = virtio_net_hdr_v1.size

TUN_F_CSUM = 0x01
TUN_F_TSO4 = 0x02
TUN_F_TSO6 = 0x04
TUN_F_TSO_ECN = 0x08


class VnetHeader(NamedTuple):
    """The fields of struct virtio_net_hdr_v1. `gso_size` is the TCP payload of one segment, in bytes."""

    flags: int = 0
    gso_type: int = VIRTIO_NET_HDR_GSO_NONE
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0
    num_buffers: int = 0

    def pack(self) -> bytes:
        """Its 12 bytes."""
        return virtio_net_hdr_v1.pack(*self)


PLAIN = bytes(VIRTIO_NET_HDR_BYTES)
"""The header of a frame that is whole: nothing is left to do."""
VALID = VnetHeader(VIRTIO_NET_HDR_F_DATA_VALID).pack()
"""The header of a frame that is whole and whose checksums need no look."""


def parse(header: bytes | bytearray | memoryview) -> VnetHeader:
    """The fields of the first 12 bytes. struct.error if there are fewer."""
    return VnetHeader._make(virtio_net_hdr_v1.unpack_from(header))
