"""What was flushed is there after a crash at any moment: after each write to the file, torn ones, too."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import pytest
from crash_log import contents_of, crashes, recording
from disk_asker import read
from told_stable import Told

from hvkvm.block import host_file
from hvkvm.block.vhdx.create import VhdxOptions, create_vhdx
from hvkvm.block.vhdx.image import VhdxImage

MIB = 1 << 20
SIZE = 5 * MIB
SECTOR = 512
STEPS = int(os.environ.get("HVKVM_CRASH_STEPS", "14"))
SEEDS = int(os.environ.get("HVKVM_CRASH_SEEDS", "1"))
VARIANTS = int(os.environ.get("HVKVM_CRASH_VARIANTS", "1"))


def run(image: VhdxImage, told: Told, random: Random, now, number: int) -> None:  # type: ignore[no-untyped-def]
    """One of the things a guest does."""
    kind = random.random()
    first = random.randrange(SIZE // SECTOR)
    n = min(random.choice((1, 3, 8, 40)), SIZE // SECTOR - first)
    if kind < 0.55:
        fua = random.random() < 0.2
        data = [
            f"write {number} sector {sector} ".encode().ljust(SECTOR, b".")
            for sector in range(first, first + n)
        ]
        for sector, one in enumerate(data, first):
            told.begin(now(), sector, one)
        versions = told.versions()
        image.writev(first * SECTOR, [memoryview(b"".join(data))], fua=fua)
        if fua:
            told.flushed(now(), {sector: versions[sector] for sector in range(first, first + n)})
    elif kind < 0.7:
        if random.random() < 0.3:
            first, n = first // 2048 * 2048, 2048
        for sector in range(first, first + n):
            told.begin(now(), sector, bytes(SECTOR))
        image.write_zeroes(first * SECTOR, n * SECTOR)
    else:
        versions = told.versions()
        image.flush()
        told.flushed(now(), versions)


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize(
    "kind", ["dynamic", "differencing", "tiny log entries", "differencing, tiny log entries"]
)
def test_a_crash_at_any_write_loses_nothing_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, seed: int
) -> None:
    random = Random(f"{kind} {seed}")
    path = tmp_path / "disk.vhdx"
    parent = None
    first = bytes(SIZE)
    if kind.startswith("differencing"):
        parent = tmp_path / "parent.vhdx"
        create_vhdx(parent, VhdxOptions(SIZE, block_size=MIB))
        image = VhdxImage(parent)
        first = bytes(MIB) + random.randbytes(3 * MIB) + bytes(SIZE - 4 * MIB)
        image.writev(0, [memoryview(first)])
        image.close()
    if kind.endswith("tiny log entries"):
        monkeypatch.setattr("hvkvm.block.vhdx.flusher.BATCH", 1)
    create_vhdx(path, VhdxOptions(SIZE, block_size=MIB, parent=parent))
    before = contents_of(path)
    image = VhdxImage(path)
    told = Told()
    with recording(monkeypatch, lambda: image.file.fd) as log:
        for number in range(STEPS):
            run(image, told, random, lambda: len(log), number)
        versions = told.versions()
        image.close()
        told.flushed(len(log), versions)
    crashed = tmp_path / "crashed.vhdx"
    checked = 0
    # The file of the crash itself need not outlive one.
    monkeypatch.setattr(host_file.os, "fdatasync", lambda _fd: None)
    for step, contents in crashes(before, log, random, variants=VARIANTS):
        contents.save(crashed)
        again = VhdxImage(crashed, parent=parent)
        try:
            whole = read(again, 0, SIZE)
        finally:
            again.close()
        stable = told.stable_at(step)
        for sector in told.written:
            at = slice(sector * SECTOR, (sector + 1) * SECTOR)
            found = whole[at]
            assert found in told.allowed(step, sector, first[at], stable.get(sector, 0)), (
                f"crash after step {step} of {len(log)}: sector {sector} has {found[:40]!r}"
            )
        checked += 1
    assert checked > len(log)


def test_a_flush_that_fails_says_so_and_keeps_what_was_stable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.vhdx"
    create_vhdx(path, VhdxOptions(SIZE, block_size=MIB))
    image = VhdxImage(path)
    image.writev(0, [memoryview(b"stable".ljust(SECTOR, b"."))])
    image.flush()
    image.writev(2 * MIB, [memoryview(bytes(SECTOR))])

    def failing(_fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(host_file.os, "fdatasync", failing)
        with pytest.raises(OSError, match="Input/output error"):
            image.flush()
    for _ in range(2):
        with pytest.raises(OSError, match="may be lost"):
            image.flush()
    with pytest.raises(OSError, match="may be lost"):
        image.close()
    assert image.file.fd == -1
    image = VhdxImage(path)
    assert read(image, 0, SECTOR).startswith(b"stable")
    image.close()
