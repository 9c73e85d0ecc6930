"""Disks as bytes for tests: partition tables and superblocks, by the specifications, not our layouts."""

from __future__ import annotations

import struct
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

MIB = 1 << 20
LINUX = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
ROOT = uuid.UUID("4f68bce3-e8cd-4db1-96e7-fbcaf984b709")
ESP = uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
HOME = uuid.UUID("933ac7e1-2eb4-4f13-b844-0e14e2aef915")


def put(disk: bytearray, at: int, data: bytes) -> None:
    """Write into it."""
    disk[at : at + len(data)] = data


def gpt(disk: bytearray, parts: Sequence[tuple[uuid.UUID, int, int]], sector: int = 512) -> None:
    """A GPT of (type, first byte, bytes), with both copies and a protective MBR."""
    sectors = len(disk) // sector
    table = bytearray(128 * 128)
    for index, (kind, at, length) in enumerate(parts):
        entry = struct.pack(
            "<16s16sQQQ",
            kind.bytes_le,
            uuid.uuid4().bytes_le,
            at // sector,
            (at + length) // sector - 1,
            0,
        )
        put(table, index * 128, entry)
    size = -(-len(table) // sector)
    for lba, entries, other in ((1, 2, sectors - 1), (sectors - 1, sectors - 1 - size, 1)):
        fields = [b"EFI PART", 0x10000, 92, 0, 0, lba, other, 2 + size, sectors - 2 - size]
        fields += [uuid.uuid4().bytes_le, entries, 128, 128, crc32(table)]
        header = struct.pack("<8sIIIIQQQQ16sQIII", *fields)
        fields[3] = crc32(header)
        put(disk, lba * sector, struct.pack("<8sIIIIQQQQ16sQIII", *fields))
        put(disk, entries * sector, table)
    mbr(disk, [(0xEE, sector, len(disk) - sector)], sector)


def mbr(
    disk: bytearray, parts: Sequence[tuple[int, int, int]], sector: int = 512, *, at: int = 0, base: int = 0
) -> None:
    """An MBR of (type, first byte, bytes) at byte `at`, its entries counted from byte `base`."""
    for index, (kind, start, length) in enumerate(parts):
        entry = struct.pack(
            "<BBBBBBBBII", 0, 0, 2, 0, kind, 0, 0, 0, (start - base) // sector, length // sector
        )
        put(disk, at + 446 + 16 * index, entry)
    put(disk, at + 510, b"\x55\xaa")


def ext4(folder: Path, size: int, label: str = "", kind: str = "ext4") -> bytes:
    """A real one, from mke2fs."""
    path = folder / f"made.{kind}"
    path.write_bytes(bytes(size))
    subprocess.run(["mke2fs", "-q", "-F", "-t", kind, "-L", label, str(path)], check=True)
    data = path.read_bytes()
    path.unlink()
    return data


def xfs_superblock(size: int, name: uuid.UUID, label: bytes = b"") -> bytes:
    """The first sector of one."""
    raw = bytearray(512)
    put(raw, 0, b"XFSB" + struct.pack(">IQ", 4096, size // 4096))
    put(raw, 32, name.bytes)
    put(raw, 108, label)
    return bytes(raw)


def btrfs_superblock(size: int, name: uuid.UUID) -> bytes:
    """What stands at byte 65536 of one."""
    raw = bytearray(4096)
    put(raw, 32, name.bytes)
    put(raw, 64, b"_BHRfS_M")
    put(raw, 112, struct.pack("<Q", size))
    return bytes(raw)
