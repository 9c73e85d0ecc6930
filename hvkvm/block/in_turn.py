"""A command of many ranges: one after the other, so that it holds one of the disk's requests at a time.

Why: a guest may list hundreds of ranges in one command, and queue hundreds of commands. I/O loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from hvkvm.block.request import Op, Request, Result, Status
from hvkvm.tuples import NamedTuple


class Range(NamedTuple):
    """In bytes; `may_unmap` as for a `Request`."""

    offset: int
    length: int
    may_unmap: bool = False


class Submits(Protocol):
    """What is needed of a disk."""

    def submit(self, request: Request) -> None: ...


def in_turn(disk: Submits, op: Op, ranges: Iterable[Range], done: Callable[[Result, int], object]) -> None:
    """Do `op` to each of `ranges`; `done(result, offset)` hears of the last one, or of the first that failed.

    Where there is none it hears so at once, in here.
    """
    left, at = iter(ranges), 0

    def go_on(result: Result) -> None:
        nonlocal at
        one = next(left, None) if result.status is Status.OK else None
        if one is None:
            done(result, at)
            return
        at = one.offset
        disk.submit(Request(op, at, (), go_on, length=one.length, may_unmap=one.may_unmap))

    go_on(Result(Status.OK))
