"""What the host's page cache does at once, a disk on PCI answers in the turn that took it, by no worker.

The file lies in memory (a memfd), so the page cache has it whatever else this machine does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nvme_guest
import pytest
import virtio_guest
from nvme_guest import Loop, NvmeGuest
from virtio_guest import VirtioGuest

from hvkvm.abi import nvme, virtio
from hvkvm.block import file_now
from hvkvm.block.disk import Disk
from hvkvm.block.image import ImageOptions
from hvkvm.block.raw import RawImage

SIZE = 1 << 20
SECTORS = SIZE // 512
PATTERN = bytes(range(256)) * 16
MakeDisk = Callable[..., Disk]


class NoWorkers:
    """Takes jobs, and keeps them."""

    def __init__(self) -> None:
        self.jobs: list[object] = []

    def queue(self, _width: int, _name: str) -> NoWorkers:
        return self

    def submit(self, _work: object, item: object, _done: object) -> None:
        self.jobs.append(item)

    def submit_all(self, _work: object, items: list[object], _done: object) -> None:
        self.jobs += items


@pytest.fixture
def workers() -> NoWorkers:
    return NoWorkers()


@pytest.fixture
def make_disk(workers: NoWorkers, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeDisk]:
    """A disk in memory, whose `submit` counts."""
    monkeypatch.setattr(file_now, "SLOW_SECONDS", 1000.0)
    fd = os.memfd_create("disk", os.MFD_CLOEXEC)
    os.pwrite(fd, PATTERN, 0)
    os.ftruncate(fd, SIZE)
    images = []

    def make(loop: Loop, **options: Any) -> Disk:
        image = RawImage(Path(f"/proc/self/fd/{fd}"), ImageOptions(**options))
        images.append(image)
        io = SimpleNamespace(call_soon=loop.call_soon, call_later=lambda *_arguments: None)
        disk = Disk(image, workers, io)  # type: ignore[arg-type]
        submit, disk.submitted = disk.submit, []  # type: ignore[attr-defined]

        def counted(request: Any) -> None:
            disk.submitted.append(request)  # type: ignore[attr-defined]
            submit(request)

        disk.submit = counted  # type: ignore[method-assign]
        return disk

    yield make
    for image in images:
        image.close()
    os.close(fd)


@pytest.fixture
def nvme_disk(routes: Any, make_disk: MakeDisk, monkeypatch: pytest.MonkeyPatch) -> Iterator[NvmeGuest]:
    monkeypatch.setattr(nvme_guest, "FakeDisk", make_disk)
    guest = NvmeGuest(routes)
    guest.enable()
    guest.make_queues()
    yield guest
    guest.close()


@pytest.fixture
def virtio_disk(routes: Any, make_disk: MakeDisk, monkeypatch: pytest.MonkeyPatch) -> Iterator[VirtioGuest]:
    monkeypatch.setattr(virtio_guest, "FakeDisk", make_disk)
    guest = VirtioGuest(routes)
    guest.enable()
    yield guest
    guest.close()


def test_nvme_reads_and_writes_are_answered_in_their_turn(nvme_disk: NvmeGuest, workers: NoWorkers) -> None:
    guest, disk = nvme_disk, nvme_disk.disk
    assert guest.io(nvme.NVME_CMD_READ, 0, 8) == nvme.NVME_SC_SUCCESS
    assert guest.memory.read(nvme_guest.DATA, 4096) == PATTERN
    assert guest.io(nvme.NVME_CMD_WRITE, 16, 8) == nvme.NVME_SC_SUCCESS
    assert guest.io(nvme.NVME_CMD_READ, 16, 8) == nvme.NVME_SC_SUCCESS
    assert guest.memory.read(nvme_guest.DATA, 4096) == PATTERN
    assert (disk.submitted, workers.jobs) == ([], [])  # type: ignore[attr-defined]
    assert guest.io(nvme.NVME_CMD_READ, SECTORS - 1, 2) == nvme.NVME_SC_LBA_RANGE
    guest.put(1, guest.command(nvme.NVME_CMD_WRITE, nsid=1, cdw=(0, 0, 7 | nvme.NVME_RW_FUA)))
    guest.ring(1)
    guest.loop.settle()
    assert len(workers.jobs) == 1  # that one has to be stable


def test_virtio_reads_and_writes_are_answered_in_their_turn(
    virtio_disk: VirtioGuest, workers: NoWorkers
) -> None:
    guest, disk = virtio_disk, virtio_disk.disk
    assert guest.do(virtio.VIRTIO_BLK_T_IN, 0, 4096, writes=True) == virtio.VIRTIO_BLK_S_OK
    assert guest.memory.read(virtio_guest.DATA, 4096) == PATTERN
    assert guest.do(virtio.VIRTIO_BLK_T_OUT, 16, 4096) == virtio.VIRTIO_BLK_S_OK
    assert guest.do(virtio.VIRTIO_BLK_T_IN, 16, 4096, writes=True) == virtio.VIRTIO_BLK_S_OK
    assert guest.memory.read(virtio_guest.DATA, 4096) == PATTERN
    assert (disk.submitted, workers.jobs) == ([], [])  # type: ignore[attr-defined]
    for sector, length in ((SECTORS, 512), (SECTORS - 1, 1024), (1 << 63, 512), (0, 511)):
        assert guest.do(virtio.VIRTIO_BLK_T_IN, sector, length, writes=True) == virtio.VIRTIO_BLK_S_IOERR
    assert len(disk.submitted) == 4  # type: ignore[attr-defined]


def test_what_may_not_be_written_is_not(
    routes: Any, make_disk: MakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(virtio_guest, "FakeDisk", lambda loop: make_disk(loop, read_only=True))
    guest = VirtioGuest(routes, read_only=True)
    guest.enable()
    assert guest.do(virtio.VIRTIO_BLK_T_OUT, 0, 512) == virtio.VIRTIO_BLK_S_IOERR
    assert guest.do(virtio.VIRTIO_BLK_T_IN, 0, 512, writes=True) == virtio.VIRTIO_BLK_S_OK
    assert guest.memory.read(virtio_guest.DATA, 512) == PATTERN[:512]
    guest.close()
