"""Writes that need no worker: into a VHDX's blocks, and into the file of a snapshot. On any file system.

Where the file lies in memory, pwritev waits for nothing; here it is told so of every file.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from disk_asker import Asker, page_buffer, read

from hvkvm.block import file_now
from hvkvm.block.image import ImageOptions
from hvkvm.block.overlay import OverlayImage
from hvkvm.block.raw import RawImage
from hvkvm.block.request import Op, Status
from hvkvm.block.vhdx.create import VhdxOptions, create_vhdx
from hvkvm.block.vhdx.image import VhdxImage

MIB = 1 << 20
BLOCK = MIB


@pytest.fixture(autouse=True)
def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_now, "_in_memory", lambda _fd: True)
    monkeypatch.setattr(file_now, "SLOW_SECONDS", 1000.0)


@pytest.fixture
def vhdx(tmp_path: Path) -> VhdxImage:
    create_vhdx(tmp_path / "disk.vhdx", VhdxOptions(8 * MIB, block_size=BLOCK))
    return VhdxImage(tmp_path / "disk.vhdx")


def test_a_vhdx_is_written_at_once_where_no_metadata_changes(vhdx: VhdxImage) -> None:
    data = [page_buffer(4096, b"\1")]
    assert vhdx.writev_now(0, data) == 0, "the file does not say yet that it changes"
    vhdx.writev(BLOCK, data)
    assert vhdx.writev_now(0, data) == 0, "that block has no place yet"
    assert vhdx.writev_now(2 * BLOCK - 4096, [page_buffer(8192)]) == 0, "nor has all of this"
    assert vhdx.pages.peek(vhdx.bat.region.offset) is not None
    assert vhdx.writev_now(BLOCK + 8192, data) == 4096
    vhdx.flush()
    assert vhdx.writev_now(BLOCK + 4096, [page_buffer(4096, b"\2")]) == 4096
    assert vhdx.pages.clean
    path = vhdx.path
    vhdx.close()
    again = VhdxImage(path, ImageOptions(read_only=True))
    assert read(again, BLOCK, 12288) == b"\1" * 4096 + b"\2" * 4096 + b"\1" * 4096
    assert again.writev_now(BLOCK, data) == 0
    again.close()


def test_a_child_is_written_at_once_only_where_all_of_a_block_is_its_own(tmp_path: Path) -> None:
    parent, path = tmp_path / "parent.vhdx", tmp_path / "child.vhdx"
    create_vhdx(parent, VhdxOptions(4 * MIB, block_size=BLOCK))
    create_vhdx(path, VhdxOptions(4 * MIB, block_size=BLOCK, parent=parent))
    child = VhdxImage(path)
    child.writev(0, [page_buffer(4096, b"\1")])
    assert child.writev_now(0, [page_buffer(4096, b"\2")]) == 0, "its bitmap may have to change"
    child.close()


def test_a_snapshot_is_written_at_once(tmp_path: Path) -> None:
    file = tmp_path / "disk.raw"
    file.write_bytes(b"\7" * MIB)
    snapshot = OverlayImage(RawImage(file, ImageOptions(read_only=True)), str(tmp_path))
    model, random = bytearray(b"\7" * MIB), Random(1)
    for number in range(100):
        offset, n = random.randrange(MIB // 512 - 16) * 512, random.choice((512, 4096, 8192))
        data = random.randbytes(n)
        write = snapshot.writev if number % 3 == 0 else snapshot.writev_now
        assert write(offset, [page_buffer(n, data)]) == n
        model[offset : offset + n] = data
    assert read(snapshot, 0, MIB) == model
    assert snapshot.readv_now(0, [page_buffer(4096)]) in (0, 4096)
    snapshot.close()
    assert file.read_bytes() == b"\7" * MIB


def test_what_was_written_in_part_is_not_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "disk.raw"
    file.write_bytes(b"\7" * MIB)
    snapshot = OverlayImage(RawImage(file, ImageOptions(read_only=True)), str(tmp_path))
    monkeypatch.setattr(file_now.FileNow, "writev", lambda _self, _offset, _buffers: 512)
    assert snapshot.writev_now(0, [page_buffer(4096, b"\1")]) == 512
    assert not snapshot.changed
    assert read(snapshot, 0, 4096) == b"\7" * 4096
    snapshot.close()


def test_many_writes_of_a_vhdx_take_no_worker_each(vhdx: VhdxImage, asker: Asker) -> None:
    disk = asker.disk(vhdx)
    writes = [(Op.WRITE, BLOCK + 4096 * number, page_buffer(4096, b"\3"), {}) for number in range(64)]
    for round_ in range(4):  # the first finds no block, and a few behind it are not tried then
        assert {result.status for result in asker.ask_all(disk, writes)} == {Status.OK}
        assert disk.writes_now.count >= 64 * (round_ - 1)
    assert read(vhdx, BLOCK, 64 * 4096) == b"\3" * 64 * 4096
