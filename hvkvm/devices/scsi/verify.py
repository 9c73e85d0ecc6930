"""VERIFY: the blocks are read, and compared if the guest gave data to compare them with (SBC-3 5.31).

What is only read goes to memory that all such reads share, since nobody looks at it. What is compared needs
memory of its own, so a unit compares for few commands at a time, and the others wait.
"""

from __future__ import annotations

from collections import deque
from mmap import mmap

from hvkvm.abi import scsi
from hvkvm.block.buffers import Cutter, size_of
from hvkvm.block.request import Op, Request, Result, Status
from hvkvm.devices.scsi.command import Command, Rejected
from hvkvm.devices.scsi.medium import MAX_TRANSFER, Blocks, answer, checked

PIECE_BYTES = 1 << 20
"""So much is read at a time."""
COMPARED_BYTES = 64 << 10
"""So much is read at a time if it is compared."""
MAX_COMPARING = 4
"""Commands of a unit that compare at a time."""
MAX_VERIFY_BYTES = 1 << 30

_UNSEEN = mmap(-1, 64 << 10)
"""Where blocks go that nobody looks at. Who needs it makes a view of it: without a GIL threads must not cut
slices of one view."""


class Comparisons:
    """The commands of one unit that compare: MAX_COMPARING at a time, in the order of their arrival."""

    def __init__(self) -> None:
        self._running = 0
        self._waiting: deque[_Verifying] = deque()

    def add(self, one: _Verifying) -> None:
        """Have it begin, now or later."""
        if self._running < MAX_COMPARING:
            self._running += 1
            one.begin()
        else:
            self._waiting.append(one)

    def ended(self) -> None:
        """One of them is at its end: told in the `done` of its last request, so that who waits until the disk
        has no more requests waits for those that have not begun, too.
        """
        if self._waiting:
            self._waiting.popleft().begin()
        else:
            self._running -= 1


def verify(command: Command, disk: Blocks, sector: int, comparisons: Comparisons) -> None:
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
    elif compare:
        comparisons.add(_Verifying(command, disk, transfer.lba, sector, length, comparisons))
    else:
        _Verifying(command, disk, transfer.lba, sector, length, None).begin()


class _Verifying:
    """Reads a piece at a time, and compares it if there are `comparisons`."""

    def __init__(
        self,
        command: Command,
        disk: Blocks,
        lba: int,
        sector: int,
        length: int,
        comparisons: Comparisons | None,
    ) -> None:
        self._command = command
        self._disk = disk
        self._offset = lba * sector
        self._left = length
        self._given = 0 if comparisons is None else length
        self._expected = Cutter(command.buffers)
        self._lba = lba
        self._comparisons = comparisons
        self._piece: list[memoryview] = []

    def begin(self) -> None:
        """Read the first piece."""
        if self._comparisons is None:
            self._piece = [memoryview(_UNSEEN)] * (PIECE_BYTES // len(_UNSEEN))
        else:
            self._piece = [memoryview(bytearray(min(self._left, COMPARED_BYTES)))]
        self._next()

    def _next(self) -> None:
        piece = self._piece
        if self._left < size_of(piece):
            piece = Cutter(piece).take(self._left)
        self._disk.submit(Request(Op.READ, self._offset, piece, self._read))

    def _read(self, result: Result) -> None:
        same = True
        if result.status is Status.OK:
            n = result.transferred
            same = self._comparisons is None or self._same(n)
            self._offset += n
            self._left -= n
            if self._left and same:
                self._next()
                return
        if self._comparisons is not None:
            self._comparisons.ended()
        if same:
            answer(self._command, Op.READ, result, self._lba, self._given)
        else:
            self._command.fail(scsi.MISCOMPARED, lba=self._lba)

    def _same(self, n: int) -> bool:
        (piece,) = self._piece
        at = 0
        for part in self._expected.take(n):
            if piece[at : at + len(part)].tobytes() != part.tobytes():  # memcmp, not item by item
                return False
            at += len(part)
        return True
