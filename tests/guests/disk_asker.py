"""Asks a disk from a test and waits for the answer; memory as guests have it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from mmap import mmap

from hvkvm.block.disk import Disk
from hvkvm.block.image import Image
from hvkvm.block.request import Op, Request, Result
from hvkvm.runtime.io_loop import IoLoop
from hvkvm.runtime.workers import Workers

SECONDS = 60


def page_buffer(n: int, fill: bytes = b"") -> memoryview:
    """`n` writable bytes on a page boundary, as guest memory has them."""
    view = memoryview(mmap(-1, max(n, 1)))[:n]
    if fill:
        view[:] = (fill * (n // len(fill) + 1))[:n]
    return view


def read(image: Image, offset: int, n: int) -> bytes:
    """`n` bytes of an image, all of which must come: the memory that takes them has noise before.

    What comes at once where the image has a way for that must be the same.
    """
    view = page_buffer(n, b"\xa5")
    assert image.readv(offset, [view]) == n
    data = bytes(view)
    view[:] = b"\xa5" * n
    if image.readv_now(offset, [view]) == n:
        assert bytes(view) == data, f"{n} bytes at {offset} are others when they are read at once"
    return data


class Asker:
    """Asks a disk from another thread than the loop's, and waits for the answer."""

    def __init__(self, loop: IoLoop, workers: Workers) -> None:
        self.loop = loop
        self.workers = workers
        self.disks: list[Disk] = []

    def disk(self, image: Image, **options: object) -> Disk:
        disk = Disk(image, self.workers, self.loop, **options)  # type: ignore[arg-type]
        self.disks.append(disk)
        return disk

    def submit(self, disk: Disk, requests: list[Request]) -> None:
        self.loop.call_soon(lambda: [disk.submit(request) for request in requests])

    def ask(
        self, disk: Disk, op: Op, offset: int = 0, data: memoryview | None = None, **more: object
    ) -> Result:
        """The result of one request."""
        return self.ask_all(disk, [(op, offset, data, more)])[0]

    def ask_all(self, disk: Disk, asked: list[tuple[Op, int, memoryview | None, dict]]) -> list[Result]:  # type: ignore[type-arg]
        """The results of several that are in flight at once, by the order asked."""
        results: dict[int, Result] = {}
        all_in = threading.Event()

        def done(number: int, result: Result) -> None:
            assert number not in results, "answered twice"
            results[number] = result
            if len(results) == len(asked):
                all_in.set()

        requests = [
            Request(op, offset, [data] if data is not None else [], lambda r, n=n: done(n, r), **more)
            for n, (op, offset, data, more) in enumerate(asked)
        ]
        self.submit(disk, requests)
        assert all_in.wait(SECONDS), (disk.inspect(), self.loop.state)
        return [results[number] for number in range(len(asked))]

    def wait(self, begin: Callable[[Callable[..., object]], object]) -> tuple[object, ...]:
        """Call `begin(done)` on the loop; what `done` was called with."""
        came: list[tuple[object, ...]] = []
        event = threading.Event()

        def done(*arguments: object) -> None:
            came.append(arguments)
            event.set()

        self.loop.call_soon(begin, done)
        assert event.wait(SECONDS), self.loop.state
        return came[0]
