"""Four jobs at once, 32 requests deep each, on every kind of image: what is read is what was written last.

Each job has every fourth block of the disk to itself, so that jobs meet in every block of the image, bitmap
page and BAT page, and yet each knows what it must find. Requests of one job in flight never overlap.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random

import pytest
from disk_asker import SECONDS, Asker, page_buffer, read

from hvkvm.block.disk import Disk
from hvkvm.block.image import Image, ImageOptions
from hvkvm.block.open_image import open_image
from hvkvm.block.overlay import OverlayImage
from hvkvm.block.request import Op, Request, Result, Status
from hvkvm.block.vhdx.create import VhdxOptions, create_vhdx

MIB = 1 << 20
SIZE = 16 * MIB
BLOCK = 4096
JOBS = 4
DEPTH = 32
REQUESTS = int(os.environ.get("HVKVM_PATTERN_REQUESTS", "400"))


class Job:
    """One job: on the loop only."""

    def __init__(
        self, disk: Disk, number: int, model: bytearray, failed: list[object], ended: threading.Event
    ) -> None:
        self._disk = disk
        self._random = Random(number)
        self._blocks = list(range(number * BLOCK, SIZE, JOBS * BLOCK))
        self._model = model
        self._busy: set[int] = set()
        self._left = REQUESTS
        self._flying = 0
        self._failed = failed
        self._ended = ended

    def start(self) -> None:
        for _ in range(DEPTH):
            self._next()

    def _next(self) -> None:
        if not self._left or self._failed:
            if not self._flying:
                self._ended.set()
            return
        self._left -= 1
        self._flying += 1
        random = self._random
        at = random.choice(self._blocks)
        while at in self._busy:
            at = random.choice(self._blocks)
        kind = random.random()
        if kind < 0.06:
            self._submit(Op.FLUSH, -1, [], lambda: True)
            return
        self._busy.add(at)
        if kind < 0.4:
            data = page_buffer(BLOCK, random.randbytes(8))
            self._submit(Op.WRITE, at, [data[:1536], data[1536:]], lambda: self._set(at, bytes(data)))
        elif kind < 0.5:
            self._submit(Op.WRITE_ZEROES, at, [], lambda: self._set(at, bytes(BLOCK)))
        elif kind < 0.6:
            # A discard is a hint: zeros or the old data, and then one of them for good.
            self._submit(Op.DISCARD, at, [], lambda: self._look_again(at))
        else:
            page = page_buffer(BLOCK)
            self._submit(Op.READ, at, [page], lambda: bytes(page) == self._model[at : at + BLOCK])

    def _set(self, at: int, data: bytes) -> bool:
        self._model[at : at + BLOCK] = data
        return True

    def _look_again(self, at: int) -> bool:
        page = page_buffer(BLOCK)

        def seen() -> bool:
            found = bytes(page)
            right = found in (bytes(BLOCK), bytes(self._model[at : at + BLOCK]))
            return right and self._set(at, found)

        self._flying += 1
        self._busy.add(at)
        self._submit(Op.READ, at, [page], seen, extra=True)
        return True

    def _submit(
        self, op: Op, at: int, buffers: list[memoryview], check: Callable[[], bool], *, extra: bool = False
    ) -> None:
        def done(result: Result) -> None:
            self._flying -= 1
            self._busy.discard(at)
            if result.status is not Status.OK or not check():
                self._failed.append((op, at, result))
            if not extra or not self._left:
                self._next()

        more = BLOCK if op in (Op.DISCARD, Op.WRITE_ZEROES) else None
        self._disk.submit(Request(op, max(at, 0), buffers, done, length=more))


@pytest.fixture(params=["raw", "dynamic", "differencing", "snapshot", "nbd"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Image, bytes]]:
    data = Random(9).randbytes(SIZE)
    raw = tmp_path / "disk.raw"
    with ExitStack() as stack:
        if request.param in ("raw", "snapshot", "nbd"):
            raw.write_bytes(data)
        if request.param == "raw":
            yield open_image(str(raw)), data
        elif request.param == "snapshot":
            yield OverlayImage(open_image(str(raw), ImageOptions(read_only=True)), str(tmp_path)), data
        elif request.param == "dynamic":
            create_vhdx(tmp_path / "disk.vhdx", VhdxOptions(SIZE, block_size=MIB))
            yield open_image(str(tmp_path / "disk.vhdx")), bytes(SIZE)
        elif request.param == "differencing":
            create_vhdx(tmp_path / "parent.vhdx", VhdxOptions(SIZE, block_size=MIB))
            parent = open_image(str(tmp_path / "parent.vhdx"))
            parent.writev(0, [memoryview(data)])
            parent.close()
            create_vhdx(
                tmp_path / "disk.vhdx", VhdxOptions(0, block_size=MIB, parent=tmp_path / "parent.vhdx")
            )
            yield open_image(str(tmp_path / "disk.vhdx")), data
        else:
            from nbd_servers import qemu_nbd, serving

            if shutil.which("qemu-nbd") is None:
                pytest.skip("qemu-nbd is not installed")
            path = tmp_path / "socket"
            stack.enter_context(serving(qemu_nbd(raw, path), path))
            yield open_image(f"nbd:unix:{path}"), data


def test_what_is_read_is_what_was_written_last(
    asker: Asker, image: tuple[Image, bytes], tiny_switch_interval: None
) -> None:
    opened, data = image
    model = bytearray(data)
    disk = asker.disk(opened, width=6)
    failed: list[object] = []
    ended = [threading.Event() for _ in range(JOBS)]
    jobs = [Job(disk, number, model, failed, event) for number, event in enumerate(ended)]
    for job in jobs:
        asker.loop.call_soon(job.start)
    for event in ended:
        assert event.wait(SECONDS) or failed, disk.inspect()
    assert not failed
    asker.wait(disk.stop)
    assert read(opened, 0, SIZE) == model
    if opened.format == "vhdx" and disk.image is opened:
        path = opened.inspect()["path"]
        opened.close()
        again = open_image(str(path))
        assert read(again, 0, SIZE) == model
        again.close()
