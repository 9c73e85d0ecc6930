"""An indirect table as drivers of disks lay it: a header, data in many pieces, a status byte.

Such a table is taken as a whole, by arithmetic on one long integer: a view of each of 256 pieces would cost
more than the disk's work on them. Every other table is walked descriptor by descriptor (`ring`), and so is
one in which anything is unusual, which then says what is wrong with it.
"""

from __future__ import annotations

from functools import lru_cache
from struct import Struct

from hvkvm.abi import virtio
from hvkvm.memory.page_vector import LEAST_PAGES, PageVector, Ram, piece_vector
from hvkvm.tuples import NamedTuple

_DESC = virtio.vring_desc.size
_NEXT, _WRITE = virtio.VRING_DESC_F_NEXT, virtio.VRING_DESC_F_WRITE
LEAST_BYTES = (LEAST_PAGES + 2) * _DESC
_short = Struct("<" + 3 * virtio.vring_desc.format.removeprefix("<"))
SHORT_BYTES = _short.size
MAX_HEADER = 64
"""Bytes of a header that is copied: the longest that a disk's driver has is 16."""


class Table(NamedTuple):
    """What lies where: the header's and the status's address and length, and the pieces between them."""

    header: tuple[int, int]
    data: PageVector
    writable: bool
    """Whether the device writes the data."""
    status: tuple[int, int]


class Short(NamedTuple):
    """Of a table with its data in one piece: what lies where, address and length."""

    header: tuple[int, int]
    data: tuple[int, int]
    writable: bool
    """Whether the device writes the data."""
    status: tuple[int, int]


def short_table(table: bytes) -> Short | None:
    """`table` of SHORT_BYTES, a copy of a driver's; None if it is not of that form."""
    at, n, flags, link, data, length, data_flags, data_link, status, one, last, _link = _short.unpack(table)
    if (
        flags != _NEXT
        or link != 1
        or data_flags | _WRITE != _NEXT | _WRITE
        or data_link != 2
        or last != _WRITE
        or not 0 < n <= MAX_HEADER
        or not length
        or not one
    ):
        return None
    return Short((at, n), (data, length), data_flags != _NEXT, (status, one))


class _Shape(NamedTuple):
    """Of so many pieces: where addresses and lengths are; flags and links if the device reads, or writes."""

    places: int
    reads: int
    writes: int


@lru_cache(maxsize=64)  # a guest chooses how many
def _shape(count: int) -> _Shape:
    ones = ((1 << 128 * count) - 1) // ((1 << 128) - 1)
    links = int.from_bytes(
        b"".join(virtio.vring_desc.pack(0, 0, _NEXT, index + 2) for index in range(count)), "little"
    )
    return _Shape(ones * ((1 << 96) - 1), links, links + ones * (_WRITE << 96))


def whole_table(memory: Ram, table: bytes) -> Table | None:
    """`table`, a copy of a driver's; None if it is not of that form, is short, or names what is no RAM."""
    address, length, flags, link = virtio.vring_desc.unpack_from(table)
    status, one, last_flags, _link = virtio.vring_desc.unpack_from(table, len(table) - _DESC)
    if flags != _NEXT or link != 1 or last_flags != _WRITE or not length or not one:
        return None
    count = len(table) // _DESC - 2
    numbers = int.from_bytes(table[_DESC:-_DESC], "little")
    shape = _shape(count)
    pieces = numbers & shape.places
    links = numbers - pieces
    if links not in (shape.reads, shape.writes):
        return None
    data = piece_vector(memory, pieces, count)
    if data is None:
        return None
    return Table((address, length), data, links == shape.writes, (status, one))
