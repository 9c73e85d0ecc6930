"""A disk that fails on purpose under a device that has no SCSI: NVMe and virtio.

The tester's plan speaks of SCSI commands, so each request is shown to it as the command that asks the same of
a SCSI disk. What the plan holds back is given back, as not done, when the device drains: at a reset, and when
the machine comes to rest.

Owner: the I/O loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from hvkvm.abi import scsi
from hvkvm.block.buffers import Cutter
from hvkvm.block.request import Op, Request, Result, Status
from hvkvm.devices.scsi.fault_rules import Action, Plan, Rule
from hvkvm.devices.scsi.faulty import MAX_HELD, Later, Timer

_OPERATIONS = {
    Op.READ: scsi.READ_16,
    Op.WRITE: scsi.WRITE_16,
    Op.FLUSH: scsi.SYNCHRONIZE_CACHE_16,
    Op.WRITE_ZEROES: scsi.WRITE_SAME_16,
}
_STATUSES = {
    scsi.SPACE_EXHAUSTED: Status.NO_SPACE,
    scsi.WRITE_PROTECTED: Status.READ_ONLY,
    scsi.COMMAND_CLEARED: Status.CANCELLED,
    scsi.DEVICE_RESET: Status.CANCELLED,
}
_DETAIL = "a fault on purpose"


class Disk(Protocol):
    """What is needed of `block.disk.Disk`, and offered again."""

    @property
    def size(self) -> int: ...
    @property
    def counters(self) -> Any: ...
    def submit(self, request: Request) -> None: ...
    def take(self, request: Request) -> None: ...
    def poll(self) -> None: ...
    def drain(self, done: Callable[[], object]) -> None: ...
    def inspect(self) -> dict[str, object]: ...


class FaultyRequests:
    """`disk`, whose sectors have `sector` bytes, behind `plan`."""

    def __init__(self, disk: Disk, plan: Plan, sector: int, call_later: Later) -> None:
        self.plan = plan
        """May be exchanged for another at any time, on the I/O loop."""
        self.on_fault: Callable[[Exception], object] | None = None
        """As a disk's."""
        self._disk = disk
        self._sector = sector
        self._call_later = call_later
        self._held: dict[Request, Timer | None] = {}

    @property
    def size(self) -> int:
        """Bytes."""
        return self._disk.size

    @property
    def counters(self) -> Any:
        """Of the disk: what met a fault is not in them."""
        return self._disk.counters

    def submit(self, request: Request) -> None:
        """As a disk does, or as the plan says."""
        rule = None if len(self._held) >= MAX_HELD else self.plan.choose(self._command(request))
        if rule is None or rule.action is Action.RESCIND:
            self._disk.submit(request)
        elif rule.action is Action.DELAY:
            self._held[request] = None
            self._held[request] = self._call_later(rule.seconds, self._do_late, request)
        elif rule.action is Action.DROP:
            self._held[request] = None
        elif rule.action is Action.TORN:
            self._tear(request, rule)
        else:
            status = Status.CANCELLED if rule.action is Action.BUSY else _status(rule)
            self._held[request] = None
            self._held[request] = self._call_later(0, self._fail, request, Result(status, 0, _DETAIL))

    def take(self, request: Request) -> None:
        """As `submit`."""
        self.submit(request)

    def poll(self) -> None:
        """As a disk does."""
        self._disk.poll()

    def drain(self, done: Callable[[], object]) -> None:
        """Give back what is held, as not done; `done()` when the rest is answered, too."""
        held, self._held = self._held, {}
        for request, timer in held.items():
            if timer is not None:
                timer.cancel()
            request.answer(Result(Status.CANCELLED, 0, _DETAIL), self.on_fault)
        self._disk.drain(done)

    def inspect(self) -> dict[str, object]:
        """The disk's, with the plan."""
        return self._disk.inspect() | {"held": len(self._held), "faults": self.plan.inspect()}

    def _command(self, request: Request) -> bytes:
        if request.op is Op.DISCARD:
            return bytes((scsi.UNMAP,)) + bytes(9)
        first, blocks = request.offset // self._sector, request.length // self._sector
        # A request may be longer than a command can say; it meets what its beginning meets.
        return scsi.cdb16.pack(_OPERATIONS[request.op], 0, first, min(blocks, 0xFFFFFFFF), 0, 0)

    def _do_late(self, request: Request) -> None:
        if self._held.pop(request, self) is not self:
            self._disk.submit(request)

    def _fail(self, request: Request, result: Result) -> None:
        if self._held.pop(request, self) is not self:
            request.answer(result, self.on_fault)

    def _tear(self, request: Request, rule: Rule) -> None:
        """Write the first sectors only; then fail, or call it good."""
        length = rule.sectors * self._sector
        if request.length <= length:
            self._disk.submit(request)  # it is not torn that far
            return
        whole = Result(Status.OK, request.length) if rule.good else Result(_status(rule), length, _DETAIL)

        def answered(result: Result) -> None:
            request.done(whole if result.status is Status.OK else result)

        part = Cutter(request.buffers).take(length)
        self._disk.submit(Request(Op.WRITE, request.offset, part, answered, fua=request.fua))


def _status(rule: Rule) -> Status:
    return _STATUSES.get(rule.sense, Status.ERROR)
