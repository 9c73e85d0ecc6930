"""Reads and writes that wait for nothing: tried on the loop, in one system call, with no other thread.

Where the page cache has what is read, or takes what is written, a worker would only cost time. Where it does
not, the call says so at once, and for a while the next requests are not even tried.

Owner: the I/O loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hvkvm.block.buffers import Buffers
from hvkvm.block.counter import Counter
from hvkvm.block.image import Image
from hvkvm.block.request import Result, Status

NOW_BYTES = 2 << 20
"""Bytes that are moved on the loop in a turn, the rest by workers: more would keep it from its other work."""

MAX_SKIP = 64
"""After misses of the page cache so many requests at most go to a worker without being tried on the loop."""


class Turn:
    """What may still be moved on the loop in this turn, in bytes, by all of a disk's ways."""

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.left = NOW_BYTES


class Way:
    """Tries one kind of request; `count` is how often it went well, `works` whether it ever may."""

    __slots__ = ("_counter", "_image", "_skip", "_skips", "_turn", "count", "result", "works")

    def __init__(self, image: Image, turn: Turn, counter: Counter) -> None:
        self._image = image
        self._turn = turn
        self._counter = counter
        self._skip = self._skips = 0
        self.works = True
        self.count = 0
        self.result = Result(Status.OK)
        """Of the last one that went well."""

    def move(self, offset: int, buffers: Buffers, length: int) -> bool:
        """Whether all `length` bytes were moved; else a worker has to, and names what went wrong."""
        if length > self._turn.left or not self.works:
            return False
        if self._skip:
            self._skip -= 1
            return False
        self._turn.left -= length
        try:
            n = self._call()(offset, buffers)
        except Exception:
            n = 0  # the worker meets the same, and names it
        if n == length:
            self._skips = 0
            self.count += 1
            if n != self.result.transferred:
                self.result = Result(Status.OK, n)
            return True
        if n < 0:
            self.works = False
        self._skip = self._skips = min(MAX_SKIP, 2 * self._skips + 1)
        return False

    @property
    def tries(self) -> bool:
        """Whether it would try now."""
        return self.works and not self._skip

    def move_each(self, offsets: Sequence[int], buffers: Sequence[Buffers], length: int) -> int:
        """Move requests of `length` bytes each, up to the first that is not moved: how many were.

        As so many calls of `move`, but a miss counts for nothing: the caller tries that one by `move`.
        """
        if not self.tries:
            return 0
        most = self._turn.left // length
        call = self._call()
        n = 0
        try:
            for offset, one in zip(offsets[:most], buffers, strict=False):
                if call(offset, one) != length:
                    break
                n += 1
        except Exception:  # it comes again where it is named
            pass
        self._turn.left -= n * length
        if n:
            self._skips = 0
            self.count += n
            if length != self.result.transferred:
                self.result = Result(Status.OK, length)
        return n

    def tally(self, requests: int, size: int) -> None:
        """So many requests of so many bytes in all are answered."""
        self._counter.requests += requests
        self._counter.bytes += size

    def _call(self) -> Callable[[int, Buffers], int]:
        """What moves bytes between an offset and buffers, or says that it would have to wait."""
        raise NotImplementedError


class ReadWay(Way):
    """Reads what the page cache has."""

    __slots__ = ()

    def _call(self) -> Callable[[int, Buffers], int]:
        return self._image.readv_now


class WriteWay(Way):
    """Writes what the page cache takes. What was written in part a worker writes again, all of it."""

    __slots__ = ()

    def _call(self) -> Callable[[int, Buffers], int]:
        return self._image.writev_now
