"""Fixtures for disks: an I/O loop with workers, and a way to ask a disk and wait."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from disk_asker import Asker

from hvkvm.block.image import ImageOptions
from hvkvm.block.raw import RawImage
from hvkvm.runtime.io_loop import IoLoop
from hvkvm.runtime.workers import Workers


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A raw image of 1 MiB of noise."""
    path = tmp_path / "disk.raw"
    path.write_bytes(Random(1).randbytes(1 << 20))
    return path


@pytest.fixture
def faults() -> list[BaseException]:
    return []


@pytest.fixture
def asker(faults: list[BaseException]) -> Iterator[Asker]:
    """A loop and workers; afterwards no thread is left, and nothing went wrong on the loop."""
    threads = set(threading.enumerate())
    loop = IoLoop(on_fault=faults.append)
    loop.start()
    workers = Workers(loop, limit=6)
    asker = Asker(loop, workers)
    try:
        yield asker
    finally:
        workers.close()
        loop.stop()
        for disk in asker.disks:
            disk.image.close()
    assert not faults
    assert set(threading.enumerate()) <= threads  # another test's may have ended meanwhile


@pytest.fixture
def opened(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., RawImage]:
    """Opens these bytes as a raw image, for reading, until the test ends."""

    def opened(data: bytes | bytearray, sector: int = 512) -> RawImage:
        path = tmp_path / "disk"
        path.write_bytes(data)
        image = RawImage(path, ImageOptions(read_only=True, sector_size=sector))
        request.addfinalizer(image.close)
        return image

    return opened
