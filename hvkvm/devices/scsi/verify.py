"""VERIFY: the blocks are read, and compared if the guest gave data to compare them with (SBC-3 5.31)."""

from __future__ import annotations

from mmap import mmap

from hvkvm.abi import scsi
from hvkvm.block.buffers import Cutter, size_of
from hvkvm.block.request import Op, Request, Result, Status
from hvkvm.devices.scsi.command import Command, Rejected
from hvkvm.devices.scsi.medium import MAX_TRANSFER, Blocks, answer, checked

PIECE_BYTES = 1 << 20
MAX_VERIFY_BYTES = 1 << 30


def verify(command: Command, disk: Blocks, sector: int) -> None:
    """VERIFY(10), (12) and (16), with BYTCHK 0 and 1."""
    transfer = checked(scsi.transfer_of(command.cdb), disk, sector)
    compare = transfer.flags >> 1 & 3
    length = transfer.blocks * sector
    if transfer.flags & scsi.PROTECT_MASK or compare > 1:
        raise Rejected(scsi.INVALID_FIELD_IN_CDB)
    if length > (MAX_TRANSFER if compare else MAX_VERIFY_BYTES):
        raise Rejected(scsi.INVALID_FIELD_IN_CDB)
    if compare and size_of(command.buffers) < length:
        raise Rejected(scsi.DATA_PHASE_ERROR)
    if not length:
        command.good()
        return
    _Verifying(command, disk, transfer.lba * sector, length, bool(compare), transfer.lba).next()


class _Verifying:
    """Reads a piece at a time into memory of its own."""

    def __init__(
        self, command: Command, disk: Blocks, offset: int, length: int, compare: bool, lba: int
    ) -> None:
        self._command = command
        self._disk = disk
        self._offset = offset
        self._left = length
        self._given = length if compare else 0
        self._expected = Cutter(command.buffers) if compare else None
        self._lba = lba
        self._piece = memoryview(mmap(-1, min(length, PIECE_BYTES)))

    def next(self) -> None:
        n = min(self._left, len(self._piece))
        self._disk.submit(Request(Op.READ, self._offset, [self._piece[:n]], self._read))

    def _read(self, result: Result) -> None:
        if result.status is Status.OK:
            n = result.transferred
            if self._expected is not None and not self._same(self._expected, n):
                self._command.fail(scsi.MISCOMPARED, lba=self._lba)
                return
            self._offset += n
            self._left -= n
            if self._left:
                self.next()
                return
        answer(self._command, Op.READ, result, self._lba, self._given)

    def _same(self, expected: Cutter, n: int) -> bool:
        at = 0
        for part in expected.take(n):
            if self._piece[at : at + len(part)].tobytes() != part.tobytes():  # memcmp, not item by item
                return False
            at += len(part)
        return True
