"""Commands on blocks, of disks and DVDs: the range checked, the request made, its result told in sense."""

from __future__ import annotations

from typing import Protocol

from hvkvm.abi import scsi
from hvkvm.abi.scsi import Sense, Transfer
from hvkvm.block.buffers import Cutter, size_of
from hvkvm.block.request import Op, Request, Result, Status
from hvkvm.devices.scsi.command import Command, Rejected, Reply

MAX_TRANSFER = 32 << 20
"""Bytes of one READ or WRITE: told in the block limits, and refused beyond."""

SENSES = {
    Status.SHORT: scsi.UNRECOVERED_READ,
    Status.NO_SPACE: scsi.SPACE_EXHAUSTED,
    Status.OUT_OF_RANGE: scsi.LBA_OUT_OF_RANGE,
    Status.MISALIGNED: scsi.INVALID_FIELD_IN_CDB,
    Status.READ_ONLY: scsi.WRITE_PROTECTED,
    Status.DAMAGED: scsi.INTERNAL_FAILURE,
    Status.GONE: scsi.COMMUNICATION_FAILURE,
    Status.CANCELLED: scsi.COMMAND_CLEARED,
}
"""By result. ERROR is a medium error, of reading or of writing."""


class Blocks(Protocol):
    """What these commands need of a disk."""

    @property
    def size(self) -> int: ...
    def submit(self, request: Request) -> None: ...


def sense_of(result: Result, op: Op) -> Sense:
    """The sense data for a request that failed."""
    return SENSES.get(result.status) or (scsi.UNRECOVERED_READ if op is Op.READ else scsi.WRITE_ERROR)


def checked(transfer: Transfer, disk: Blocks, sector: int) -> Transfer:
    """`transfer`, if it lies on the disk. Rejected."""
    if transfer.lba + transfer.blocks > disk.size // sector:
        raise Rejected(scsi.LBA_OUT_OF_RANGE, lba=transfer.lba)
    return transfer


def answer(command: Command, op: Op, result: Result, lba: int, transferred: int = 0) -> None:
    """Tell `command` what became of its request."""
    if result.status is Status.OK:
        command.done(Reply(scsi.GOOD, b"", transferred))
    else:
        command.fail(sense_of(result, op), lba=lba)


def read_or_write(command: Command, op: Op, disk: Blocks, sector: int, *, fua: bool = False) -> None:
    """A READ or WRITE of any length, straight from or to the guest's pages."""
    transfer = scsi.transfer_of(command.cdb)
    if transfer.flags & scsi.PROTECT_MASK:
        raise Rejected(scsi.INVALID_FIELD_IN_CDB)
    checked(transfer, disk, sector)
    length = transfer.blocks * sector
    if not length:
        command.good()
        return
    if length > MAX_TRANSFER:
        raise Rejected(scsi.INVALID_FIELD_IN_CDB)
    buffers = command.buffers
    there = size_of(buffers)
    if there < length:
        # Part of a command is never done: the guest said two lengths.
        raise Rejected(scsi.DATA_PHASE_ERROR)
    if there > length:
        buffers = Cutter(buffers).take(length)
    lba = transfer.lba

    def done(result: Result) -> None:
        answer(command, op, result, lba, length)

    fua = fua or bool(op is Op.WRITE and transfer.flags & scsi.FUA)
    disk.submit(Request(op, lba * sector, buffers, done, length=length, fua=fua))
