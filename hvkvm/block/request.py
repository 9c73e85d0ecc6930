"""What is asked of a disk, and what becomes of it: exactly one named result for each request.

A request lies in guest memory: `buffers` are views of guest pages, which a worker reads or fills by preadv
and pwritev. They belong to the disk from `Disk.submit` until `done` is called.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from enum import Enum

from hvkvm.block.buffers import Buffers, size_of
from hvkvm.errors import ImageDamaged, ImageError, Stopped
from hvkvm.tuples import NamedTuple


class Op(Enum):
    """What a request asks for."""

    READ = "read"
    WRITE = "write"
    FLUSH = "flush"
    """Make stable what was written: every write whose `done` came before this was submitted."""
    DISCARD = "discard"
    """The data is not needed any more. Reads give zeros or the old data; a hint."""
    WRITE_ZEROES = "write zeroes"
    """Reads give zeros afterwards."""


class Status(Enum):
    """The result of a request, by name."""

    OK = "done"
    ERROR = "the host's I/O failed"
    SHORT = "the host's file has ended early"
    NO_SPACE = "the host has no space left"
    OUT_OF_RANGE = "beyond the end of the disk"
    MISALIGNED = "not a multiple of the sector size"
    READ_ONLY = "the disk is read-only"
    DAMAGED = "the image is damaged"
    GONE = "the server of the disk is gone"
    CANCELLED = "the disk stops"
    """Not begun: neither the disk nor guest memory was touched."""


class Result(NamedTuple):
    """`transferred` bytes were moved for sure; `detail` says more, for people."""

    status: Status
    transferred: int = 0
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.status.value}: {self.detail}" if self.detail else self.status.value


class PeerGone(ImageError):
    """The server that holds a disk's data does not answer, and did not come back in time."""


_NO_SPACE = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


def failure(error: BaseException) -> Result:
    """The result that an exception of an image stands for."""
    if isinstance(error, Stopped):
        return Result(Status.CANCELLED, 0, str(error))
    if isinstance(error, ImageDamaged):
        return Result(Status.DAMAGED, 0, str(error))
    if isinstance(error, PeerGone):
        return Result(Status.GONE, 0, str(error))
    if isinstance(error, OSError):
        status = Status.NO_SPACE if error.errno in _NO_SPACE else Status.ERROR
        return Result(status, 0, error.strerror or str(error))
    return Result(Status.ERROR, 0, str(error) or type(error).__name__)


def result_of(outcome: object) -> Result:
    """What came of work on a worker: its own result, its exception's, or that of work with none."""
    if isinstance(outcome, Result):
        return outcome
    if isinstance(outcome, BaseException):
        return failure(outcome)
    return Result(Status.OK)


class Request:
    """One request: `done(result)` is called once, on the I/O loop, never inside `submit`.

    `offset` and `length` are bytes. READ and WRITE take their length from `buffers`, DISCARD and
    WRITE_ZEROES from `length`, FLUSH has none. `fua`: a write is stable when it is done. `may_unmap`:
    zeros may be a hole of the image.
    """

    __slots__ = ("began", "buffers", "done", "fua", "length", "may_unmap", "offset", "op")

    def __init__(
        self,
        op: Op,
        offset: int,
        buffers: Buffers,
        done: Callable[[Result], object],
        *,
        length: int | None = None,
        fua: bool = False,
        may_unmap: bool = True,
    ) -> None:
        self.op = op
        self.offset = offset
        self.buffers = buffers
        self.done = done
        self.length = size_of(buffers) if length is None else length
        self.fua = fua
        self.may_unmap = may_unmap
        self.began = 0.0

    def answer(self, result: Result, on_fault: Callable[[Exception], object] | None) -> None:
        """Call `done(result)`. What that raises goes to `on_fault`, or on up where there is none."""
        try:
            self.done(result)
        except Exception as error:
            if on_fault is None:
                raise
            on_fault(error)

    def __str__(self) -> str:
        if self.op is Op.FLUSH:
            return "flush"
        return f"{self.op.value} of {self.length} bytes at {self.offset:#x}"
