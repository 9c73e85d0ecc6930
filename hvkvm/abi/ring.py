"""VMBus ring buffers: the control page's words and the layout of packets.

Why: producer and consumer, on the host's side and on the guest's, agree on
this. struct hv_ring_buffer and struct vmpacket_descriptor of
include/linux/hyperv.h. Layout only; anyone may import it. The `parse_*`
functions take a guest's bytes, already copied: they return None for what is not
valid, and raise nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct

from hvkvm.tuples import NamedTuple

# The control page as 4-byte words.
WORD_WRITE_INDEX = 0
WORD_READ_INDEX = 1
WORD_INTERRUPT_MASK = 2
WORD_PENDING_SEND_SZ = 3
WORD_FEATURE_BITS = 16
FEAT_PENDING_SEND_SZ = 1 << 0
RING_CONTROL_BYTES = 4096

VM_PKT_DATA_INBAND = 6
VM_PKT_DATA_USING_XFER_PAGES = 7
VM_PKT_DATA_USING_GPADL = 8
VM_PKT_DATA_USING_GPA_DIRECT = 9
VM_PKT_CANCEL_REQUEST = 10
VM_PKT_COMP = 11

VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED = 1

DESCRIPTOR_BYTES = 16
TRAILER_BYTES = 8
descriptor = Struct("<HHHHQ")
"""struct vmpacket_descriptor: type, offset8, len8, flags, trans_id."""
trailer = Struct("<II")
"""Behind each packet: 0, and the index at which it begins."""

MAX_RANGES = 4096
"""Most ranges a packet may name; Linux sends up to 32 in page buffers, one in a page list."""
MAX_PAGES = 8192
"""Most pages the ranges of one packet may name: 32 MiB."""

_xfer_header = Struct("<HBBI")
_xfer_range = Struct("<II")
_TRANSFERS: dict[int, Struct] = {}
"""Header and ranges by how many there are; their maker has a bound."""
_gpa_header = Struct("<II")
_gpa_range = Struct("<II")
_gpa_one = Struct("<IIII")
_gpa_page = Struct("<Q")

_tuple = tuple.__new__
"""Makes a NamedTuple in a third of the time that calling its class takes."""


class Packet(NamedTuple):
    """One packet, copied out of the ring: `header` is what is between descriptor and payload."""

    type: int
    flags: int
    trans_id: int
    header: bytes
    payload: bytes

    @property
    def wants_completion(self) -> bool:
        """Whether the sender waits for a VM_PKT_COMP with this trans_id."""
        return bool(self.flags & VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED)


class GpaRange(NamedTuple):
    """Part of a GPA-direct packet: `length` bytes that begin `offset` bytes into the first of `pfns`."""

    length: int
    offset: int
    pfns: tuple[int, ...]


class TransferRange(NamedTuple):
    """Bytes of a buffer, by offset: the one that both sides agreed on, or the pages that a packet names."""

    length: int
    offset: int


def packet_header(kind: int, header: bytes, payload_bytes: int, trans_id: int, flags: int = 0) -> bytes:
    """Descriptor and type header of a packet; `header` is a multiple of 8 bytes."""
    offset = DESCRIPTOR_BYTES + len(header)
    total = offset + payload_bytes
    return descriptor.pack(kind, offset >> 3, (total + 7) >> 3, flags, trans_id) + header


def gpa_direct_header(ranges: list[GpaRange]) -> bytes:
    """What stands between descriptor and payload of a VM_PKT_DATA_USING_GPA_DIRECT."""
    parts = [_gpa_header.pack(0, len(ranges))]
    for one in ranges:
        parts.append(_gpa_range.pack(one.length, one.offset))
        parts.append(b"".join(pfn.to_bytes(8, "little") for pfn in one.pfns))
    return b"".join(parts)


def parse_gpa_direct(packet: Packet, max_bytes: int) -> list[GpaRange] | None:
    """The ranges of a GPA-direct packet of at most `max_bytes` together; None when they are not valid.

    Whether the pages are RAM is for the caller to check. The count is compared
    with the header's length before anything is taken from it (S61).
    """
    header = packet.header
    if len(header) < _gpa_header.size:
        return None
    _reserved, count = _gpa_header.unpack_from(header)
    if not 1 <= count <= MAX_RANGES or count * _gpa_range.size > len(header):
        return None
    at, total, pages = _gpa_header.size, 0, 0
    ranges = []
    for _ in range(count):
        if at + _gpa_range.size > len(header):
            return None
        length, offset = _gpa_range.unpack_from(header, at)
        at += _gpa_range.size
        total += length
        need = (offset + length + 4095) >> 12
        pages += need
        if offset >= 4096 or not length or total > max_bytes or pages > MAX_PAGES:
            return None
        end = at + need * 8
        if end > len(header):
            return None
        ranges.append(GpaRange(length, offset, Struct(f"<{need}Q").unpack_from(header, at)))
        at = end
    return ranges


def parse_gpa_range(header: bytes, max_bytes: int) -> TransferRange | None:
    """The one range of a GPA-direct packet of at most `max_bytes`; None for none, several or a bad one.

    As `parse_gpa_direct`, for protocols in which a second range has no meaning. Its offset is one into the
    first of the pages, whose numbers `gpa_pages` and `gpa_pfns` have: as many as the range takes are there.
    """
    if len(header) < _gpa_one.size:
        return None
    _reserved, count, length, offset = _gpa_one.unpack_from(header)
    need = (offset + length + 4095) >> 12
    if count != 1 or offset >= 4096 or not 0 < length <= max_bytes or need * 8 > len(header) - _gpa_one.size:
        return None
    return _tuple(TransferRange, (length, offset))


def gpa_pages(header: bytes, count: int) -> bytes:
    """The first `count` page numbers of the range, 8 bytes each, as they stand there."""
    return header[_gpa_one.size : _gpa_one.size + 8 * count]


def gpa_pfns(header: bytes, count: int) -> tuple[int, ...]:
    """The same as integers."""
    if count == 1:
        return _gpa_page.unpack_from(header, _gpa_one.size)
    return Struct(f"<{count}Q").unpack_from(header, _gpa_one.size)


def transfer_page_header(set_id: int, ranges: list[TransferRange], *, owns_set: bool = False) -> bytes:
    """What stands between descriptor and payload of a VM_PKT_DATA_USING_XFER_PAGES."""
    parts = [_xfer_header.pack(set_id, int(owns_set), 0, len(ranges))]
    parts.extend(_xfer_range.pack(one.length, one.offset) for one in ranges)
    return b"".join(parts)


def transfer_ranges(set_id: int, words: Sequence[int]) -> bytes:
    """As `transfer_page_header`, of lengths and offsets in turn: for those who make many."""
    count = len(words) >> 1
    made = _TRANSFERS.get(count)
    if made is None:
        made = _TRANSFERS[count] = Struct(f"{_xfer_header.format}{2 * count}I")
    return made.pack(set_id, 0, 0, count, *words)


def parse_transfer_pages(packet: Packet, set_id: int, buffer_bytes: int) -> list[TransferRange] | None:
    """The ranges of a transfer-page packet, all inside a buffer of `buffer_bytes`; None when not valid."""
    header = packet.header
    if len(header) < _xfer_header.size:
        return None
    found, _owns, _reserved, count = _xfer_header.unpack_from(header)
    if found != set_id or not 1 <= count <= MAX_RANGES:
        return None
    if _xfer_header.size + count * _xfer_range.size > len(header):
        return None
    ranges = [
        TransferRange(*_xfer_range.unpack_from(header, _xfer_header.size + i * _xfer_range.size))
        for i in range(count)
    ]
    if any(not one.length or one.offset + one.length > buffer_bytes for one in ranges):
        return None
    return ranges
