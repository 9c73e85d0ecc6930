"""The region table and the metadata of a VHDX file: read with every bound checked, and built."""

from __future__ import annotations

from pathlib import Path

from hvkvm.block.vhdx import layout
from hvkvm.block.vhdx.header import Header
from hvkvm.block.vhdx.layout import HAS_PARENT, MIB, Geometry
from hvkvm.block.vhdx.locator import ParentLocator, parse_locator
from hvkvm.block.vhdx.patched import Source
from hvkvm.errors import ImageDamaged
from hvkvm.tuples import NamedTuple

MAX_METADATA_BYTES = MIB
"""Items are small; all of them together are read up to this ([MS-VHDX] 2.6.2)."""


class Region(NamedTuple):
    """A part of the file."""

    offset: int
    length: int


class Metadata(NamedTuple):
    """What the metadata items say; `size_at` is the file offset of the virtual disk's size."""

    geometry: Geometry
    physical_sector_size: int
    disk_id: bytes
    fixed: bool
    parent: ParentLocator | None
    size_at: int


def read_regions(path: Path, source: Source, head: Header) -> tuple[Region, Region]:
    """Where the BAT and the metadata lie. ImageDamaged."""
    why = ""
    for table_at in layout.REGION_TABLE_OFFSETS:
        raw = source.pread(table_at, layout.REGION_TABLE_BYTES)
        if len(raw) < layout.REGION_TABLE_BYTES:
            why = "lies beyond the end of the file"
        elif raw[:4] != layout.REGION_SIGNATURE:
            why = "has no signature"
        elif not layout.is_sealed(raw):
            why = "has a wrong checksum"
        else:
            return _parse_regions(path, source, head, table_at, raw)
    at = layout.REGION_TABLE_OFFSETS[0]
    raise ImageDamaged(path, "region table", at, f"neither of the two is valid: the second {why}")


def _parse_regions(
    path: Path, source: Source, head: Header, table_at: int, raw: bytes
) -> tuple[Region, Region]:
    count = layout.region_table_header.unpack_from(raw)[2]
    if count > layout.MAX_REGIONS:
        raise ImageDamaged(
            path, "region table", table_at, f"{count} entries, of {layout.MAX_REGIONS} at most"
        )
    taken = [(0, layout.HEADER_SECTION_BYTES, "the headers"), (head.log_offset, head.log_length, "the log")]
    found: dict[bytes, Region] = {}
    names = {layout.BAT_REGION: "the BAT", layout.METADATA_REGION: "the metadata"}
    for number in range(count):
        at = table_at + layout.region_table_header.size + number * layout.region_table_entry.size
        guid, offset, length, required = layout.region_table_entry.unpack_from(raw, at - table_at)
        name = names.get(guid, "a region")
        if offset % MIB or length % MIB or not length or offset + length > source.size():
            what = f"{name} of {length:#x} bytes at {offset:#x}: not whole MiB inside the file"
            raise ImageDamaged(path, "region table entry", at, what)
        for other, other_length, other_name in taken:
            if offset < other + other_length and other < offset + length:
                raise ImageDamaged(path, "region table entry", at, f"{name} lies upon {other_name}")
        if guid in found:
            raise ImageDamaged(path, "region table entry", at, f"{name} is there twice")
        if guid not in names and required & 1:
            raise ImageDamaged(path, "region table entry", at, "a required region, of which nothing is known")
        taken.append((offset, length, name))
        found[guid] = Region(offset, length)
    for guid, name in names.items():
        if guid not in found:
            raise ImageDamaged(path, "region table", table_at, f"{name} is missing")
    return found[layout.BAT_REGION], found[layout.METADATA_REGION]


_KNOWN = {
    layout.FILE_PARAMETERS: ("file parameters", 8),
    layout.VIRTUAL_DISK_SIZE: ("virtual disk size", 8),
    layout.VIRTUAL_DISK_ID: ("virtual disk id", 16),
    layout.LOGICAL_SECTOR_SIZE: ("logical sector size", 4),
    layout.PHYSICAL_SECTOR_SIZE: ("physical sector size", 4),
    layout.PARENT_LOCATOR: ("parent locator", 0),
}


def read_metadata(path: Path, source: Source, region: Region) -> Metadata:
    """The items that the format requires. ImageDamaged."""
    table = source.pread(region.offset, layout.METADATA_TABLE_BYTES)
    signature, _reserved, count = layout.metadata_table_header.unpack_from(table)
    if signature != layout.METADATA_SIGNATURE:
        raise ImageDamaged(path, "metadata table", region.offset, "has no signature")
    if count > layout.MAX_METADATA:
        what = f"{count} entries, of {layout.MAX_METADATA} at most"
        raise ImageDamaged(path, "metadata table", region.offset, what)
    items: dict[bytes, tuple[int, bytes]] = {}
    for number in range(count):
        at = layout.metadata_table_header.size + number * layout.metadata_table_entry.size
        item, offset, length, flags, _reserved = layout.metadata_table_entry.unpack_from(table, at)
        at += region.offset
        name, size = _KNOWN.get(item, ("", 0))
        if flags & layout.IS_USER or not name:
            if flags & layout.IS_REQUIRED:
                raise ImageDamaged(path, "metadata entry", at, "a required item, of which nothing is known")
            continue
        if item in items:
            raise ImageDamaged(path, "metadata entry", at, f"the {name} is there twice")
        if size and length != size:
            raise ImageDamaged(path, "metadata entry", at, f"a {name} of {length} bytes, not {size}")
        if (
            offset < layout.METADATA_TABLE_BYTES
            or length > MAX_METADATA_BYTES
            or offset + length > region.length
        ):
            raise ImageDamaged(path, "metadata entry", at, f"the {name} lies outside of its region")
        start = (region.offset + offset) // layout.SECTOR * layout.SECTOR
        skip = region.offset + offset - start
        items[item] = region.offset + offset, source.pread(start, skip + length)[skip:]
    return _interpret(path, region, items)


