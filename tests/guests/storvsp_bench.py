"""A controller with real disks, its workers and the guest's driver in one thread: a loopback."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from hvkvm.abi import vmbus
from hvkvm.block.disk import Disk
from hvkvm.block.image import ImageOptions
from hvkvm.block.raw import RawImage
from hvkvm.devices.scsi.disk import ScsiDisk
from hvkvm.devices.synth.storvsp import Storvsp
from hvkvm.testing.storvsc_driver import StorvscDriver
from hvkvm.testing.vmbus_loopback import Loopback

DISK_BYTES = 1 << 20


class LoopbackWorkers:
    """Workers and I/O loop of a disk: what they do waits with all else in the loopback.

    While `held`, jobs wait; `release` lets them go, in any order if the loopback is random.
    """

    def __init__(self, loop: Loopback) -> None:
        self.loop = loop
        self.held = False
        self.jobs: deque[Callable[[], object]] = deque()

    def call_soon(self, fn: Callable[..., object], *args: Any, cancelled: object = None) -> None:
        self.loop.call_soon(fn, *args)

    def call_later(self, seconds: float, fn: Callable[..., object], *args: Any) -> object:
        return self.loop.call_later(seconds, fn, *args)

    def queue(self, width: int, name: str) -> LoopbackWorkers:
        return self

    def submit(self, work: Callable[[Any], object], item: object, done: Callable[[Any, Any], object]) -> None:
        def both() -> None:
            try:
                outcome = work(item)
            except Exception as error:
                done(item, error)
            else:
                done(item, outcome)

        if self.held:
            self.jobs.append(both)
        else:
            self.loop.call_soon(both)

    def release(self, count: int | None = None) -> None:
        """Let `count` of the jobs that wait go, all by default."""
        for _ in range(len(self.jobs) if count is None else count):
            at = self.loop.random.randrange(len(self.jobs)) if self.loop.random is not None else 0
            self.jobs.rotate(-at)
            self.loop.call_soon(self.jobs.popleft())

    def submit_all(self, work: Any, items: Sequence[object], done: Any) -> None:
        for item in items:
            self.submit(work, item, done)

    def look(self) -> bool:
        return False

    def take_back(self) -> int:
        return 0

    def __len__(self) -> int:
        return len(self.jobs)


class Bench:
    """`loop` with the controller `device`, on which disks 0, 1, ... lie; `driver` once `start` is called."""

    def __init__(
        self,
        folder: Path,
        *,
        disks: int = 1,
        vp_count: int = 4,
        seed: int | None = None,
        now: bool = False,
        read_only: bool = False,
    ) -> None:
        self.now = now
        self.read_only = read_only
        self.loop = Loopback(vp_count=vp_count, random=None if seed is None else Random(seed))
        self.workers = LoopbackWorkers(self.loop)
        self.paths = [folder / f"disk{number}" for number in range(disks)]
        self.images: dict[Path, RawImage] = {}
        for path in self.paths:
            if not path.exists():
                path.write_bytes(bytes(DISK_BYTES))
        self.device = self.make()
        self.channel = self.loop.host.add(self.device)

    def make(self) -> Storvsp:
        """A controller with the disks, as a machine makes it."""
        device = Storvsp(0, self.loop.memory, self.loop.synic.vp_count)
        for lun, path in enumerate(self.paths):
            device.attach(0, lun, self.unit(path))
        return device

    def unit(self, path: Path) -> ScsiDisk:
        """A disk on the file `path`; not `now`, by workers alone: no guest can tell, a test can hold them."""
        if path not in self.images:
            self.images[path] = RawImage(path, ImageOptions(read_only=self.read_only))
        image = self.images[path]
        if self.now:  # whatever this file system can
            image.readv_now, image.writev_now = image.readv, image.writev  # type: ignore[method-assign]
        else:
            image.readv_now = image.writev_now = lambda _offset, _buffers: -1  # type: ignore[method-assign]
        return ScsiDisk(Disk(image, self.workers, self.workers), f"serial{path.name}")  # type: ignore[arg-type]

    def start(self, **options: Any) -> StorvscDriver:
        """A guest connects, and its driver finds the controller."""
        self.loop.connect(vmbus.VERSION_WIN10_V5_3)
        self.driver = StorvscDriver(self.loop, self.device.offer.instance)
        self.driver.shake_hands(**options)
        return self.driver

    def close(self) -> None:
        self.loop.close()
        for image in self.images.values():
            image.close()
