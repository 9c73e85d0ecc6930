"""A large VHDX of which little was written: who goes through it looks at pages of its BAT, not at blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from disk_asker import page_buffer, read

from hvkvm.block.copy import copy
from hvkvm.block.image import Extent
from hvkvm.block.raw import RawImage
from hvkvm.block.vhdx.bat import ENTRIES_A_PAGE, Bat
from hvkvm.block.vhdx.check import check_vhdx
from hvkvm.block.vhdx.compact import compact_vhdx
from hvkvm.block.vhdx.create import VhdxOptions, create_vhdx
from hvkvm.block.vhdx.image import VhdxImage

MIB, TIB = 1 << 20, 1 << 40
SIZE = TIB // 16 - 512 * 1024
BLOCKS = -(-SIZE // MIB)
PAGES = BLOCKS // ENTRIES_A_PAGE
WRITTEN = (0, 1, 510, 511, 512, 4095, 4096, BLOCKS // 2, BLOCKS - 1)
"""Blocks: at the edges of pages of the BAT and of a chunk, behind which is the entry of its bitmap."""


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the BAT is asked."""
    counts: Counter[str] = Counter()

    def counted(name: str, real: Callable[[Bat, int], int]) -> Callable[[Bat, int], int]:
        def look(bat: Bat, which: int) -> int:
            counts[name] += 1
            return real(bat, which)

        return look

    monkeypatch.setattr(Bat, "get", counted("get", Bat.get))
    monkeypatch.setattr(Bat, "absent", counted("absent", Bat.absent))
    return counts


@pytest.fixture
def disk(tmp_path: Path) -> VhdxImage:
    create_vhdx(tmp_path / "disk.vhdx", VhdxOptions(SIZE, block_size=MIB))
    image = VhdxImage(tmp_path / "disk.vhdx")
    for block in WRITTEN:
        image.writev(block * MIB, [page_buffer(512, b"%d," % block)])
    return image


def data_of(image: VhdxImage) -> list[Extent]:
    found = image.extents(0, SIZE)
    at = 0
    for extent in found:
        assert (extent.offset, extent.length > 0) == (at, True)
        at += extent.length
    assert at == SIZE
    return [extent for extent in found if extent.data]


def test_a_disk_is_gone_through_by_pages(disk: VhdxImage, looks: Counter[str], tmp_path: Path) -> None:
    expected = [Extent(block * MIB, min(MIB, SIZE - block * MIB), True) for block in WRITTEN]
    assert data_of(disk) == expected
    chunks = BLOCKS // 4096
    assert looks["absent"] <= PAGES + chunks + 2 * len(WRITTEN)
    assert looks["get"] == len(WRITTEN)
    # From the middle of a block, and to the middle of another.
    half = MIB // 2
    found = disk.extents(510 * MIB + half, 3 * MIB)
    assert found == [
        *(Extent(at, n, True) for at, n in ((510 * MIB + half, half), (511 * MIB, MIB), (512 * MIB, MIB))),
        Extent(513 * MIB, half, False),
    ]
    looks.clear()
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(SIZE)
    raw = RawImage(path)
    # The ends of each piece of 1 GiB, too, are looked at.
    assert copy(disk, raw, lambda _done, _all: None) == sum(min(one.length, 64 << 10) for one in expected)
    assert looks["absent"] <= PAGES + chunks + 2 * len(WRITTEN) + 3 * -(-SIZE >> 30)
    for block in WRITTEN:
        assert read(raw, block * MIB, 8) == (b"%d," % block * 8)[:8]
    raw.close()
    disk.close()


def test_it_is_checked_and_compacted_by_pages(disk: VhdxImage, looks: Counter[str]) -> None:
    path = disk.path
    disk.writev(7 * MIB, [page_buffer(512)])  # zeros, which are left out
    disk.flush()
    notes = check_vhdx(disk)
    assert notes == []
    looks.clear()
    compact_vhdx(disk, lambda _done, _all: None)
    assert looks["absent"] <= PAGES + BLOCKS // 4096 + 2 * len(WRITTEN) + 2
    again = VhdxImage(path)
    assert [extent.offset // MIB for extent in data_of(again)] == list(WRITTEN)
    again.close()


def test_a_child_asks_its_parent_for_all_that_it_has_not(disk: VhdxImage, tmp_path: Path) -> None:
    disk.close()
    path = tmp_path / "child.vhdx"
    create_vhdx(path, VhdxOptions(SIZE, block_size=2 * MIB, parent=disk.path))
    child = VhdxImage(path)
    random = Random(1)
    own = {random.randrange(BLOCKS // 2) for _ in range(20)}
    for block in own:
        child.writev(block * 2 * MIB, [page_buffer(512, b"x")])
    wanted = {(2 * block + half) * MIB for block in own for half in (0, 1)} | {at * MIB for at in WRITTEN}
    found = {at for one in data_of(child) for at in range(one.offset, one.offset + one.length, MIB)}
    assert found == {at for at in wanted if at < SIZE}
    assert check_vhdx(child) == []
    child.close()
