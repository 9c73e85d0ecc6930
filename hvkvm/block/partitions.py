"""The partitions of a disk, by its GPT or MBR, as Linux would number them.

The image is hostile: what does not fit is left out, nothing is raised but what reading the image raises, and
every table is bounded. Reads block; any thread that may.
"""

from __future__ import annotations

from zlib import crc32

from hvkvm.abi import on_disk
from hvkvm.abi.on_disk import GptHeader
from hvkvm.block.image import Image
from hvkvm.tuples import NamedTuple

MAX_ENTRIES = 1024
"""Of a GPT; Linux takes no more than 256."""
MAX_ENTRY_SIZE = 4096
MAX_LOGICAL = 64
"""Partitions in an extended one."""


class Partition(NamedTuple):
    """`length` bytes at `offset`. `type` is a GPT's, as 16 bytes on disk; empty for an MBR's."""

    number: int
    offset: int
    length: int
    type: bytes = b""


def read_at(image: Image, offset: int, n: int) -> bytes:
    """A copy of `n` bytes; fewer, or none, beyond its end. OSError, ImageError."""
    if offset < 0 or offset >= image.size:
        return b""
    # An image takes whole sectors; O_DIRECT may want pages.
    grain = max(image.sector_size, 4096)
    first = offset // grain * grain
    last = min(-(-(offset + n) // grain) * grain, image.size)
    data = bytearray(last - first)
    with memoryview(data) as view:
        got = image.readv(first, [view])
    return bytes(data[offset - first : min(got, offset - first + n)])


def partitions(image: Image) -> list[Partition] | None:
    """Those of the disk, in order; None when it has no partition table. OSError, ImageError."""
    found = _gpt(image)
    return _mbr(image) if found is None else found


def _gpt(image: Image) -> list[Partition] | None:
    sectors = image.size // image.sector_size
    for lba in (1, sectors - 1):
        header = _gpt_header(image, lba)
        if header is None:
            continue
        table = read_at(image, header.entries_lba * image.sector_size, header.entries * header.entry_size)
        if len(table) == header.entries * header.entry_size and crc32(table) == header.entries_crc:
            return _gpt_entries(table, header, image.sector_size, sectors)
    return None


def _gpt_header(image: Image, lba: int) -> GptHeader | None:
    """The header in sector `lba` if all of it can be believed."""
    sector = read_at(image, lba * image.sector_size, image.sector_size)
    if len(sector) < on_disk.gpt_header.size:
        return None
    header = GptHeader(*on_disk.gpt_header.unpack_from(sector))
    if header.signature != on_disk.GPT_SIGNATURE or header.my_lba != lba:
        return None
    if not on_disk.gpt_header.size <= header.header_size <= len(sector):
        return None
    at = on_disk.GPT_CRC_AT
    summed = sector[:at] + bytes(4) + sector[at + 4 : header.header_size]
    sound = (
        crc32(summed) == header.header_crc
        and 0 < header.entries <= MAX_ENTRIES
        and on_disk.gpt_entry.size <= header.entry_size <= MAX_ENTRY_SIZE
    )
    return header if sound else None


def _gpt_entries(table: bytes, header: GptHeader, sector: int, sectors: int) -> list[Partition]:
    found = []
    for index in range(header.entries):
        kind, _guid, first, last, _attributes, _name = on_disk.gpt_entry.unpack_from(
            table, index * header.entry_size
        )
        if any(kind) and 0 < first <= last < sectors:
            found.append(Partition(index + 1, first * sector, (last - first + 1) * sector, kind))
    return found


def _mbr(image: Image) -> list[Partition] | None:
    entries = mbr_entries(image, 0)
    sectors = image.size // image.sector_size
    used = [entry for entry in entries or () if entry[1]]
    # A file system's boot code may end in the same two bytes: the rest must make sense, too.
    if not used or any(flag & 0x7F or not start or start >= sectors for flag, _, start, _ in used):
        return None
    sector = image.sector_size
    found: list[Partition] = []
    logical: list[Partition] = []
    for index, (_flag, kind, start, count) in enumerate(entries or ()):
        if kind in on_disk.MBR_TYPES_EXTENDED:
            logical += _logical(image, start, MAX_LOGICAL - len(logical))
        elif kind and kind != on_disk.MBR_TYPE_PROTECTIVE and 0 < count <= sectors - start:
            found.append(Partition(index + 1, start * sector, count * sector))
    numbered = enumerate(logical, on_disk.MBR_FIRST_LOGICAL)
    return found + [one._replace(number=number) for number, one in numbered]


def _logical(image: Image, base: int, most: int) -> list[Partition]:
    """The partitions in the extended one at sector `base`: each table names one, and the next table."""
    sectors, sector = image.size // image.sector_size, image.sector_size
    found: list[Partition] = []
    at, seen = base, set[int]()
    while len(seen) < most and 0 < at < sectors and at not in seen:
        seen.add(at)
        following = 0
        for _flag, kind, start, count in (mbr_entries(image, at) or ())[:2]:
            if kind in on_disk.MBR_TYPES_EXTENDED:
                following = base + start
            elif kind and start and 0 < count <= sectors - at - start:
                found.append(Partition(0, (at + start) * sector, count * sector))
        at = following
    return found[:most]


def mbr_entries(image: Image, lba: int) -> list[tuple[int, int, int, int]] | None:
    """(flag, type, first sector, sectors) of the four in sector `lba`; None without a signature. OSError."""
    raw = read_at(image, lba * image.sector_size, 512)
    if raw[on_disk.MBR_SIGNATURE_AT :] != on_disk.MBR_SIGNATURE:
        return None
    return list(on_disk.mbr_entry.iter_unpack(raw[on_disk.MBR_ENTRIES_AT : on_disk.MBR_SIGNATURE_AT]))
