"""Disks on PCI that fail on purpose: the same plans as on the VMBus, under NVMe and virtio."""

from __future__ import annotations

from typing import Any

import pytest
from nvme_guest import DATA, FakeDisk, Loop, NvmeGuest
from virtio_guest import VirtioGuest

from hvkvm.abi import nvme, scsi, virtio
from hvkvm.block.request import Op, Request, Result, Status
from hvkvm.devices.faulty_requests import FaultyRequests
from hvkvm.devices.scsi.fault_rules import OPERATIONS, Action, Plan, Rule


class Later:
    """The loop's timers, in a test's hands."""

    def __init__(self) -> None:
        self.due: list[tuple[float, Any, tuple[Any, ...]]] = []

    def call_later(self, seconds: float, fn: Any, *args: Any) -> Any:
        entry = seconds, fn, args
        self.due.append(entry)

        class Handle:
            def cancel(_self) -> None:  # noqa: N805
                if entry in self.due:
                    self.due.remove(entry)

        return Handle()

    def run(self) -> None:
        while self.due:
            _seconds, fn, args = self.due.pop(0)
            fn(*args)


class Asker:
    """A disk behind a plan, and what was answered."""

    def __init__(self, *rules: Rule, seed: int = 0) -> None:
        self.loop, self.later = Loop(), Later()
        self.disk = FakeDisk(self.loop)
        self.faulty = FaultyRequests(self.disk, Plan(rules, seed), 512, self.later.call_later)
        self.results: list[Result] = []

    def ask(self, op: Op, sector: int = 0, sectors: int = 1) -> None:
        data = [memoryview(bytearray(b"n" * 512 * sectors))] if op in (Op.READ, Op.WRITE) else []
        length = 0 if op is Op.FLUSH else 512 * sectors
        self.faulty.submit(Request(op, 512 * sector, data, self.results.append, length=length))
        assert not self.loop.soon or self.results == self.results[:]
        self.loop.settle()


@pytest.mark.parametrize("op", list(Op))
def test_without_a_rule_it_is_the_disk(op: Op) -> None:
    asker = Asker()
    asker.ask(op)
    assert [one.status for one in asker.results] == [Status.OK]
    assert asker.disk.seen[0].op is op
    assert asker.faulty.size == asker.disk.size


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("read", Op.READ),
        ("write", Op.WRITE),
        ("flush", Op.FLUSH),
        ("discard", Op.DISCARD),
        ("write-same", Op.WRITE_ZEROES),
    ],
)
def test_an_operation_by_its_name(name: str, op: Op) -> None:
    asker = Asker(Rule(Action.ERROR, OPERATIONS[name]))
    for one in Op:
        asker.ask(one)
        asker.later.run()
    failed = [one.status is not Status.OK for one in asker.results]
    assert failed == [one is op for one in Op]


def test_ranges_counts_and_senses() -> None:
    asker = Asker(Rule(Action.ERROR, first=8, last=15, after=1, times=1, sense=scsi.SPACE_EXHAUSTED))
    for sector in (0, 7, 8, 15, 16, 9):
        asker.ask(Op.WRITE, sector)
        assert len(asker.results) + len(asker.later.due) >= 1
        asker.later.run()
    assert [one.status for one in asker.results] == [
        *(Status.OK, Status.OK, Status.OK, Status.NO_SPACE, Status.OK, Status.OK)
    ]


def test_done_is_never_called_inside_submit() -> None:
    asker = Asker(Rule(Action.ERROR), Rule(Action.BUSY))
    asker.ask(Op.READ)
    assert asker.results == []
    asker.later.run()
    assert len(asker.results) == 1


def test_delayed_and_dropped_and_released() -> None:
    asker = Asker(Rule(Action.DELAY, seconds=3, times=1), Rule(Action.DROP))
    asker.ask(Op.WRITE, 1)
    assert asker.later.due[0][0] == 3
    asker.later.run()
    asker.loop.settle()
    assert [one.status for one in asker.results] == [Status.OK]
    asker.ask(Op.WRITE, 2)
    asker.later.run()
    assert len(asker.results) == 1
    drained: list[int] = []
    asker.faulty.drain(lambda: drained.append(1))
    asker.loop.settle()
    assert drained
    assert asker.results[-1].status is Status.CANCELLED
    assert asker.disk.data[1024:1536] == bytes(512), "it was not done"


@pytest.mark.parametrize("good", [True, False])
def test_torn_writes(good: bool) -> None:
    asker = Asker(Rule(Action.TORN, sectors=2, good=good))
    asker.ask(Op.WRITE, 0, 4)
    assert asker.disk.data[:2048] == b"n" * 1024 + bytes(1024)
    assert (asker.results[0].status is Status.OK) == good
    asker.ask(Op.WRITE, 8, 2)
    assert asker.results[1].status is Status.OK, "not torn that far"


def test_nvme_and_virtio_drivers_see_them(routes: Any) -> None:
    plan = Plan([Rule(Action.ERROR, OPERATIONS["read"], times=1)])
    later = Later()
    one = NvmeGuest(routes)
    one.device.namespace.disk = one.device.disk = FaultyRequests(one.disk, plan, 512, later.call_later)
    one.enable()
    one.make_queues()
    one.put(1, one.command(nvme.NVME_CMD_READ, nsid=1, prp1=DATA))
    one.ring(1)
    one.loop.settle()
    later.run()
    one.loop.settle()
    ((_id, status, _result),) = one.take(1)
    assert status & ~nvme.NVME_STATUS_DNR == nvme.NVME_SC_READ_ERROR
    assert one.io(nvme.NVME_CMD_READ) == 0
    one.close()

    two = VirtioGuest(routes)
    plan = Plan([Rule(Action.DROP, OPERATIONS["write"], times=1)])
    two.device.device.disk = FaultyRequests(two.disk, plan, 512, later.call_later)  # type: ignore[attr-defined]
    two.enable()
    two.header(virtio.VIRTIO_BLK_T_OUT)
    two.lay([(0x50000, 16, False), (0x60000, 512, False), (0x50010, 1, True)])
    two.offer()
    two.loop.settle()
    assert two.used() == []
    two.device.stop(lambda: None)
    two.loop.settle()
    assert two.used() == [(0, 1)], "a machine at rest holds nothing back"
    assert two.memory.read(0x50010, 1)[0] == virtio.VIRTIO_BLK_S_IOERR
    two.close()
