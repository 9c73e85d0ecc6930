"""UNMAP and WRITE SAME: blocks that are not needed, and blocks that are all the same (SBC-3 5.28, 5.42)."""

from __future__ import annotations

from hvkvm.abi import scsi
from hvkvm.block.in_turn import Range, in_turn
from hvkvm.block.request import Op, Request, Result, Status
from hvkvm.devices.scsi.command import Command, Rejected
from hvkvm.devices.scsi.medium import Blocks, answer, checked
from hvkvm.memory.mapping import PAGE_SIZE

MAX_DESCRIPTORS = 256
MAX_UNMAP_BYTES = 1 << 30
"""Of one UNMAP in all."""
MAX_SAME_BYTES = 256 << 20
"""Of one WRITE SAME: a host without a quick way for it writes that much."""
PATTERN_BYTES = 1 << 20
"""Of one block over and over, written at a time."""

_ANCHOR = 0x10
_UNMAP = 0x08
_OBSOLETE = 0x06
_NO_DATA = 0x01


def unmap(command: Command, disk: Blocks, sector: int) -> None:
    """UNMAP: all ranges are checked before the first is discarded."""
    cdb = command.cdb
    length = int.from_bytes(cdb[7:9], "big")
    if cdb[1] & 1:
        raise Rejected(scsi.INVALID_FIELD_IN_CDB)
    if not length:
        command.good()
        return
    data = command.take(length)
    if data is None or length < scsi.unmap_head.size:
        raise Rejected(scsi.PARAMETER_LIST_LENGTH)
    _all, described = scsi.unmap_head.unpack_from(data)
    count = min(described, length - scsi.unmap_head.size) // scsi.unmap_descriptor.size
    if count > MAX_DESCRIPTORS:
        raise Rejected(scsi.INVALID_FIELD_IN_PARAMETERS)
    listed = data[scsi.unmap_head.size :][: count * scsi.unmap_descriptor.size]
    last = disk.size // sector
    total = 0
    for lba, blocks in scsi.unmap_descriptor.iter_unpack(listed):
        if lba + blocks > last:
            raise Rejected(scsi.LBA_OUT_OF_RANGE, lba=lba)
        total += blocks
    if total * sector > MAX_UNMAP_BYTES:
        raise Rejected(scsi.INVALID_FIELD_IN_PARAMETERS)
    if not total:
        command.good(length)
        return

    def done(result: Result, offset: int) -> None:
        answer(command, Op.DISCARD, result, offset // sector, length)

    pairs = scsi.unmap_descriptor.iter_unpack(listed)
    ranges = (Range(lba * sector, blocks * sector) for lba, blocks in pairs if blocks)
    in_turn(disk, Op.DISCARD, ranges, done)


def write_same(command: Command, disk: Blocks, sector: int) -> None:
    """WRITE SAME(10) and (16): zeros as such, another block as often as asked."""
    sixteen = command.cdb[0] == scsi.WRITE_SAME_16
    transfer = scsi.transfer_of(command.cdb)
    flags = transfer.flags
    if flags & (scsi.PROTECT_MASK | _ANCHOR | _OBSOLETE) or (flags & _NO_DATA and not sixteen):
        raise Rejected(scsi.INVALID_FIELD_IN_CDB)
    if not transfer.blocks or transfer.blocks * sector > MAX_SAME_BYTES:
        raise Rejected(scsi.INVALID_FIELD_IN_CDB)
    checked(transfer, disk, sector)
    block: bytes | None = bytes(sector)
    given = 0
    if not flags & _NO_DATA:
        block = command.take(sector)
        given = sector
    if block is None:
        raise Rejected(scsi.DATA_PHASE_ERROR)
    lba, length = transfer.lba, transfer.blocks * sector
    if not any(block):

        def done(result: Result) -> None:
            answer(command, Op.WRITE_ZEROES, result, lba, given)

        may_unmap = bool(flags & _UNMAP)
        request = Request(Op.WRITE_ZEROES, lba * sector, (), done, length=length, may_unmap=may_unmap)
        disk.submit(request)
        return
    _Pattern(command, disk, lba * sector, length, block, lba).next()


class _Pattern:
    """Writes one block over and over, a piece at a time: a page of it, as often as a piece has pages."""

    def __init__(
        self, command: Command, disk: Blocks, offset: int, length: int, block: bytes, lba: int
    ) -> None:
        self._command = command
        self._disk = disk
        self._offset = offset
        self._left = length
        self._lba = lba
        self._given = len(block)
        self._page = memoryview(block * max(1, PAGE_SIZE // len(block)))

    def next(self) -> None:
        whole, rest = divmod(min(self._left, PATTERN_BYTES), len(self._page))
        piece = [self._page] * whole + ([self._page[:rest]] if rest else [])
        self._disk.submit(Request(Op.WRITE, self._offset, piece, self._written))

    def _written(self, result: Result) -> None:
        if result.status is Status.OK:
            self._offset += result.transferred
            self._left -= result.transferred
            if self._left:
                self.next()
                return
        answer(self._command, Op.WRITE, result, self._lba, self._given)
