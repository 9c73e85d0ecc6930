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
from ctypes import c_int, c_int64, c_ssize_t, c_void_p, get_errno
from functools import lru_cache
from typing import NamedTuple, Protocol, overload

from hvkvm.errors import GuestMemoryError
from hvkvm.memory.guest import RamRegion
from hvkvm.memory.mapping import PAGE_SIZE

LEAST_PAGES = 16
"""Fewer are as quick as memoryviews."""

MOST_PAGES = 1024
"""Linux takes no more buffers in one call (UIO_MAXIOV)."""

_SHIFT = PAGE_SIZE.bit_length() - 1
_TOP = 1 << 63

# CDLL gives the GIL away: the call may take seconds.
_libc = ctypes.CDLL(None, use_errno=True)
_Call = Callable[[int, int, int, int, int], int]


class Ram(Protocol):
    """What is needed of guest memory."""

    @property
    def regions(self) -> Sequence[RamRegion]: ...
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


class _Lanes(NamedTuple):
    """For integers that have a number in each 64 bits: 1, 2**63, and 0, 1, 2 ... in all of them."""

    ones: int
    tops: int
    counted: int
    buffers: array[int]
    """Addresses yet to be filled in, and the length of a page for each."""


@lru_cache(maxsize=64)  # a guest chooses how many
def _lanes(count: int) -> _Lanes:
    ones = ((1 << 64 * count) - 1) // ((1 << 64) - 1)
    counted = int.from_bytes(array("Q", range(count)).tobytes(), "little")
    return _Lanes(ones, ones << 63, counted, array("Q", (0, PAGE_SIZE)) * count)


def _inside(numbers: int, lanes: _Lanes, first: int, end: int) -> bool:
    """Whether each number is at least `first` and less than `end`, both less than 2**63."""
    tops = lanes.tops
    if numbers & tops or (numbers + (_TOP - end) * lanes.ones) & tops:
        return False
    return not first or (numbers + (_TOP - first) * lanes.ones) & tops == tops


class PageVector(Sequence[memoryview]):
    """`length` bytes that begin `offset` bytes into the first of some pages of `region`."""

    __slots__ = ("_base", "_iovec", "_keep", "_pages", "_views", "offset", "size")

    def __init__(
        self, region: RamRegion, whole: memoryview, pages: bytes, addresses: bytes, offset: int, length: int
    ) -> None:
        count = len(pages) >> 3
        self._keep = whole
        self._base = region.gpa
        self._pages = pages
        self._views: list[memoryview] | None = None
        self.offset = offset
        self.size = length
        self._iovec = iovec = _lanes(count).buffers[:]
        iovec[::2] = array("Q", addresses)
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
            for pfn in array("Q", self._pages):
                start = (pfn << _SHIFT) - self._base + at
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
        return len(self._pages) >> 3


def page_vector(memory: Ram, pages: bytes, offset: int, length: int) -> PageVector | None:
    """`pages` are page numbers of 8 bytes each; `length` ends in the last of them.

    None where memoryviews do as well, or must do: for few pages, for neighbours, for those on both sides of
    the hole below 4 GiB, and for what is no RAM.
    """
    count = len(pages) >> 3
    if not LEAST_PAGES <= count <= MOST_PAGES or _preadv2 is None or _pwritev2 is None:
        return None
    numbers = int.from_bytes(pages, "little")
    lanes = _lanes(count)
    first = int.from_bytes(pages[:8], "little")
    if numbers == first * lanes.ones + lanes.counted:
        return None
    for region in memory.regions:
        if _inside(numbers, lanes, region.gpa >> _SHIFT, region.end >> _SHIFT):
            try:
                whole = memory.view(region.gpa, region.size)[:]
            except GuestMemoryError:  # it is closed
                return None
            addresses = (numbers << _SHIFT) + (region.hva - region.gpa) * lanes.ones
            return PageVector(region, whole, pages, addresses.to_bytes(8 * count, "little"), offset, length)
    return None
