"""A new VHDX file: fixed, dynamic or differencing.

Layout: the headers, a log of 1 MiB, 1 MiB of metadata, the BAT, then the blocks. The file is a VHDX only
once its first bytes are written, which is last.
"""

from __future__ import annotations

import os
from array import array
from os import urandom
from pathlib import Path
from uuid import uuid4

from hvkvm.block.host_file import HostFile
from hvkvm.block.image import ImageOptions
from hvkvm.block.vhdx import layout
from hvkvm.block.vhdx.header import Header
from hvkvm.block.vhdx.layout import FULLY_PRESENT, MIB, NO_GUID, Geometry
from hvkvm.block.vhdx.locator import build_locator
from hvkvm.block.vhdx.regions import Region, build_metadata, build_regions
from hvkvm.errors import ImageError
from hvkvm.tuples import NamedTuple

LOG = Region(MIB, MIB)
METADATA = Region(2 * MIB, MIB)
BAT_OFFSET = 3 * MIB

DEFAULT_BLOCK = 32 * MIB
DEFAULT_CHILD_BLOCK = 2 * MIB


class VhdxOptions(NamedTuple):
    """How a new VHDX is to be; sizes in bytes, 0 for the usual. A child has its parent's size if 0."""

    size: int
    block_size: int = 0
    sector_size: int = 0
    physical_sector_size: int = 4096
    fixed: bool = False
    parent: Path | None = None
    disk_id: bytes = b""
    data_write_guid: bytes = b""


def create_vhdx(path: Path, options: VhdxOptions) -> None:
    """Make the file, which must not be there. ImageError, and then nothing is left behind."""
    locator = b""
    size, sector_size = options.size, options.sector_size
    if options.parent is not None:
        from hvkvm.block.vhdx.image import VhdxImage

        above = VhdxImage(options.parent, ImageOptions(read_only=True))
        try:
            size, sector_size = size or above.size, sector_size or above.sector_size
            locator = build_locator(above.header.data_write_guid, options.parent, path)
            parent_sector = above.sector_size
        finally:
            above.close()
        if sector_size != parent_sector:
            raise ImageError(f"{path}: sectors of {sector_size} bytes, and its parent's have {parent_sector}")
        if options.fixed:
            raise ImageError(f"{path}: a disk with a parent cannot be fixed")
    sector_size = sector_size or 512
    usual = DEFAULT_CHILD_BLOCK if options.parent is not None else DEFAULT_BLOCK
    geometry = Geometry(size, options.block_size or usual, sector_size, options.parent is not None)
    _check(path, geometry)
    metadata = build_metadata(
        geometry, options.physical_sector_size, options.disk_id or uuid4().bytes_le, options.fixed, locator
    )
    file = HostFile(path, read_only=False, create=True)
    try:
        _write(file, geometry, metadata, options)
    except OSError as error:
        os.unlink(path)
        raise ImageError(f"{path}: {error.strerror}") from None
    except BaseException:
        os.unlink(path)
        raise
    finally:
        file.close()


def _check(path: Path, geometry: Geometry) -> None:
    block_size, sector_size, size = geometry.block_size, geometry.sector_size, geometry.disk_size
    if sector_size not in (512, 4096):
        raise ImageError(f"{path}: sectors of {sector_size} bytes: choose 512 or 4096")
    if not layout.MIN_BLOCK <= block_size <= layout.MAX_BLOCK or block_size & block_size - 1:
        raise ImageError(f"{path}: blocks of {block_size} bytes: choose a power of two from 1M to 256M")
    if not 0 < size <= layout.MAX_DISK or size % sector_size:
        raise ImageError(f"{path}: a disk of {size} bytes: choose a multiple of {sector_size} up to 64T")


def _write(file: HostFile, geometry: Geometry, metadata: bytes, options: VhdxOptions) -> None:
    bat = Region(BAT_OFFSET, -(-geometry.entries * 8 // MIB) * MIB)
    end = bat.offset + bat.length
    # The log and the usual BAT have their space from the start: a full host must not keep a flush from it.
    file.allocate(0, min(end, BAT_OFFSET + MIB))
    if options.fixed:
        entries = array("Q", bytes(geometry.entries * 8))
        for block in range(geometry.blocks):
            entries[geometry.payload_index(block)] = end + block * geometry.block_size | FULLY_PRESENT
        end += geometry.blocks * geometry.block_size
        file.allocate(0, end)
        file.pwrite(bat.offset, entries.tobytes())
    file.truncate(end)
    file.pwrite(METADATA.offset, metadata)
    table = build_regions(bat, METADATA)
    for offset in layout.REGION_TABLE_OFFSETS:
        file.pwrite(offset, table)
    head = Header(1, 1, urandom(16), options.data_write_guid or urandom(16), NO_GUID, LOG.length, LOG.offset)
    for _ in range(2):
        head = head.next()
        file.pwrite(head.offset, head.pack())
    file.sync()
    creator = "hvkvm".encode("utf-16-le")
    file.pwrite(0, (layout.FILE_SIGNATURE + creator).ljust(layout.SECTOR, b"\0"))
    file.sync()
