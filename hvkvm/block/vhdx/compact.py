"""A VHDX without the blocks that it does not need: written anew beside the old one, then put in its place."""

from __future__ import annotations

import os
from pathlib import Path

from hvkvm.block.copy import PIECE, Progress, copy_range, piece
from hvkvm.block.vhdx.create import VhdxOptions, create_vhdx
from hvkvm.block.vhdx.image import VhdxImage
from hvkvm.block.vhdx.layout import FULLY_PRESENT, NOT_PRESENT, PARTIALLY_PRESENT, STATE_MASK
from hvkvm.errors import ImageError
from hvkvm.given_file import beside, make_name_stable


def compact_vhdx(image: VhdxImage, progress: Progress) -> None:
    """Replace the file of `image`, which is open for writing and is closed then. ImageError, OSError.

    A crash leaves the old file or the new one, whole. Children stay its children. The new one has the old
    one's mode, owner and group, and where this user may not give it those, nothing is done.
    """
    metadata, geometry = image.metadata, image.geometry
    if metadata.fixed:
        raise ImageError(f"{image.path}: a fixed disk keeps its space; convert it to a dynamic one")
    path = image.path.resolve()
    old = os.stat(path)
    if old.st_nlink > 1:
        raise ImageError(
            f"{image.path}: the file has {old.st_nlink} names (hard links), and the others would keep the old"
            " one; remove them, or make a compact copy by `hvkvm disk convert`"
        )
    fresh = beside(path)
    options = VhdxOptions(
        geometry.disk_size,
        block_size=geometry.block_size,
        sector_size=geometry.sector_size,
        physical_sector_size=metadata.physical_sector_size,
        parent=image.parent.path if image.parent is not None else None,
        disk_id=metadata.disk_id,
        data_write_guid=image.header.data_write_guid,
    )
    create_vhdx(fresh, options)
    try:
        target = VhdxImage(fresh)
        try:
            _belong_alike(fresh, old, image)  # before it has what others may not read
            target.flusher.keep_data_guid = True
            _copy_blocks(image, target, progress)
        finally:
            target.close()
        os.rename(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    image.close()
    make_name_stable(path)


def _belong_alike(fresh: Path, old: os.stat_result, image: VhdxImage) -> None:
    """Give `fresh` the owner, group and mode of `old`. ImageError: else who uses the disk could lose it."""
    made = os.stat(fresh)
    if (made.st_uid, made.st_gid) != (old.st_uid, old.st_gid):
        try:
            os.chown(fresh, old.st_uid, old.st_gid)
        except PermissionError:
            raise ImageError(
                f"{image.path}: this user cannot leave it to its owner and group ({old.st_uid}:{old.st_gid});"
                " compact it as its owner, who is in that group, or as root"
            ) from None
    os.chmod(fresh, old.st_mode & 0o7777)  # behind chown, which takes some bits away


def _copy_blocks(image: VhdxImage, target: VhdxImage, progress: Progress) -> None:
    geometry = image.geometry
    view = piece()
    block, blocks = 0, geometry.blocks
    while block < blocks:
        if absent := image.bat.absent(block):
            block += absent
            progress(min(block * geometry.block_size, geometry.disk_size), geometry.disk_size)
            continue
        state = image.bat.get(geometry.payload_index(block)) & STATE_MASK
        start = block * geometry.block_size
        length = min(geometry.block_size, geometry.disk_size - start)
        if state == NOT_PRESENT:
            pass
        elif state == PARTIALLY_PRESENT:
            at = start
            for n, ours in image.bitmaps.runs(block, 0, length):
                if ours:
                    _copy_all(image, target, at, n, view)
                at += n
        elif state == FULLY_PRESENT and image.parent is not None:
            _copy_all(image, target, start, length, view)
        elif state == FULLY_PRESENT:
            copy_range(image, target, start, length, view, lambda _done, _all: None, geometry.disk_size)
        else:
            target.write_zeroes(start, length)
        progress(start + length, geometry.disk_size)
        block += 1
    target.flush()


def _copy_all(image: VhdxImage, target: VhdxImage, offset: int, length: int, view: memoryview) -> None:
    """Zeros, too: they are its own, whatever the parent has there."""
    for at in range(0, length, PIECE):
        n = min(PIECE, length - at)
        image.readv(offset + at, [view[:n]])
        target.writev(offset + at, [view[:n]])
