"""Growing a VHDX: its size, and the BAT entries for the new blocks, changed in one flush."""

from __future__ import annotations

from pathlib import Path

from hvkvm.block.vhdx.layout import MAX_DISK, SECTOR, Geometry
from hvkvm.block.vhdx.pages import Pages
from hvkvm.errors import ImageError


def grown(path: Path, old: Geometry, size: int, bat_length: int) -> Geometry:
    """`old` with `size` bytes. ImageError for what the file's BAT of `bat_length` bytes has no room for."""
    why = ""
    if size < old.disk_size:
        why = "a VHDX cannot become smaller"
    elif size % old.sector_size or size > MAX_DISK:
        why = f"not a multiple of {old.sector_size} up to 64 TiB"
    new = old._replace(disk_size=size)
    if not why and new.entries * 8 > bat_length:
        why = f"its BAT has no room for {new.entries} entries"
    if why:
        raise ImageError(f"{path}: {size} bytes: {why}; copy it with hvkvm disk convert --size")
    return new


def store_size(pages: Pages, at: int, size: int) -> None:
    """Write the metadata item of the size, at `at` in the file. With `pages.lock` held. OSError."""
    for number, byte in enumerate(size.to_bytes(8, "little")):  # the item may lie across a page's border
        page, within = divmod(at + number, SECTOR)
        pages.change(page * SECTOR, within, bytes((byte,)))
