"""Read, write, flush and their like: from a command to requests of the block layer and back to a status.

A command is taken apart once, from the copy that the controller made. I/O loop.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from hvkvm.abi import nvme
from hvkvm.block.in_turn import Range, in_turn
from hvkvm.block.request import Op, Request, Result, Status
from hvkvm.devices.pci.nvme.identify import MAX_TRANSFER
from hvkvm.devices.pci.nvme.prp import Memory, PrpError, buffers, copy_in
from hvkvm.tuples import NamedTuple

Answer = Callable[[int, int], object]
"""answer(status, result): what the guest is told. Once for each command."""

_DNR = nvme.NVME_STATUS_DNR
_STATUSES = {
    Status.OK: nvme.NVME_SC_SUCCESS,
    Status.NO_SPACE: nvme.NVME_SC_CAP_EXCEEDED,
    Status.OUT_OF_RANGE: nvme.NVME_SC_LBA_RANGE | _DNR,
    Status.MISALIGNED: nvme.NVME_SC_INVALID_FIELD | _DNR,
    Status.READ_ONLY: nvme.NVME_SC_NS_WRITE_PROTECTED | _DNR,
    Status.CANCELLED: nvme.NVME_SC_ABORT_REQ,
}


class Command(NamedTuple):
    """A submission queue entry's fields."""

    opcode: int
    flags: int
    id: int
    nsid: int
    metadata: int
    prp1: int
    prp2: int
    cdw10: int
    cdw11: int
    cdw12: int
    cdw13: int
    cdw14: int
    cdw15: int


class BlockDisk(Protocol):
    """What a controller needs of `block.disk.Disk`."""

    @property
    def size(self) -> int: ...
    def submit(self, request: Request) -> None: ...
    def take(self, request: Request) -> None: ...


class Namespace:
    """Carries out I/O commands on `disk`, whose sectors have `sector_size` bytes."""

    def __init__(self, disk: BlockDisk, sector_size: int, memory: Memory) -> None:
        self.disk = disk
        self.sector_size = sector_size
        self._memory = memory

    def perform(self, command: Command, answer: Answer) -> None:
        """Begin a command; `answer` comes later, or at once for one that cannot be."""
        if command.flags & nvme.CMD_FUSE_AND_PSDT:
            answer(nvme.NVME_SC_INVALID_FIELD | _DNR, 0)
        elif command.opcode == nvme.NVME_CMD_FLUSH:
            if command.nsid in (1, nvme.NVME_NSID_ALL):
                self.disk.submit(Request(Op.FLUSH, 0, (), partial(_answered, answer, Op.FLUSH)))
            else:
                answer(nvme.NVME_SC_INVALID_NS | _DNR, 0)
        elif command.nsid != 1:
            answer(nvme.NVME_SC_INVALID_NS | _DNR, 0)
        elif command.opcode == nvme.NVME_CMD_READ:
            self._move(Op.READ, command, answer)
        elif command.opcode == nvme.NVME_CMD_WRITE:
            self._move(Op.WRITE, command, answer)
        elif command.opcode == nvme.NVME_CMD_WRITE_ZEROES:
            self._write_zeroes(command, answer)
        elif command.opcode == nvme.NVME_CMD_DSM:
            self._manage(command, answer)
        else:
            answer(nvme.NVME_SC_INVALID_OPCODE | _DNR, 0)

    def _range(self, command: Command) -> tuple[int, int]:
        """Offset and length in bytes."""
        first = command.cdw10 | command.cdw11 << 32
        return first * self.sector_size, ((command.cdw12 & 0xFFFF) + 1) * self.sector_size

    def _move(self, op: Op, command: Command, answer: Answer) -> None:
        offset, length = self._range(command)
        if length > MAX_TRANSFER:
            answer(nvme.NVME_SC_INVALID_FIELD | _DNR, 0)
            return
        if offset + length > self.disk.size:  # before a list of pages is read for nothing
            answer(nvme.NVME_SC_LBA_RANGE | _DNR, 0)
            return
        try:
            views = buffers(self._memory, command.prp1, command.prp2, length)
        except PrpError as error:
            answer(error.status, 0)
            return
        fua = op is Op.WRITE and bool(command.cdw12 & nvme.NVME_RW_FUA)
        request = Request(op, offset, views, partial(_answered, answer, op), length=length, fua=fua)
        self.disk.take(request)

    def _write_zeroes(self, command: Command, answer: Answer) -> None:
        offset, length = self._range(command)
        unmap = bool(command.cdw12 & nvme.NVME_WZ_DEAC)
        done = partial(_answered, answer, Op.WRITE_ZEROES)
        self.disk.submit(Request(Op.WRITE_ZEROES, offset, (), done, length=length, may_unmap=unmap))

    def _manage(self, command: Command, answer: Answer) -> None:
        """Dataset management: up to 256 ranges, of which only a deallocation does something."""
        if not command.cdw11 & nvme.NVME_DSMGMT_AD:
            answer(nvme.NVME_SC_SUCCESS, 0)
            return
        count = (command.cdw10 & 0xFF) + 1
        try:
            raw = copy_in(self._memory, command.prp1, command.prp2, count * nvme.DSM_RANGE.size)
        except PrpError as error:
            answer(error.status, 0)
            return
        ranges = [
            Range(first * self.sector_size, sectors * self.sector_size)
            for _attributes, sectors, first in nvme.DSM_RANGE.iter_unpack(raw)
            if sectors
        ]
        if any(one.offset + one.length > self.disk.size for one in ranges):
            answer(nvme.NVME_SC_LBA_RANGE | _DNR, 0)
            return
        in_turn(self.disk, Op.DISCARD, ranges, lambda result, _offset: _answered(answer, Op.DISCARD, result))


def _answered(answer: Answer, op: Op, result: Result) -> None:
    # As nearly all are; to look a member of an Enum up calls its __hash__.
    answer(nvme.NVME_SC_SUCCESS if result.status is Status.OK else status_of(op, result), 0)


def status_of(op: Op, result: Result) -> int:
    """The NVMe status that a result stands for."""
    status = _STATUSES.get(result.status)
    if status is not None:
        return status
    if op is Op.READ:
        return nvme.NVME_SC_READ_ERROR
    return nvme.NVME_SC_WRITE_FAULT
