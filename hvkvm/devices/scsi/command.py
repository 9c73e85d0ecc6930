"""One SCSI command, and what became of it. Every byte of a CDB and of its data is a guest's.

`buffers` are views of guest memory for the data, in or out. They are copied from once and to once, or handed
to the disk, and left alone after `done(reply)`, which is called once, on the I/O loop; it may be called
before `Unit.execute` returns.
"""

from __future__ import annotations

from collections.abc import Callable

from hvkvm.abi import scsi
from hvkvm.abi.scsi import Sense
from hvkvm.block.buffers import Buffers, Cutter, size_of
from hvkvm.tuples import NamedTuple

MAX_PARAMETERS = 64 << 10
"""So many bytes of parameters are copied from a guest at most."""


class Reply(NamedTuple):
    """SCSI status, sense data for CHECK CONDITION, and how many bytes of data were transferred."""

    status: int
    sense: bytes = b""
    transferred: int = 0


class Command:
    """A CDB with its data."""

    __slots__ = ("buffers", "cdb", "done")

    def __init__(self, cdb: bytes, buffers: Buffers, done: Callable[[Reply], object]) -> None:
        self.cdb = cdb
        self.buffers = buffers
        self.done = done

    def good(self, transferred: int = 0) -> None:
        """It was done."""
        self.done(Reply(scsi.GOOD, b"", transferred))

    def fail(self, sense: Sense, *, lba: int | None = None, transferred: int = 0) -> None:
        """It was not, and why."""
        self.done(Reply(scsi.CHECK_CONDITION, sense.fixed(lba), transferred))

    def give(self, data: bytes, allocation: int) -> None:
        """Answer with `data`, cut to the allocation length and to what there is room for."""
        n = min(len(data), allocation, size_of(self.buffers))
        at = 0
        for part in Cutter(self.buffers).take(n):
            part[:] = data[at : at + len(part)]
            at += len(part)
        self.good(n)

    def take(self, n: int) -> bytes | None:
        """A copy of `n` bytes that came with it; None if fewer came, or more than is sane."""
        if n > MAX_PARAMETERS:
            return None
        data = b"".join(Cutter(self.buffers).take(n))
        return data if len(data) == n else None


class Rejected(Exception):
    """A command cannot be: its sense. Raised and caught within a unit only."""

    def __init__(self, sense: Sense, *, lba: int | None = None) -> None:
        self.sense = sense
        self.lba = lba