def _interpret(path: Path, region: Region, items: dict[bytes, tuple[int, bytes]]) -> Metadata:
    def item(guid: bytes) -> tuple[int, bytes]:
        if guid not in items:
            raise ImageDamaged(path, "metadata table", region.offset, f"the {_KNOWN[guid][0]} is missing")
        return items[guid]

    def number(guid: bytes) -> tuple[int, int]:
        at, raw = item(guid)
        return at, int.from_bytes(raw, "little")

    at, raw = item(layout.FILE_PARAMETERS)
    block_size, flags = (int.from_bytes(raw[start : start + 4], "little") for start in (0, 4))
    if not layout.MIN_BLOCK <= block_size <= layout.MAX_BLOCK or block_size & block_size - 1:
        what = f"blocks of {block_size} bytes: not a power of two from 1 to 256 MiB"
        raise ImageDamaged(path, "file parameters", at, what)
    at, sector_size = number(layout.LOGICAL_SECTOR_SIZE)
    if sector_size not in (512, 4096):
        raise ImageDamaged(path, "logical sector size", at, f"{sector_size}, neither 512 nor 4096")
    at, physical = number(layout.PHYSICAL_SECTOR_SIZE)
    if physical not in (512, 4096):
        raise ImageDamaged(path, "physical sector size", at, f"{physical}, neither 512 nor 4096")
    size_at, size = number(layout.VIRTUAL_DISK_SIZE)
    if not size or size > layout.MAX_DISK or size % sector_size:
        what = f"{size} bytes: not a multiple of {sector_size} up to 64 TiB"
        raise ImageDamaged(path, "virtual disk size", size_at, what)
    parent = None
    if flags & HAS_PARENT:
        at, raw = item(layout.PARENT_LOCATOR)
        parent = parse_locator(path, at, raw)
    geometry = Geometry(size, block_size, sector_size, parent is not None)
    disk_id = item(layout.VIRTUAL_DISK_ID)[1]
    fixed = bool(flags & layout.LEAVE_BLOCKS_ALLOCATED)
    return Metadata(geometry, physical, disk_id, fixed, parent, size_at)


def build_regions(bat: Region, metadata: Region) -> bytes:
    """The region table for both, sealed."""
    head = layout.region_table_header.pack(layout.REGION_SIGNATURE, 0, 2, 0)
    rows = ((layout.BAT_REGION, bat), (layout.METADATA_REGION, metadata))
    entries = b"".join(layout.region_table_entry.pack(guid, *region, 1) for guid, region in rows)
    return layout.seal((head + entries).ljust(layout.REGION_TABLE_BYTES, b"\0"))


def build_metadata(
    geometry: Geometry, physical_sector_size: int, disk_id: bytes, fixed: bool, locator: bytes
) -> bytes:
    """The metadata table with its items behind it; the beginning of the region."""
    flags = (layout.LEAVE_BLOCKS_ALLOCATED if fixed else 0) | (HAS_PARENT if locator else 0)
    file_item, disk_item = layout.IS_REQUIRED, layout.IS_REQUIRED | layout.IS_VIRTUAL_DISK
    rows = [
        (
            layout.FILE_PARAMETERS,
            geometry.block_size.to_bytes(4, "little") + flags.to_bytes(4, "little"),
            file_item,
        ),
        (layout.VIRTUAL_DISK_SIZE, geometry.disk_size.to_bytes(8, "little"), disk_item),
        (layout.VIRTUAL_DISK_ID, disk_id, disk_item),
        (layout.LOGICAL_SECTOR_SIZE, geometry.sector_size.to_bytes(4, "little"), disk_item),
        (layout.PHYSICAL_SECTOR_SIZE, physical_sector_size.to_bytes(4, "little"), disk_item),
    ]
    if locator:
        rows.append((layout.PARENT_LOCATOR, locator, file_item))
    table = layout.metadata_table_header.pack(layout.METADATA_SIGNATURE, 0, len(rows))
    data = b""
    for guid, item, item_flags in rows:
        offset = layout.METADATA_TABLE_BYTES + len(data)
        table += layout.metadata_table_entry.pack(guid, offset, len(item), item_flags, 0)
        data += item
    return table.ljust(layout.METADATA_TABLE_BYTES, b"\0") + data
