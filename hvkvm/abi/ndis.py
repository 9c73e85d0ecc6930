"""NDIS objects that travel in RNDIS queries and sets: what a NIC can do for its guest, and what it shall.

struct ndis_offload, ndis_offload_params, ndis_recv_scale_cap and ndis_recv_scale_param of Linux's
drivers/net/hyperv/hyperv_net.h. Layout only; anyone may import it. `parse_*` take a guest's bytes, already
copied: None for what is not valid, and raise nothing.
"""

from __future__ import annotations

from struct import Struct

from hvkvm.tuples import NamedTuple

NDIS_OBJECT_TYPE_RSS_CAPABILITIES = 0x88
NDIS_OBJECT_TYPE_RSS_PARAMETERS = 0x89
NDIS_OBJECT_TYPE_OFFLOAD = 0xA7
NDIS_OBJECT_TYPE_DEFAULT = 0x80

object_header = Struct("<BBH")
"""Type, revision, bytes."""

OFFLOAD_SIZES = ((3, 156), (2, 144), (1, 112))
"""Revisions of struct ndis_offload and their bytes."""
NDIS_OFFLOAD_ENCAP_8023 = 2
_CSUM4 = 0x1 | 0x4 | 0x10 | 0x40 | 0x100
"""IP options, TCP options, TCP, UDP, IP header."""
_CSUM6 = 0x1 | 0x4 | 0x10 | 0x40
_LSO6_OPTIONS = 0x1 | 0x4
_LSO_MIN_SEGMENTS = 2
_csum = Struct("<IIII")
"""Encapsulation and capabilities to send, the same to receive."""
_lso4 = Struct("<III")
_lso6 = Struct("<IIII")

MAX_LSO_BYTES = 62780
"""Longest packet to be segmented that a guest is told it may send: Hyper-V's own figure."""

offload_params = Struct("<BBH11B")
"""Header, then a byte a setting: IPv4 checksum, TCPv4, UDPv4, TCPv6, UDPv6, LSOv1, IPsec, LSOv2 IPv4, LSOv2
IPv6, two of no use."""
_rsc4_at, _rsc6_at = 22, 23
NDIS_OFFLOAD_PARAMETERS_RSC_DISABLED = 1
NDIS_OFFLOAD_PARAMETERS_RSC_ENABLED = 2

recv_scale_cap = Struct("<BBHIIIHxx")
RECV_SCALE_CAP_BYTES = 18
_RSS_CAPS = 0x01000000 | 0x100 | 0x200 | 1
"""Interrupts by message; hashes of TCP over IPv4 and IPv6; Toeplitz."""
INDIRECTION_ENTRIES = 128
HASH_KEY_BYTES = 40

recv_scale_param = Struct("<BBHHHIHHIHHI")
"""Header, flags, base CPU, hash, bytes and offset of the table, bytes and offset of the key."""
NDIS_RSS_PARAM_FLAG_HASH_INFO_UNCHANGED = 0x02
NDIS_RSS_PARAM_FLAG_ITABLE_UNCHANGED = 0x04
NDIS_RSS_PARAM_FLAG_HASH_KEY_UNCHANGED = 0x08
NDIS_RSS_PARAM_FLAG_DISABLE_RSS = 0x10


def offload(*, csum: bool, lso4: bool, lso6: bool, rsc: bool, most: int = OFFLOAD_SIZES[0][1]) -> bytes:
    """A struct ndis_offload, the newest revision that fits in `most` bytes (else the oldest)."""
    revision, size = next((one for one in OFFLOAD_SIZES if one[1] <= most), OFFLOAD_SIZES[-1])
    data = bytearray(size)
    object_header.pack_into(data, 0, NDIS_OBJECT_TYPE_OFFLOAD, revision, size)
    encap = NDIS_OFFLOAD_ENCAP_8023
    if csum:
        _csum.pack_into(data, 4, encap, _CSUM4, encap, _CSUM4)
        _csum.pack_into(data, 20, encap, _CSUM6, encap, _CSUM6)
    if csum and lso4:
        _lso4.pack_into(data, 80, encap, MAX_LSO_BYTES, _LSO_MIN_SEGMENTS)
    if csum and lso6:
        _lso6.pack_into(data, 92, encap, MAX_LSO_BYTES, _LSO_MIN_SEGMENTS, _LSO6_OPTIONS)
    if rsc and size > 145:
        data[144] = data[145] = 1
    return bytes(data)


def parse_rsc(data: bytes) -> tuple[int, int] | None:
    """What a struct ndis_offload_params says of RSC for IPv4 and IPv6: 0 no change, or one of the two."""
    if len(data) < offload_params.size:
        return None
    kind, _revision, size = object_header.unpack_from(data)
    if kind != NDIS_OBJECT_TYPE_DEFAULT or size > len(data):
        return None
    if size <= _rsc6_at:
        return 0, 0
    return data[_rsc4_at], data[_rsc6_at]


def recv_scale_capabilities(queues: int) -> bytes:
    """A struct ndis_recv_scale_cap with so many receive queues."""
    return recv_scale_cap.pack(
        NDIS_OBJECT_TYPE_RSS_CAPABILITIES,
        2,
        RECV_SCALE_CAP_BYTES,
        _RSS_CAPS,
        queues,
        queues,
        INDIRECTION_ENTRIES,
    )[:RECV_SCALE_CAP_BYTES]


class RecvScale(NamedTuple):
    """What a struct ndis_recv_scale_param asks for: None where nothing changes."""

    enabled: bool
    table: tuple[int, ...] | None
    key: bytes | None


def parse_recv_scale(data: bytes) -> RecvScale | None:
    """A struct ndis_recv_scale_param with its table and key."""
    if len(data) < recv_scale_param.size:
        return None
    kind, _revision, _size, flags, _cpu, _hash, table_bytes, _r, table_at, key_bytes, _r2, key_at = (
        recv_scale_param.unpack_from(data)
    )
    if kind != NDIS_OBJECT_TYPE_RSS_PARAMETERS:
        return None
    if flags & NDIS_RSS_PARAM_FLAG_DISABLE_RSS:
        return RecvScale(False, None, None)
    table: tuple[int, ...] | None = None
    key: bytes | None = None
    if not flags & NDIS_RSS_PARAM_FLAG_ITABLE_UNCHANGED:
        entries = table_bytes // 4
        if not 1 <= entries <= INDIRECTION_ENTRIES or table_at + entries * 4 > len(data):
            return None
        table = Struct(f"<{entries}I").unpack_from(data, table_at)
    if not flags & NDIS_RSS_PARAM_FLAG_HASH_KEY_UNCHANGED:
        if key_bytes != HASH_KEY_BYTES or key_at + key_bytes > len(data):
            return None
        key = data[key_at : key_at + key_bytes]
    return RecvScale(True, table, key)
