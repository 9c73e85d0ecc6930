"""Workers that use one VHDX image at once: its metadata is theirs together, and stays whole."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
from at_once import at_once
from disk_asker import page_buffer, read

from hvkvm.block.vhdx.create import VhdxOptions, create_vhdx
from hvkvm.block.vhdx.image import VhdxImage
from hvkvm.block.vhdx.pages import Pages

MIB = 1 << 20
BLOCKS = 64
THREADS = 4
ROUNDS = 1000
LOOKS = 50000


@pytest.mark.usefixtures("tiny_switch_interval")
@pytest.mark.parametrize("kind", ["dynamic", "differencing"])
def test_workers_read_and_write_one_image(tmp_path: Path, kind: str) -> None:
    """Each in sectors of its own, in the same blocks: BAT entries and bitmaps are the same pages."""
    parent = None
    if kind == "differencing":
        parent = tmp_path / "parent.vhdx"
        create_vhdx(parent, VhdxOptions(BLOCKS * MIB, block_size=MIB))
    path = tmp_path / "disk.vhdx"
    create_vhdx(path, VhdxOptions(BLOCKS * MIB, block_size=MIB, parent=parent))
    image = VhdxImage(path)
    written: list[dict[int, bytes]] = [{} for _ in range(THREADS)]

    def work(number: int) -> None:
        random, mine = Random(number), written[number]
        for _ in range(ROUNDS):
            at = random.randrange(BLOCKS) * MIB + (random.randrange(128) * THREADS + number) * 512
            if random.random() < 0.2:
                mine[at] = random.randbytes(8) * 64
                image.writev(at, [memoryview(mine[at])])
            else:
                buffer = page_buffer(512, b"x" * 512)
                assert image.readv(at, [buffer]) == 512
                assert bytes(buffer) == mine.get(at, bytes(512))
        if number == 0:
            image.flush()
        for _ in range(LOOKS):  # of nothing but the BAT, so that they meet in it
            image.bat.get(random.randrange(BLOCKS))

    at_once(*[partial(work, number) for number in range(THREADS)])
    image.close()
    image = VhdxImage(path)
    for mine in written:
        for at, data in mine.items():
            assert read(image, at, 512) == data
    image.close()


def test_pages_are_not_clean_while_a_flush_fails() -> None:
    """A stable write on another worker asks just then: it was told that all before it is in the log."""
    pages = Pages(SimpleNamespace(pread=lambda _at, n: bytes(n)), lambda _at, _page: None, lambda at: (0, at))  # type: ignore[arg-type]
    with pages.lock:
        pages.change(0, 0, b"x")
    taken = pages.take_dirty()

    class Asked(set[int]):
        def __len__(self) -> int:
            found = super().__len__()
            failing = threading.Thread(target=pages.settled, args=(taken,), kwargs={"failed": True})
            failing.start()
            failing.join(0.2)  # it may have to wait
            return found

    pages._dirty = Asked()
    clean = pages.clean
    pages._dirty = set(pages._dirty)
    assert not clean
