"""Asks SCSI units from a test: a real disk whose workers and loop are the caller's own thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from disk_asker import page_buffer

from hvkvm.abi import scsi
from hvkvm.abi.scsi import Sense
from hvkvm.block.disk import Disk
from hvkvm.block.image import Image, ImageOptions
from hvkvm.block.raw import RawImage
from hvkvm.block.request import Request, Result, Status
from hvkvm.devices.scsi.command import Command, Reply
from hvkvm.devices.scsi.unit import Unit


class InlineLoop:
    """An I/O loop and workers that do everything when `run()` is called."""

    def __init__(self) -> None:
        self.calls: deque[Callable[[], object]] = deque()

    def call_soon(self, fn: Callable[..., object], *args: Any, cancelled: object = None) -> None:
        self.calls.append(lambda: fn(*args))

    def call_later(self, seconds: float, fn: Callable[..., object], *args: Any) -> object:
        return None

    def queue(self, width: int, name: str) -> InlineLoop:
        return self

    def submit(self, work: Callable[[Any], object], item: object, done: Callable[[Any, Any], object]) -> None:
        def both() -> None:
            try:
                outcome = work(item)
            except Exception as error:
                done(item, error)
            else:
                done(item, outcome)

        self.calls.append(both)

    def submit_all(self, work: Any, items: Sequence[object], done: Any) -> None:
        for item in items:
            self.submit(work, item, done)

    def look(self) -> bool:
        return False

    def take_back(self) -> int:
        return 0

    def __len__(self) -> int:
        return 0

    def run(self) -> None:
        while self.calls:
            self.calls.popleft()()


class Scsi:
    """Units on one loop, and how they are asked."""

    def __init__(self) -> None:
        self.loop = InlineLoop()
        self.images: list[Image] = []

    def disk(self, path: Path, *, sector_size: int = 512, read_only: bool = False) -> Disk:
        image = RawImage(path, ImageOptions(read_only=read_only), sector_size=sector_size)
        self.images.append(image)
        return Disk(image, self.loop, self.loop)  # type: ignore[arg-type]

    def execute(self, unit: Unit, cdb: bytes, data: bytes | int = b"") -> tuple[Reply, bytes]:
        """The one reply, and what is in the buffers then: `data`, or so many bytes of room, noise before."""
        n = data if isinstance(data, int) else len(data)
        memory = page_buffer(n, b"\xa5")
        if isinstance(data, bytes):
            memory[:] = data
        # Scattered, as guests' pages are.
        buffers = [memory[at : at + 4096] for at in range(0, n, 4096)]
        replies: list[Reply] = []
        unit.execute(Command(cdb, buffers, replies.append))
        self.loop.run()
        assert len(replies) == 1, f"{len(replies)} replies to {cdb.hex()}"
        reply = replies[0]
        assert 0 <= reply.transferred <= n
        assert bool(reply.sense) == (reply.status == scsi.CHECK_CONDITION)
        return reply, bytes(memory)

    def good(self, unit: Unit, cdb: bytes, data: bytes | int = b"") -> bytes:
        """What a command that must succeed transferred."""
        reply, memory = self.execute(unit, cdb, data)
        assert reply.status == scsi.GOOD, (cdb.hex(), sense_in(reply))
        return memory[: reply.transferred]

    def sense(self, unit: Unit, cdb: bytes, data: bytes | int = b"") -> Sense:
        """Why a command that must fail did."""
        reply, _memory = self.execute(unit, cdb, data)
        assert reply.status == scsi.CHECK_CONDITION, cdb.hex()
        return sense_in(reply)

    def close(self) -> None:
        for image in self.images:
            image.close()


class Noted:
    """Has a unit's disk note each request, and answer it with `status` without doing it."""

    def __init__(self, ask: Scsi, unit: Unit, disk: Disk) -> None:
        self.unit = unit
        self.status = Status.OK
        self.requests: list[Request] = []
        self._ask = ask
        disk.submit = self._submit  # type: ignore[method-assign]

    def _submit(self, request: Request) -> None:
        self.requests.append(request)
        moved = request.length if self.status is Status.OK else 0
        self._ask.loop.call_soon(request.done, Result(self.status, moved))

    def good(self, cdb: bytes, data: bytes | int = b"") -> list[Request]:
        """What the disk is asked by a command that must succeed."""
        self.requests.clear()
        self._ask.good(self.unit, cdb, data)
        return self.requests[:]

    def refused(self, cdb: bytes, data: bytes | int = b"") -> Sense:
        """Why a command is refused, for which the disk must not be asked anything."""
        self.requests.clear()
        sense = self._ask.sense(self.unit, cdb, data)
        assert not self.requests
        return sense


def sense_in(reply: Reply) -> Sense:
    """The sense of a reply in fixed format."""
    assert len(reply.sense) == scsi.SENSE_BYTES
    assert reply.sense[0] & 0x7F == 0x70
    assert reply.sense[7] == scsi.SENSE_BYTES - 8
    return Sense(reply.sense[2], reply.sense[12], reply.sense[13])
