"""A raw disk after a crash at every flush point: what was told to be stable is there, and nothing made up.

Requests run at once as a guest's do, and what the workers did to the file is recorded (`flush_log`). The log
is replayed to each moment at which the guest was told that something is stable, as dm-log-writes does: with
nothing of what was not synced, with all of it, and with some of it, torn.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from crash_log import contents_of
from disk_asker import Asker, page_buffer, read
from flush_log import Crashes, FlushLog, recording
from told_stable import Told

from hvkvm.block.disk import Disk
from hvkvm.block.image import ImageOptions
from hvkvm.block.raw import RawImage
from hvkvm.block.request import Op, Request, Result, Status
from hvkvm.errors import ImageError

pytestmark = pytest.mark.timeout(1800)  # a slow host's flushes take their time

SIZE = 1 << 20
SECTOR = 512
DEPTH = 32
REQUESTS = int(os.environ.get("HVKVM_CRASH_REQUESTS", "300"))
SEEDS = int(os.environ.get("HVKVM_CRASH_SEEDS", "1"))
VARIANTS = int(os.environ.get("HVKVM_CRASH_VARIANTS", "1"))


class Guest:
    """Keeps 32 requests in flight, and writes down what it asked for and was told. On the loop."""

    def __init__(self, disk: Disk, told: Told, log: FlushLog, random: Random, block: int) -> None:
        self._disk = disk
        self._told = told
        self._log = log
        self._random = random
        self._block = block
        self._busy: set[int] = set()
        self._flying = self._asked = 0
        self._done: dict[int, int] = {}
        """By sector: how many of its versions are written."""
        self.flushes = 0
        self.failed: list[Result] = []
        self.ended = threading.Event()

    def start(self) -> None:
        while self._flying < DEPTH and self._asked < REQUESTS and not self.failed:
            self._next()
        if not self._flying:
            self.ended.set()

    def _next(self) -> None:
        self._asked += 1
        random = self._random
        kind = random.random()
        if kind < 0.12:
            covered = dict(self._done)
            self._submit(Request(Op.FLUSH, 0, (), lambda result: self._flushed(result, covered)))
            return
        blocks = random.choice((1, 1, 2, 6))
        first = random.randrange(SIZE // self._block - blocks)
        if not self._busy.isdisjoint(range(first, first + blocks)):
            self._asked -= 1  # no two in flight at one place
            return
        self._busy.update(range(first, first + blocks))
        offset, length = first * self._block, blocks * self._block
        sectors = range(offset // SECTOR, (offset + length) // SECTOR)
        fua = random.random() < 0.1
        op = Op.WRITE if kind < 0.75 else Op.WRITE_ZEROES if kind < 0.88 else Op.DISCARD
        buffer = page_buffer(length)
        for at, sector in enumerate(sectors):
            data = bytes(SECTOR)
            if op is Op.WRITE:
                data = f"request {self._asked} sector {sector} ".encode().ljust(SECTOR, b".")
            buffer[at * SECTOR : (at + 1) * SECTOR] = data
            self._told.begin(len(self._log.steps), sector, data, maybe=op is Op.DISCARD)
        versions = self._told.versions()
        wrote = {sector: versions[sector] for sector in sectors}
        more = None if op is Op.WRITE else length

        def done(result: Result) -> None:
            self._busy.difference_update(range(first, first + blocks))
            self._done.update(wrote)
            self._flushed(result, wrote if fua and op is not Op.DISCARD else {})

        self._submit(Request(op, offset, [buffer] if op is Op.WRITE else (), done, length=more, fua=fua))

    def _submit(self, request: Request) -> None:
        self._flying += 1
        self._disk.submit(request)

    def _flushed(self, result: Result, versions: dict[int, int]) -> None:
        self._flying -= 1
        if result.status is not Status.OK:
            self.failed.append(result)
        if versions:
            self.flushes += 1
            self._told.flushed(len(self._log.steps), versions)
        self.start()


def worked(
    asker: Asker, path: Path, monkeypatch: pytest.MonkeyPatch, options: ImageOptions, seed: int
) -> tuple[FlushLog, Told]:
    """What was done to the file and told to a guest that worked on it; the file is as it was before."""
    try:
        image = RawImage(path, options)
    except ImageError as error:  # no O_DIRECT here
        pytest.skip(str(error))
    told = Told()
    with recording(monkeypatch, lambda: image.file.fd) as log:
        disk = asker.disk(image, width=6)
        guest = Guest(disk, told, log, Random(seed), max(image.sector_size, SECTOR))
        asker.loop.call_soon(guest.start)
        assert guest.ended.wait(900), disk.inspect()
        asker.wait(disk.close)
    assert not guest.failed
    assert guest.flushes > REQUESTS // 20
    return log, told


def lost(
    crashes: Crashes, log: FlushLog, told: Told, first: bytes, reopened: Callable[..., bytes]
) -> list[str]:
    """What a crash at any moment at which something was told would have lost, or made up."""
    random = Random(1)
    points = sorted({when for when, _versions in told.stable} | {len(log.steps)})
    wrong = []
    for point in points:
        crashes.go_to(point)
        stable = told.stable_at(point)
        allowed = {
            sector: told.allowed(point, sector, first[sector * SECTOR :][:SECTOR], stable.get(sector, 0))
            for sector in told.written
        }
        some = [crashes.some(random) for _ in range(VARIANTS)]
        for contents in (crashes.least(), crashes.most(), *some):
            whole = reopened(contents)
            assert len(whole) == SIZE
            for sector in range(SIZE // SECTOR):
                at = slice(sector * SECTOR, (sector + 1) * SECTOR)
                found = whole[at]
                if found not in allowed.get(sector, (first[at],)):
                    wrong.append(f"crash after step {point} of {len(log.steps)}: {sector} has {found[:40]!r}")
    return wrong


def opener(tmp_path: Path, options: ImageOptions) -> Callable[..., bytes]:
    """Writes a crashed file, opens it as hvkvm does, and reads all of it."""

    def reopened(contents) -> bytes:  # type: ignore[no-untyped-def]
        crashed = tmp_path / "crashed.raw"
        contents.save(crashed)
        again = RawImage(crashed, options)
        try:
            return read(again, 0, again.size)
        finally:
            again.close()

    return reopened


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_a_crash_at_any_flush_point_loses_nothing_told_stable(
    asker: Asker, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str, seed: int
) -> None:
    options = ImageOptions(cache=cache, sector_size=4096 if cache == "none" else 512)
    first, before = file.read_bytes(), contents_of(file)
    log, told = worked(asker, file, monkeypatch, options, seed)
    found = lost(Crashes(before, log), log, told, first, opener(tmp_path, options))
    assert not found, "\n".join(found[:10])
    whole = Crashes(before, log)
    whole.go_to(len(log.steps))
    assert opener(tmp_path, options)(whole.least()) == file.read_bytes(), "the log is not what was done"


def test_a_disk_that_lies_is_found_out(
    asker: Asker, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same check finds a flush that does nothing."""
    first, before = file.read_bytes(), contents_of(file)
    monkeypatch.setattr(RawImage, "flush", lambda _image: None)
    log, told = worked(asker, file, monkeypatch, ImageOptions(), 1)
    assert lost(Crashes(before, log), log, told, first, opener(tmp_path, ImageOptions()))
