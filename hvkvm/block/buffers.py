"""Lists of buffers, as preadv and pwritev take them: cut them, clear them, read and write whole ones.

A buffer is a writable memoryview of bytes: guest pages, mostly. Nothing here copies data in Python, save
`clear`, which has a page of zeros copied by C.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from mmap import mmap

from hvkvm.memory.page_vector import PageVector

Buffers = Sequence[memoryview]

IOV_MAX = 1024
"""Linux takes no more buffers in one call (UIO_MAXIOV)."""

ZERO_BYTES = 1 << 20
_ZEROS = mmap(-1, ZERO_BYTES)
"""A run of zeros on a page boundary. It is never written, so the kernel's one zero page backs it. Who needs
it makes a view of it: without a GIL threads must not cut slices of one view."""


def size_of(buffers: Buffers) -> int:
    """The bytes in all of them."""
    if type(buffers) is PageVector:
        return buffers.size
    return sum(map(len, buffers))


def clear(buffers: Buffers) -> None:
    """Fill them with zeros."""
    for buffer in buffers:
        for at in range(0, len(buffer), ZERO_BYTES):
            part = buffer[at : at + ZERO_BYTES]
            part[:] = memoryview(_ZEROS)[: len(part)]


def zeros(length: int) -> list[memoryview]:
    """Buffers of `length` zeros, to write."""
    whole, rest = divmod(length, ZERO_BYTES)
    view = memoryview(_ZEROS).toreadonly()
    return [view] * whole + ([view[:rest]] if rest else [])


def is_zeros(buffer: memoryview) -> bool:
    """Whether it is one of what `zeros` gives."""
    return buffer.obj is _ZEROS


class Cutter:
    """Takes buffers off the front of a list, cutting the one at the border."""

    __slots__ = ("_at", "_buffers", "_index")

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self._index = 0
        self._at = 0

    def take(self, n: int) -> list[memoryview]:
        """The next `n` bytes, as views; fewer at the end."""
        taken: list[memoryview] = []
        buffers = self._buffers
        while n and self._index < len(buffers):
            buffer = buffers[self._index]
            left = len(buffer) - self._at
            if left <= n:
                taken.append(buffer[self._at :] if self._at else buffer)
                self._index += 1
                self._at = 0
                n -= left
            else:
                taken.append(buffer[self._at : self._at + n])
                self._at += n
                n = 0
        return taken


def read_fully(fd: int, buffers: Buffers, offset: int) -> int:
    """Fill `buffers` from `offset`, in as many calls as it takes; less only at the file's end. OSError."""
    if type(buffers) is PageVector:
        done = buffers.read(fd, offset)
        if done == buffers.size:
            return done
    return _fully(os.preadv, fd, buffers, offset, 0)


def write_fully(fd: int, buffers: Buffers, offset: int, flags: int = 0) -> int:
    """Write all of `buffers` at `offset`, in as many calls as it takes. OSError, ENOSPC among them.

    `flags` are those of pwritev2: os.RWF_DSYNC.
    """
    if type(buffers) is PageVector:
        done = buffers.write(fd, offset, flags)
        if done == buffers.size:
            return done
    return _fully(os.pwritev, fd, buffers, offset, flags)


def _fully(call, fd: int, buffers: Buffers, offset: int, flags: int) -> int:  # type: ignore[no-untyped-def]
    if len(buffers) <= IOV_MAX:
        done: int = call(fd, buffers, offset, flags)
        if done == size_of(buffers):
            return done
    else:
        done = 0
    cutter = Cutter(buffers)
    cutter.take(done)
    total = size_of(buffers)
    left: list[memoryview] = []
    while done < total:
        if not left:
            left = cutter.take(total - done)
        n: int = call(fd, left[:IOV_MAX], offset + done, flags)
        if n <= 0:
            break
        done += n
        rest = Cutter(left)
        rest.take(n)
        left = rest.take(total - done)
    return done
