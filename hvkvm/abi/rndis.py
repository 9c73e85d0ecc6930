"""RNDIS: the messages between a guest's NIC driver and its host, and the marks a packet of data carries.

Names and layouts are those of Linux's include/linux/rndis.h and drivers/net/hyperv/hyperv_net.h. A message
begins with its type and length; offsets inside count from byte 8 of it (`BODY`). Layout only; anyone may
import it. `parse_*` take a guest's bytes, already copied: None for what is not valid, and raise nothing.
"""

from __future__ import annotations

from struct import Struct

from hvkvm.tuples import NamedTuple

RNDIS_MSG_PACKET = 1
RNDIS_MSG_INIT = 2
RNDIS_MSG_HALT = 3
RNDIS_MSG_QUERY = 4
RNDIS_MSG_SET = 5
RNDIS_MSG_RESET = 6
RNDIS_MSG_INDICATE = 7
RNDIS_MSG_KEEPALIVE = 8
RNDIS_MSG_COMPLETION = 0x80000000

RNDIS_STATUS_SUCCESS = 0
RNDIS_STATUS_FAILURE = 0xC0000001
RNDIS_STATUS_NOT_SUPPORTED = 0xC00000BB
RNDIS_STATUS_INVALID_LENGTH = 0xC0010014
RNDIS_STATUS_INVALID_DATA = 0xC0010015
RNDIS_STATUS_MEDIA_CONNECT = 0x4001000B
RNDIS_STATUS_MEDIA_DISCONNECT = 0x4001000C
RNDIS_STATUS_LINK_SPEED_CHANGE = 0x40010013
RNDIS_STATUS_NETWORK_CHANGE = 0x40010018

BODY = 8
"""What offsets inside a message count from."""

header = Struct("<II")
"""Type, bytes of the whole message."""
initialize = Struct("<IIIIII")
"""Type, length, request, major, minor, most bytes of a message that the guest takes."""
initialize_complete = Struct("<IIIIIIIIIIIII")
"""Type, length, request, status, major, minor, flags, medium, messages a packet, bytes a packet, alignment
as a power of 2, and two of no use."""
request = Struct("<IIIIIII")
"""QUERY and SET: type, length, request, OID, bytes of its buffer, where that is, 0."""
query_complete = Struct("<IIIIII")
"""Type, length, request, status, bytes of the buffer, where it is."""
complete = Struct("<IIII")
"""SET and KEEPALIVE: type, length, request, status."""
reset_complete = Struct("<IIII")
"""Type, length, status, whether filter and multicast list must be set anew."""
indicate = Struct("<IIIII")
"""Type, length, status, bytes of its buffer, where that is."""
RNDIS_DF_CONNECTIONLESS = 1

packet = Struct("<IIIIIIIIIII")
"""Type, length, offset and bytes of the frame, three of out-of-band data, offset and bytes of the
per-packet information, 0, 0."""
MIN_DATA_OFFSET = packet.size - BODY

per_packet_info = Struct("<III")
"""Bytes of this one, type, and where its value begins, from its own beginning."""
PPI_TYPE_MASK = 0x7FFFFFFF
"""The highest bit marks types internal to the virtual switch."""
TCPIP_CHKSUM_PKTINFO = 0
TCP_LARGESEND_PKTINFO = 2
IEEE_8021Q_INFO = 6
NBL_HASH_VALUE = 8
value_info = Struct("<IIII")
"""A per-packet information of 4 bytes: 16, type, 12, the value."""
VALUE_INFO_BYTES = value_info.size

MAX_TOLD = 64
"""Most messages that `beginnings` gives."""
MAX_TOLD_BYTES = 4096
"""Of each."""

MAX_PPI = 16
"""Most per-packet informations a packet may have; there are a dozen types."""

# The checksum value of a packet to send.
CSUM_TX_IPV4 = 1 << 0
CSUM_TX_IPV6 = 1 << 1
CSUM_TX_TCP = 1 << 2
CSUM_TX_UDP = 1 << 3
CSUM_TX_IP_HEADER = 1 << 4
CSUM_TX_HEADER_SHIFT, CSUM_TX_HEADER_MASK = 16, 0x3FF
# And of one received.
CSUM_RX_TCP_SUCCEEDED = 1 << 3
CSUM_RX_UDP_SUCCEEDED = 1 << 4
CSUM_RX_IP_SUCCEEDED = 1 << 5
# The large-send value.
LSO_MSS_MASK = 0xFFFFF
LSO_HEADER_SHIFT, LSO_HEADER_MASK = 20, 0x3FF
LSO_TYPE_V2 = 1 << 30
LSO_IPV6 = 1 << 31

