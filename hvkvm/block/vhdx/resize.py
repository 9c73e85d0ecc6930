"""Growing a VHDX: its size, and the BAT entries for the new blocks, changed in one flush."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvkvm.block.vhdx.layout import MAX_DISK, SECTOR
from hvkvm.errors import ImageError

if TYPE_CHECKING:
    from hvkvm.block.vhdx.image import VhdxImage


def grow(image: VhdxImage, size: int) -> None:
    """Make `image` `size` bytes; the caller flushes. ImageError for what the file has no room for."""
    old = image.geometry
    if size == old.disk_size:
        return
    why = ""
    if size < old.disk_size:
        why = "a VHDX cannot become smaller"
    elif size % old.sector_size or size > MAX_DISK:
        why = f"not a multiple of {old.sector_size} up to 64 TiB"
    new = old._replace(disk_size=size)
    if not why and new.entries * 8 > image.bat.region.length:
        why = f"its BAT has no room for {new.entries} entries"
    if why:
        raise ImageError(f"{image.path}: {size} bytes: {why}; copy it with hvkvm disk convert --size")
    pages = image.pages
    with pages.lock:
        image.set_geometry(new)
        for index in range(old.entries, new.entries):
            if image.bat.get(index):
                image.bat.set(index, 0)
        raw = size.to_bytes(8, "little")
        for number, byte in enumerate(raw):  # the item may lie across a page's border
            page, at = divmod(image.metadata.size_at + number, SECTOR)
            pages.get(page * SECTOR)[at] = byte
            pages.touch(page * SECTOR)
    if image.metadata.fixed:
        image.allocate(old.blocks, new.blocks)
