"""What file system of Linux lies at a place of a disk: ext2 to ext4, XFS or Btrfs, by its superblock.

The image is hostile: a superblock that does not fit its place is none. Reads block; any thread that may.
"""

from __future__ import annotations

import uuid

from hvkvm.abi import on_disk
from hvkvm.block.image import Image
from hvkvm.block.partitions import read_at
from hvkvm.tuples import NamedTuple


class FileSystem(NamedTuple):
    """`kind` is Linux's name of it. `label` is shown only: printable, and what else it was is `?`."""

    kind: str
    uuid: uuid.UUID
    label: str


def identify(image: Image, offset: int, length: int) -> FileSystem | None:
    """The file system in `length` bytes at `offset`, if one is there and has a UUID. OSError, ImageError."""
    for find in (_ext4, _xfs, _btrfs):
        found = find(image, offset, length)
        if found is not None and found.uuid.int:
            return found
    return None


def _ext4(image: Image, offset: int, length: int) -> FileSystem | None:
    layout = on_disk.ext4_super_block
    raw = read_at(image, offset + on_disk.EXT4_SUPER_BLOCK_AT, layout.size)
    if len(raw) < layout.size:
        return None
    blocks, log_size, magic, compat, incompat, _ro_compat, name, label = layout.unpack(raw)
    if magic != on_disk.EXT4_SUPER_MAGIC or incompat & on_disk.EXT4_FEATURE_INCOMPAT_JOURNAL_DEV:
        return None
    # The high half of the block count can only make it larger.
    if log_size > on_disk.EXT4_MAX_BLOCK_LOG_SIZE or not 0 < blocks << log_size + 10 <= length:
        return None
    if incompat & on_disk.EXT4_FEATURE_INCOMPAT_EXTENTS:
        kind = "ext4"
    else:
        kind = "ext3" if compat & on_disk.EXT4_FEATURE_COMPAT_HAS_JOURNAL else "ext2"
    return FileSystem(kind, uuid.UUID(bytes=name), _shown(label))


def _xfs(image: Image, offset: int, length: int) -> FileSystem | None:
    raw = read_at(image, offset, on_disk.xfs_dsb.size)
    if len(raw) < on_disk.xfs_dsb.size:
        return None
    magic, block_size, blocks, name, label = on_disk.xfs_dsb.unpack(raw)
    if magic != on_disk.XFS_SB_MAGIC or not 0 < block_size * blocks <= length:
        return None
    return FileSystem("xfs", uuid.UUID(bytes=name), _shown(label))


def _btrfs(image: Image, offset: int, length: int) -> FileSystem | None:
    at = on_disk.BTRFS_SUPER_INFO_OFFSET
    raw = read_at(image, offset + at, on_disk.btrfs_super_block.size) if length > at else b""
    if len(raw) < on_disk.btrfs_super_block.size:
        return None
    name, magic, total = on_disk.btrfs_super_block.unpack(raw)
    # Of several devices, so not to be held against this one's length.
    if magic != on_disk.BTRFS_MAGIC or not total:
        return None
    return FileSystem("btrfs", uuid.UUID(bytes=name), "")


def _shown(label: bytes) -> str:
    text = label.split(b"\0")[0].decode(errors="replace")
    return "".join(letter if letter.isprintable() else "?" for letter in text)