# OIDs.
RNDIS_OID_GEN_SUPPORTED_LIST = 0x00010101
RNDIS_OID_GEN_HARDWARE_STATUS = 0x00010102
RNDIS_OID_GEN_MEDIA_SUPPORTED = 0x00010103
RNDIS_OID_GEN_MEDIA_IN_USE = 0x00010104
RNDIS_OID_GEN_MAXIMUM_LOOKAHEAD = 0x00010105
RNDIS_OID_GEN_MAXIMUM_FRAME_SIZE = 0x00010106
RNDIS_OID_GEN_LINK_SPEED = 0x00010107
RNDIS_OID_GEN_TRANSMIT_BUFFER_SPACE = 0x00010108
RNDIS_OID_GEN_RECEIVE_BUFFER_SPACE = 0x00010109
RNDIS_OID_GEN_TRANSMIT_BLOCK_SIZE = 0x0001010A
RNDIS_OID_GEN_RECEIVE_BLOCK_SIZE = 0x0001010B
RNDIS_OID_GEN_VENDOR_ID = 0x0001010C
RNDIS_OID_GEN_VENDOR_DESCRIPTION = 0x0001010D
RNDIS_OID_GEN_CURRENT_PACKET_FILTER = 0x0001010E
RNDIS_OID_GEN_CURRENT_LOOKAHEAD = 0x0001010F
RNDIS_OID_GEN_DRIVER_VERSION = 0x00010110
RNDIS_OID_GEN_MAXIMUM_TOTAL_SIZE = 0x00010111
RNDIS_OID_GEN_PROTOCOL_OPTIONS = 0x00010112
RNDIS_OID_GEN_MAC_OPTIONS = 0x00010113
RNDIS_OID_GEN_MEDIA_CONNECT_STATUS = 0x00010114
RNDIS_OID_GEN_MAXIMUM_SEND_PACKETS = 0x00010115
RNDIS_OID_GEN_VENDOR_DRIVER_VERSION = 0x00010116
RNDIS_OID_GEN_NETWORK_LAYER_ADDRESSES = 0x00010118
OID_GEN_RECEIVE_SCALE_CAPABILITIES = 0x00010203
OID_GEN_RECEIVE_SCALE_PARAMETERS = 0x00010204
RNDIS_OID_GEN_RNDIS_CONFIG_PARAMETER = 0x0001021B
RNDIS_OID_GEN_XMIT_OK = 0x00020101
RNDIS_OID_GEN_RCV_OK = 0x00020102
RNDIS_OID_GEN_XMIT_ERROR = 0x00020103
RNDIS_OID_GEN_RCV_ERROR = 0x00020104
RNDIS_OID_GEN_RCV_NO_BUFFER = 0x00020105
RNDIS_OID_GEN_FRIENDLY_NAME = 0x00020216
RNDIS_OID_802_3_PERMANENT_ADDRESS = 0x01010101
RNDIS_OID_802_3_CURRENT_ADDRESS = 0x01010102
RNDIS_OID_802_3_MULTICAST_LIST = 0x01010103
RNDIS_OID_802_3_MAXIMUM_LIST_SIZE = 0x01010104
RNDIS_OID_802_3_MAC_OPTIONS = 0x01010105
OID_OFFLOAD_ENCAPSULATION = 0x0101010A
RNDIS_OID_802_3_RCV_ERROR_ALIGNMENT = 0x01020101
RNDIS_OID_802_3_XMIT_ONE_COLLISION = 0x01020102
RNDIS_OID_802_3_XMIT_MORE_COLLISIONS = 0x01020103
OID_TCP_OFFLOAD_CURRENT_CONFIG = 0xFC01020B
OID_TCP_OFFLOAD_PARAMETERS = 0xFC01020C
OID_TCP_OFFLOAD_HARDWARE_CAPABILITIES = 0xFC01020D

NDIS_PACKET_TYPE_DIRECTED = 0x01
NDIS_PACKET_TYPE_MULTICAST = 0x02
NDIS_PACKET_TYPE_ALL_MULTICAST = 0x04
NDIS_PACKET_TYPE_BROADCAST = 0x08
NDIS_PACKET_TYPE_PROMISCUOUS = 0x20

config_parameter = Struct("<IIIII")
"""struct rndis_config_parameter_info: offset and bytes of a name, type, offset and bytes of its value."""
CONFIG_PARAMETER_STRING = 2


class DataPacket(NamedTuple):
    """Where the frame of a RNDIS_MSG_PACKET is, counted from the message's beginning, and its marks."""

    offset: int
    length: int
    info: dict[int, int]
    """The first 4 bytes of each per-packet information, by type."""


def parse_packet(blob: bytes, at: int, length: int) -> DataPacket | None:
    """The RNDIS_MSG_PACKET of `length` bytes at `at`, whose frame alone may lie beyond `blob`."""
    if at + packet.size > len(blob) or length < packet.size:
        return None
    _type, _length, data, size, _o, _ol, _on, ppi, ppi_size, _vc, _rsvd = packet.unpack_from(blob, at)
    data += BODY
    if data < packet.size or data + size > length:
        return None
    info: dict[int, int] = {}
    if not ppi_size:
        return DataPacket(data, size, info)
    here, end = at + ppi + BODY, at + ppi + BODY + ppi_size
    if ppi < MIN_DATA_OFFSET or ppi + BODY + ppi_size > length or end > len(blob):
        return None
    count = 0
    while here < end:
        count += 1
        if here + per_packet_info.size > end or count > MAX_PPI:
            return None
        one, kind, offset = per_packet_info.unpack_from(blob, here)
        if one < per_packet_info.size or here + one > end or not per_packet_info.size <= offset <= one:
            return None
        if one - offset >= 4:
            info[kind] = int.from_bytes(blob[here + offset : here + offset + 4], "little")
        here += one
    return DataPacket(data, size, info)


def beginnings(blob: bytes) -> list[bytes]:
    """The messages in `blob` for those who look on: whole, but of a packet only what is before its frame.

    Ends where no further message can be told.
    """
    found: list[bytes] = []
    at = 0
    while at + header.size <= len(blob) and len(found) < MAX_TOLD:
        kind, length = header.unpack_from(blob, at)
        if length < header.size:
            break
        size = length
        if kind == RNDIS_MSG_PACKET:
            infos = length >= packet.size and at + packet.size <= len(blob)
            size = packet.size + (packet.unpack_from(blob, at)[8] if infos else 0)
        found.append(blob[at : at + min(size, length, MAX_TOLD_BYTES)])
        at += length
    return found


def parse_buffer(blob: bytes, size: int, offset: int, fixed: int) -> bytes | None:
    """The buffer of a message with `fixed` bytes in front: `size` bytes at `offset` from BODY."""
    if not size:
        return b""
    start = BODY + offset
    if start < fixed or start + size > len(blob):
        return None
    return blob[start : start + size]
