"""A program that is killed in the midst of writing: what it was told is flushed is there. And a full host."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from random import Random

import disk_writer
import pytest
from disk_asker import page_buffer, read

from hvkvm.block.image import ImageOptions
from hvkvm.block.open_image import open_image
from hvkvm.block.vhdx.create import VhdxOptions, create_vhdx
from hvkvm.block.vhdx.image import VhdxImage

pytestmark = pytest.mark.timeout(1800)  # a slow host's flushes take their time

KILLS = int(os.environ.get("HVKVM_DISK_KILLS", "10"))
"""Of each kind of image; `make soak-disks` has 200."""
MIB = 1 << 20
WRITER_SECONDS = 600.0


def new_disk(folder: Path, kind: str) -> Path:
    if kind == "raw":
        path = folder / "disk.raw"
        with path.open("wb") as file:
            file.truncate(disk_writer.SIZE)
        return path
    parent = None
    if kind == "differencing":
        parent = folder / "parent.vhdx"
        create_vhdx(parent, VhdxOptions(disk_writer.SIZE, block_size=MIB))
    path = folder / "disk.vhdx"
    create_vhdx(path, VhdxOptions(disk_writer.SIZE, block_size=MIB, parent=parent))
    return path


def write_and_be_killed(path: Path, seed: int, rounds: int, *more: int) -> list[str]:
    """What a writer said that was killed after so many rounds, wherever it was then: no two in one place."""
    program = [sys.executable, disk_writer.__file__, str(path), str(seed), *map(str, more)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        watchdog = threading.Timer(WRITER_SECONDS, child.kill)
        watchdog.start()
        lines: list[str] = []
        while rounds and (line := child.stdout.readline()):
            lines.append(line)
            rounds -= line.strip().isdecimal()
        child.kill()
        lines += child.stdout.read().splitlines()
        watchdog.cancel()
    assert not rounds, "the writer has failed"
    return lines


def check_what_is_left(path: Path, seed: int, lines: list[str]) -> None:
    told = max(int(line) for line in lines if line.strip().isdecimal())
    failed = frozenset(int(line.split()[-1]) for line in lines if line.startswith("no space "))
    for options in (ImageOptions(read_only=True), ImageOptions()):
        image = open_image(str(path), options)
        wrong = disk_writer.check(image, seed, told, told + 4 * disk_writer.BATCH, failed)
        image.close()
        assert not wrong


@pytest.mark.parametrize("kind", ["raw", "dynamic", "differencing"])
def test_what_was_flushed_survives_a_kill(tmp_path: Path, kind: str) -> None:
    random = Random(kind)
    for number in range(KILLS):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = new_disk(folder, kind)
        lines = write_and_be_killed(path, number, random.randrange(1, 40))
        check_what_is_left(path, number, lines)
        shutil.rmtree(folder)


@pytest.mark.parametrize("kind", ["dynamic", "differencing"])
def test_what_was_flushed_survives_a_kill_on_a_full_host(tmp_path: Path, kind: str) -> None:
    random = Random(f"full {kind}")
    full = 0
    for number in range(max(5, KILLS // 4)):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = new_disk(folder, kind)
        room = random.randrange(1, 12) * MIB + random.randrange(MIB)
        lines = write_and_be_killed(path, number, random.randrange(5, 40), path.stat().st_size + room)
        full += any(line.startswith("no space ") for line in lines)
        check_what_is_left(path, number, lines)
        shutil.rmtree(folder)
    assert full, "no writer has met a full host"


def test_a_full_host_keeps_what_was_flushed(tmp_path: Path) -> None:
    path = new_disk(tmp_path, "dynamic")
    image = VhdxImage(path)
    image.writev(0, [page_buffer(4096, b"first")])
    image.flush()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, before[1]))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            image.writev(5 * MIB, [page_buffer(4096, b"no room")])
        assert caught.value.errno == errno.EFBIG
        image.writev(4096, [page_buffer(4096, b"second")])
        image.flush()
        assert read(image, 5 * MIB, 4096) == bytes(4096)
        image.close_files()  # and then it is killed
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    image = VhdxImage(path)
    assert read(image, 0, 8192).startswith(b"first")
    assert read(image, 4096, 4096).startswith(b"second")
    image.writev(5 * MIB, [page_buffer(4096, b"room now")])
    image.close()
    image = VhdxImage(path)
    assert read(image, 5 * MIB, 4096).startswith(b"room now")
    image.close()
