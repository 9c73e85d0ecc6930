"""Which file system is a machine's root: on whole disks, GPT and MBR, and what hostile disks can do."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from disk_images import (
    ESP,
    HOME,
    LINUX,
    MIB,
    ROOT,
    btrfs_superblock,
    ext4,
    gpt,
    mbr,
    put,
    xfs_superblock,
)
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.block.file_systems import FileSystem
from hvkvm.block.partitions import MAX_ENTRIES, MAX_LOGICAL, partitions
from hvkvm.block.raw import RawImage
from hvkvm.block.root_search import Candidate, candidates, likely

NAME = uuid.UUID("11111111-2222-3333-4444-555555555555")
OTHER = uuid.UUID("99999999-2222-3333-4444-555555555555")
Opener = Callable[..., RawImage]


@pytest.fixture(scope="module")
def small_ext4(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return ext4(tmp_path_factory.mktemp("ext4"), MIB, "roots")


def found(image: RawImage) -> list[str]:
    return [str(one) for one in likely(candidates("d", image))]


@pytest.mark.parametrize("kind", ["ext2", "ext3", "ext4"])
def test_whole_disk_with_ext(opened: Opener, tmp_path: Path, kind: str) -> None:
    data = ext4(tmp_path, 4 * MIB, "my root", kind)
    image = opened(data)
    assert found(image) == [f'{kind} "my root" on d']
    (one,) = candidates("d", image)
    assert one.system.uuid.bytes == data[1024 + 104 : 1024 + 120]


def test_whole_disk_with_xfs_and_with_btrfs(opened: Opener) -> None:
    disk = bytearray(MIB)
    put(disk, 0, xfs_superblock(MIB, NAME, b"data\x1b[2J"))
    assert found(opened(disk)) == ['xfs "data?[2J" on d']  # a label cannot write to our terminal
    disk = bytearray(MIB)
    put(disk, 65536, btrfs_superblock(MIB, NAME))
    assert candidates("d", opened(disk)) == [Candidate("d", 0, FileSystem("btrfs", NAME, ""), False)]


@pytest.mark.parametrize("sector", [512, 4096])
def test_partition_of_the_type_root_comes_first(opened: Opener, small_ext4: bytes, sector: int) -> None:
    disk = bytearray(6 * MIB)
    gpt(disk, [(ESP, MIB, MIB), (LINUX, 2 * MIB, MIB), (ROOT, 3 * MIB, MIB)], sector)
    put(disk, 2 * MIB, small_ext4)
    put(disk, 3 * MIB, xfs_superblock(MIB, NAME))
    assert found(opened(disk, sector)) == ["xfs on partition 3 of d"]


def test_only_linux_file_system_is_the_root(opened: Opener, small_ext4: bytes) -> None:
    disk = bytearray(6 * MIB)
    gpt(disk, [(ESP, MIB, MIB), (HOME, 2 * MIB, MIB), (LINUX, 3 * MIB, MIB)])
    put(disk, 2 * MIB, small_ext4)  # /home by its type
    put(disk, 3 * MIB, small_ext4)
    assert found(opened(disk)) == ['ext4 "roots" on partition 3 of d']


def test_second_copy_of_a_gpt_serves_when_the_first_is_broken(opened: Opener, small_ext4: bytes) -> None:
    disk = bytearray(4 * MIB)
    gpt(disk, [(LINUX, MIB, MIB)])
    put(disk, MIB, small_ext4)
    for at in (512 + 72, 1024 + 32):  # where the entries lie, and an entry
        broken = bytearray(disk)
        broken[at] ^= 0xFF
        assert found(opened(broken)) == ['ext4 "roots" on partition 1 of d']


def test_mbr_with_primary_and_logical_partitions(opened: Opener, small_ext4: bytes) -> None:
    disk = bytearray(12 * MIB)
    mbr(disk, [(0x0C, MIB, MIB), (0x05, 2 * MIB, 8 * MIB)])
    # Each logical partition counts from its own table, the next table from the extended partition.
    mbr(disk, [(0x83, 3 * MIB, MIB), (0x05, 5 * MIB, 2 * MIB)], at=2 * MIB, base=2 * MIB)
    put(disk, 2 * MIB + 446 + 16 + 8, (3 * MIB // 512).to_bytes(4, "little"))
    mbr(disk, [(0x83, 6 * MIB, MIB)], at=5 * MIB, base=5 * MIB)
    image = opened(disk)
    assert [(one.number, one.offset // MIB) for one in partitions(image) or ()] == [(1, 1), (5, 3), (6, 6)]
    put(disk, 6 * MIB, small_ext4)
    assert found(opened(disk)) == ['ext4 "roots" on partition 6 of d']


def test_boot_code_of_a_file_system_is_no_partition_table(opened: Opener, small_ext4: bytes) -> None:
    disk = bytearray(small_ext4)
    put(disk, 510, b"\x55\xaa")
    assert found(opened(disk)) == ['ext4 "roots" on d']
    put(disk, 446, bytes(range(1, 65)))  # nonsense where the entries would be
    assert found(opened(disk)) == ['ext4 "roots" on d']


def test_several_and_none(opened: Opener, small_ext4: bytes) -> None:
    disk = bytearray(4 * MIB)
    assert found(opened(disk)) == []
    gpt(disk, [(LINUX, MIB, MIB), (LINUX, 2 * MIB, MIB)])
    assert found(opened(disk)) == []
    put(disk, MIB, small_ext4)
    put(disk, 2 * MIB, small_ext4)
    assert len(found(opened(disk))) == 2


def test_devices_of_one_btrfs_are_one() -> None:
    one = FileSystem("btrfs", NAME, "")
    pool = [Candidate("a", 0, one, False), Candidate("b", 0, one, False)]
    assert likely(pool) == pool[:1]
    copies = [pool[0], Candidate("c", 0, one._replace(uuid=OTHER), False)]
    assert likely(copies) == copies


def test_swap_of_ext4_journal_and_a_superblock_too_large_are_no_file_system(
    opened: Opener, small_ext4: bytes
) -> None:
    journal = bytearray(small_ext4)
    journal[1024 + 96] |= 8
    assert found(opened(journal)) == []
    assert found(opened(small_ext4[: MIB // 2])) == []
    nameless = bytearray(small_ext4)
    put(nameless, 1024 + 104, bytes(16))
    assert found(opened(nameless)) == []


def logical_loop(disk: bytearray) -> None:
    """Tables of logical partitions that lead to one another for ever."""
    mbr(disk, [(0x05, MIB, 2 * MIB)])
    for at, following in ((1, 2), (2, 1)):
        mbr(disk, [(0x83, at * MIB + 512, 512), (0x05, (at + 1) * MIB, MIB)], at=at * MIB, base=at * MIB)
        put(disk, at * MIB + 446 + 16 + 8, ((following - 1) * MIB // 512).to_bytes(4, "little"))


def test_loop_of_logical_partitions_ends(opened: Opener) -> None:
    disk = bytearray(4 * MIB)
    logical_loop(disk)
    assert [one.number for one in partitions(opened(disk)) or ()] == [5, 6]


class Memory:
    """An image in memory: what the search needs of one."""

    sector_size = 512

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)
        self.read = 0

    def readv(self, offset: int, buffers: list[memoryview]) -> int:
        (buffer,) = buffers
        part = self.data[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        self.read += len(part)
        return len(part)


def _disks() -> list[bytearray]:
    with_gpt, with_mbr, plain, loop = (bytearray(4 * MIB) for _ in range(4))
    gpt(with_gpt, [(LINUX, MIB, MIB), (ROOT, 2 * MIB, MIB)])
    mbr(with_mbr, [(0x83, MIB, MIB), (0x05, 2 * MIB, MIB)])
    mbr(with_mbr, [(0x83, 2 * MIB + 512, 512)], at=2 * MIB, base=2 * MIB)
    logical_loop(loop)
    for disk, at in ((with_gpt, MIB), (with_mbr, MIB), (plain, 0)):
        put(disk, at + 65536, btrfs_superblock(MIB, NAME))
        put(disk, at, xfs_superblock(MIB, NAME))
    return [with_gpt, with_mbr, plain, loop]


DISKS = _disks()
BYTES = st.one_of(st.binary(min_size=1, max_size=1), st.binary(min_size=4, max_size=8))
PLACES = st.one_of(
    st.integers(0, 511),
    st.integers(512, 512 + 100),
    st.integers(1024, 1024 + 300),
    st.sampled_from((MIB, 2 * MIB, MIB + 65536, 65536)).flatmap(lambda at: st.integers(at, at + 600)),
)


@given(disk=st.sampled_from(DISKS), changes=st.lists(st.tuples(PLACES, BYTES), max_size=6), cut=st.data())
def test_hostile_disks_are_read_or_passed_over(
    disk: bytearray, changes: list[tuple[int, bytes]], cut: st.DataObject
) -> None:
    changed = bytearray(disk)
    for at, data in changes:
        put(changed, at, data)
    sectors = cut.draw(st.sampled_from((len(changed) // 512, 0, 1, 3, 4000)))
    image = Memory(bytes(changed[: sectors * 512]))
    table = partitions(image) or []  # type: ignore[arg-type]
    assert len(table) <= MAX_ENTRIES + MAX_LOGICAL
    assert all(0 < one.offset < one.offset + one.length <= image.size for one in table)
    found = likely(candidates("d", image))  # type: ignore[arg-type]
    assert all(one.system.label.isprintable() for one in found)
    assert image.read <= 4 * MIB + 2 * (MAX_ENTRIES + MAX_LOGICAL) * 4096 * 4


@given(st.binary(max_size=3 * 512 * 64))
def test_any_bytes_are_a_disk(data: bytes) -> None:
    candidates("d", Memory(data[: len(data) // 512 * 512]))  # type: ignore[arg-type]
