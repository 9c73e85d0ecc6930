"""A guest's NVMe driver in a test's hands, and a disk that answers when told to."""

from __future__ import annotations

import struct
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from hvkvm.abi import nvme, pci
from hvkvm.block.request import Op, Request, Result, Status
from hvkvm.devices.pci.nvme.controller import Controller
from hvkvm.memory.guest import GuestMemory

MIB = 1 << 20
ADMIN_SQ, ADMIN_CQ, DATA, IO_SQ, IO_CQ, SHADOW, EVENTS = (0x10000 * n for n in range(1, 8))
ENTRIES = 8
SECTORS = 2048


def ram(size: int = 2 * MIB) -> GuestMemory:
    """Guest memory that no VM has."""
    return GuestMemory(
        SimpleNamespace(memory_slots=8, set_user_memory_region=lambda *_args, **_more: None), size
    )


class Loop:
    """Runs what was deferred when it is told to; `inline` runs it by itself."""

    def __init__(self) -> None:
        self.soon: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def call_soon(self, fn: Callable[..., object], *args: Any, **_more: Any) -> None:
        self.soon.append((fn, args))

    def settle(self, limit: int = 100_000) -> int:
        """Run until nothing is left; how many calls it were."""
        for count in range(limit):
            if not self.soon:
                return count
            fn, args = self.soon.pop(0)
            fn(*args)
        raise AssertionError("the loop never comes to rest")


class FakeDisk:
    """512-byte sectors in memory. With `held`, requests wait for `release`."""

    def __init__(self, loop: Loop) -> None:
        self.data = bytearray(SECTORS * 512)
        self.held = False
        self.waiting: list[Request] = []
        self.seen: list[Request] = []
        self.status = Status.OK
        self._loop = loop
        self._drains: list[Callable[[], object]] = []
        self.counters = {op: SimpleNamespace(bytes=0, requests=0) for op in Op}

    @property
    def size(self) -> int:
        return len(self.data)

    def submit(self, request: Request) -> None:
        self.seen.append(request)
        self.waiting.append(request)
        if not self.held:
            self._loop.call_soon(self.release)

    take = submit

    def release(self) -> None:
        while self.waiting:
            request = self.waiting.pop(0)
            request.done(self._perform(request))
        self._rest()

    def _perform(self, request: Request) -> Result:
        end = request.offset + request.length
        if self.status is not Status.OK:
            return Result(self.status)
        if request.op is not Op.FLUSH and end > len(self.data):
            return Result(Status.OUT_OF_RANGE)
        at = request.offset
        for view in request.buffers:
            if request.op is Op.READ:
                view[:] = self.data[at : at + len(view)]
            elif request.op is Op.WRITE:
                self.data[at : at + len(view)] = view
            at += len(view)
        if request.op in (Op.WRITE_ZEROES, Op.DISCARD):
            self.data[request.offset : end] = bytes(request.length)
        return Result(Status.OK, request.length)

    def drain(self, done: Callable[[], object]) -> None:
        self._drains.append(done)
        self._rest()

    def _rest(self) -> None:
        if not self.waiting:
            drains, self._drains = self._drains, []
            for done in drains:
                self._loop.call_soon(done)

    def poll(self) -> None:
        """Nothing is answered before the loop's next call."""

    def inspect(self) -> dict[str, object]:
        return {}


