"""Guest pages as the kernel's own list of buffers (struct iovec), for one preadv or pwritev.

Why: a request of 1 MiB names 256 pages, which are mostly no neighbours. A memoryview of each, and the
buffer that Python takes of each for the call, cost more time than the kernel's copy of the data. Here the
list is made by arithmetic on whole arrays: a shift and an addition of one long integer, which has a page
in every 64 bits of it.

What has to look at the pieces still can: a PageVector is a sequence of memoryviews, made when they are first
asked for. It keeps RAM mapped for as long as it lives, as a view does.

Any thread.
"""

from __future__ import annotations

import ctypes
import errno
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_char, c_int, c_int64, c_ssize_t, c_void_p, get_errno
from functools import cache
from typing import Protocol, overload

from hvkvm.errors import GuestMemoryError
from hvkvm.memory.mapping import PAGE_SIZE

LEAST_PAGES = 16
"""Fewer are as quick as memoryviews."""

MOST_PAGES = 1024
"""Linux takes no more buffers in one call (UIO_MAXIOV)."""

_SHIFT = PAGE_SIZE.bit_length() - 1

# CDLL gives the GIL away: the call may take seconds.
_libc = ctypes.CDLL(None, use_errno=True)
_Call = Callable[[int, int, int, int, int], int]


class Ram(Protocol):
    """What is needed of guest memory."""

    def view(self, gpa: int, n: int) -> memoryview: ...


def _call(name: str) -> _Call | None:
    """glibc's wrapper, or None in a C library without it."""
    try:
        found = getattr(_libc, name)
    except AttributeError:
        return None
    found.argtypes = (c_int, c_void_p, c_int, c_int64, c_int)
    found.restype = c_ssize_t
    call: _Call = found
    return call


_preadv2 = _call("preadv2")
_pwritev2 = _call("pwritev2")


@cache
def _ones() -> int:
    """A 1 in every 64 bits, for MOST_PAGES of them."""
    return ((1 << 64 * MOST_PAGES) - 1) // ((1 << 64) - 1)


class PageVector(Sequence[memoryview]):
    """`length` bytes that begin `offset` bytes into the first of the pages `pfns`, which hold that many."""

    __slots__ = ("_base", "_iovec", "_keep", "_pfns", "_views", "offset", "size")

    def __init__(self, pages: memoryview, low: int, pfns: Sequence[int], offset: int, length: int) -> None:
        # `pages` are those from `low` up to the highest of `pfns`.
        count = len(pfns)
        self._keep = pages
        self._base = low
        self._pfns = pfns
        self._views: list[memoryview] | None = None
        self.offset = offset
        self.size = length
        first = ctypes.addressof(c_char.from_buffer(pages))
        numbers = int.from_bytes(array("Q", pfns).tobytes(), "little") << _SHIFT
        numbers += (first - (low << _SHIFT)) * (_ones() >> 64 * (MOST_PAGES - count))
        self._iovec = iovec = array("Q", (0, PAGE_SIZE)) * count
        iovec[::2] = array("Q", numbers.to_bytes(8 * count, "little"))
        iovec[0] += offset
        iovec[1] = PAGE_SIZE - offset
        iovec[-1] -= count * PAGE_SIZE - offset - length

    def read(self, fd: int, position: int, flags: int = 0) -> int:
        """preadv2 to all of it: how many bytes. OSError."""
        return self._transfer(_preadv2, fd, position, flags)

    def write(self, fd: int, position: int, flags: int = 0) -> int:
        """pwritev2 of all of it: how many bytes. OSError."""
        return self._transfer(_pwritev2, fd, position, flags)

    def _transfer(self, call: _Call | None, fd: int, position: int, flags: int) -> int:
        assert call is not None  # else `page_vector` makes none
        address, words = self._iovec.buffer_info()
        while True:
            done = call(fd, address, words // 2, position, flags)
            if done >= 0:
                return done
            number = get_errno()
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number))

    def _pieces(self) -> list[memoryview]:
        views = self._views
        if views is None:
            views, keep, left, at = [], self._keep, self.size, self.offset
            for pfn in self._pfns:
                start = (pfn - self._base << _SHIFT) + at
                n = min(left, PAGE_SIZE - at)
                views.append(keep[start : start + n])
                left -= n
                at = 0
            self._views = views
        return views

    @overload
    def __getitem__(self, index: int) -> memoryview: ...
    @overload
    def __getitem__(self, index: slice) -> list[memoryview]: ...
    def __getitem__(self, index: int | slice) -> memoryview | list[memoryview]:
        return self._pieces()[index]

    def __iter__(self) -> Iterator[memoryview]:
        return iter(self._pieces())

    def __len__(self) -> int:
        return len(self._pfns)


def page_vector(memory: Ram, pfns: Sequence[int], offset: int, length: int) -> PageVector | None:
    """None where memoryviews do as well, or must do: for few pages, for neighbours, and outside of RAM.

    `length` ends in the last of the pages.
    """
    count = len(pfns)
    if not LEAST_PAGES <= count <= MOST_PAGES or _preadv2 is None or _pwritev2 is None:
        return None
    low, high = min(pfns), max(pfns)
    if high - low == count - 1:  # most likely one run
        return None
    try:
        pages = memory.view(low << _SHIFT, high - low + 1 << _SHIFT)
    except GuestMemoryError:
        return None
    return PageVector(pages[:], low, pfns, offset, length)
