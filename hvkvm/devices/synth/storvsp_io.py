"""A plain READ or WRITE on its way from a channel's ring to a disk and back: one object for all of it.

Why: nearly all that a guest asks of a disk are these, and what each costs in Python bounds how many there are
in a second. What is not plain, or cannot be, goes the way of all commands, which says why.

Owner: the I/O loop.
"""

from __future__ import annotations

from typing import Protocol

from hvkvm.abi import scsi
from hvkvm.abi import storvsp as wire
from hvkvm.abi.ring import Packet
from hvkvm.block.buffers import Buffers
from hvkvm.block.request import Op, Request, Result, Status
from hvkvm.devices.scsi.command import Command, Reply
from hvkvm.devices.scsi.medium import answer
from hvkvm.vmbus.channel_io import ChannelIo


class Taker(Protocol):
    """What is needed of the channel."""

    def completed(self, io: ChannelIo, packet: Packet, answer: bytes) -> None:
        """Answer `packet`, which was counted."""
        ...

    def finish(self, io: ChannelIo, packet: Packet, reply: Reply) -> None:
        """As `completed`, with what became of a SCSI command."""
        ...


class DiskIo(Request):
    """The request of `packet`, taken by `channel` while it was open as `io`."""

    __slots__ = ("_channel", "_io", "_packet")

    def __init__(self, channel: Taker, io: ChannelIo, packet: Packet, buffers: Buffers, length: int) -> None:
        # What a disk's `begin` sets, it sets: op, offset, fua.
        self.op = Op.READ
        self.offset = 0
        self.fua = self.may_unmap = False
        self.buffers = buffers
        self.length = length
        self._channel = channel
        self._io = io
        self._packet = packet

    def done(self, result: Result) -> None:
        """The disk has done it, or has not."""
        channel, io, packet = self._channel, self._io, self._packet
        if result.status is Status.OK:
            payload = wire.completion(packet.payload, wire.SRB_STATUS_SUCCESS, scsi.GOOD, self.length)
            channel.completed(io, packet, payload)
            return
        lba = scsi.transfer_of(packet.payload[wire.CDB_OFFSET :]).lba
        command = Command(b"", (), lambda reply: channel.finish(io, packet, reply))
        answer(command, self.op, result, lba)