class NvmeGuest:
    """The controller, and a driver that trusts nothing but the specification."""

    def __init__(self, routes: Any, memory: GuestMemory | None = None, **more: Any) -> None:
        self.loop = Loop()
        self.memory = ram() if memory is None else memory
        self.disk = FakeDisk(self.loop)
        self.bells: dict[int, Callable[[], object]] = {}
        self.routes = routes
        self.intx: list[bool] = []
        self.device = Controller(self.memory, self.disk, self.loop, routes, make_bell=self._make_bell, **more)
        self.device.on_intx = self.intx.append
        self.device.moved(self.device.function.bars[0], 0xC0000000)
        self.device.function.write(pci.PCI_COMMAND, 2, pci.PCI_COMMAND_MASTER | pci.PCI_COMMAND_MEMORY)
        self.device.start()
        self.heads = {0: 0, 1: 0}
        self.phases = {0: 1, 1: 1}
        self.tails = {0: 0, 1: 0}
        self.next_id = 0
        self.answers: dict[int, tuple[int, int]] = {}

    def _make_bell(self, gpa: int, size: int, rang: Callable[[], object]) -> Any:
        assert size == 4
        self.bells[gpa] = rang
        return SimpleNamespace(close=lambda: self.bells.pop(gpa))

    def reg(self, offset: int, value: int | None = None, size: int = 4) -> int:
        """Read a register, or write it."""
        if value is None:
            return self.device.read(offset, size) & (1 << 8 * size) - 1
        self.device.write(offset, size, value)
        return value

    def enable(self) -> None:
        self.reg(nvme.NVME_REG_AQA, (ENTRIES - 1) * 0x10001)
        self.reg(nvme.NVME_REG_ASQ, ADMIN_SQ, 8)
        self.reg(nvme.NVME_REG_ACQ, ADMIN_CQ)
        self.reg(nvme.NVME_REG_ACQ + 4, 0)
        self.reg(nvme.NVME_REG_CC, 0x00460001)
        self.loop.settle()
        assert self.reg(nvme.NVME_REG_CSTS) == nvme.NVME_CSTS_RDY

    def put(self, queue: int, raw: bytes, base: int | None = None) -> None:
        """A submission queue entry, and the new tail; the doorbell is not rung."""
        base = (ADMIN_SQ, IO_SQ)[queue] if base is None else base
        self.memory.write(base + 64 * self.tails[queue], raw)
        self.tails[queue] = (self.tails[queue] + 1) % ENTRIES

    def ring(self, queue: int) -> None:
        self.reg(nvme.NVME_REG_DBS + 8 * queue, self.tails[queue])

    def command(
        self,
        opcode: int,
        *,
        nsid: int = 0,
        prp1: int = DATA,
        prp2: int = 0,
        flags: int = 0,
        cdw: tuple[int, ...] = (),
    ) -> bytes:
        words = (*cdw, *[0] * (6 - len(cdw)))
        self.next_id = self.next_id + 1 & 0xFFFF
        return struct.pack("<BBHI8xQQQ6I", opcode, flags, self.next_id, nsid, 0, prp1, prp2, *words)

    def take(self, queue: int, *, ring: bool = True) -> list[tuple[int, int, int]]:
        """New entries of a completion queue: (command id, status, result)."""
        base, found = (ADMIN_CQ, IO_CQ)[queue], []
        while True:
            raw = self.memory.read(base + 16 * self.heads[queue], 16)
            result, _zero, _head, sq, cid, status = struct.unpack("<IIHHHH", raw)
            if status & 1 != self.phases[queue]:
                break
            assert sq == queue
            found.append((cid, status >> 1, result))
            self.heads[queue] += 1
            if self.heads[queue] == ENTRIES:
                self.heads[queue] = 0
                self.phases[queue] ^= 1
        if found and ring:
            self.reg(nvme.NVME_REG_DBS + 8 * queue + 4, self.heads[queue])
        return found

    def do(self, opcode: int, *, queue: int = 0, **fields: Any) -> tuple[int, int]:
        """Submit one command and wait: (status without DNR, result)."""
        raw = self.command(opcode, **fields)
        cid = self.next_id
        self.put(queue, raw)
        self.ring(queue)
        self.loop.settle()
        answers = self.take(queue)
        assert [one[0] for one in answers] == [cid]
        return answers[0][1] & ~nvme.NVME_STATUS_DNR, answers[0][2]

    def make_queues(self, vector: int = 1) -> None:
        size = (ENTRIES - 1) << 16 | 1
        created = self.do(nvme.NVME_ADMIN_CREATE_CQ, prp1=IO_CQ, cdw=(size, vector << 16 | 3))
        assert created == (0, 0)
        assert self.do(nvme.NVME_ADMIN_CREATE_SQ, prp1=IO_SQ, cdw=(size, 1 << 16 | 1)) == (0, 0)

    def io(self, opcode: int, sector: int = 0, sectors: int = 1, **fields: Any) -> int:
        cdw = (sector & 0xFFFFFFFF, sector >> 32, sectors - 1)
        return self.do(opcode, queue=1, nsid=1, **{"cdw": cdw, **fields})[0]

    def close(self) -> None:
        self.device.close()
        self.memory.close()
