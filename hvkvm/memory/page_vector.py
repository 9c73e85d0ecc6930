"""Guest pages, or pieces of RAM, as the kernel's list of buffers (struct iovec), for one preadv or pwritev.

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
from typing import Protocol, overload

from hvkvm.errors import GuestMemoryError
from hvkvm.memory.guest import RamRegion
from hvkvm.memory.mapping import PAGE_SIZE
from hvkvm.tuples import NamedTuple

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


_PAIR_TOP = 1 << 127


class _Pairs(NamedTuple):
    """For integers that have a number in each 128 bits: 1, 2**127, and the lower 64 bits in all of them."""

    ones: int
    tops: int
    low: int


def page_numbers(addresses: bytes) -> bytes | None:
    """The numbers of pages of which `addresses` has the addresses, 8 bytes each; None if one is no page's."""
    count = len(addresses) >> 3
    together = int.from_bytes(addresses, "little")
    if together & (PAGE_SIZE - 1) * _lanes(count).ones:
        return None
    return (together >> _SHIFT).to_bytes(8 * count, "little")


@lru_cache(maxsize=64)  # a guest chooses how many
def _pairs(count: int) -> _Pairs:
    ones = ((1 << 128 * count) - 1) // ((1 << 128) - 1)
    return _Pairs(ones, ones << 127, ones * ((1 << 64) - 1))


def _inside(numbers: int, lanes: _Lanes, first: int, end: int) -> bool:
    """Whether each number is at least `first` and less than `end`, both less than 2**63."""
    tops = lanes.tops
    if numbers & tops or (numbers + (_TOP - end) * lanes.ones) & tops:
        return False
    return not first or (numbers + (_TOP - first) * lanes.ones) & tops == tops


class PageVector(Sequence[memoryview]):
    """`size` bytes in pieces of `region`: `iovec` has the address and the length of each."""

    __slots__ = ("_hva", "_iovec", "_keep", "_views", "size")

    def __init__(self, region: RamRegion, whole: memoryview, iovec: array[int], size: int) -> None:
        self._hva = region.hva
        self._keep = whole
        self._iovec = iovec
        self._views: list[memoryview] | None = None
        self.size = size

    def is_aligned(self, alignment: int) -> bool:
        """Whether all addresses and lengths are multiples of it, a power of two."""
        iovec = self._iovec
        return not int.from_bytes(iovec.tobytes(), "little") & (alignment - 1) * _lanes(len(iovec)).ones

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
            keep, hva, iovec = self._keep, self._hva, self._iovec
            starts = [address - hva for address in iovec[::2]]
            views = [keep[at : at + n] for at, n in zip(starts, iovec[1::2], strict=True)]
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
        return len(self._iovec) >> 1


def page_vector(memory: Ram, pages: bytes, offset: int, length: int) -> PageVector | None:
    """`pages` are page numbers of 8 bytes each; `length` ends in the last of them.

    Neighbours are one piece. None where memoryviews do as well, or must do: for few pages, for those on both
    sides of the hole below 4 GiB, and for what is no RAM.
    """
    count = len(pages) >> 3
    if not LEAST_PAGES <= count <= MOST_PAGES or _preadv2 is None or _pwritev2 is None:
        return None
    numbers = int.from_bytes(pages, "little")
    lanes = _lanes(count)
    first = int.from_bytes(pages[:8], "little")
    for region in memory.regions:
        if _inside(numbers, lanes, region.gpa >> _SHIFT, region.end >> _SHIFT):
            whole = _whole(memory, region)
            if whole is None:
                return None
            if numbers == first * lanes.ones + lanes.counted:
                start = (first << _SHIFT) + region.hva - region.gpa + offset
                return PageVector(region, whole, array("Q", (start, length)), length)
            addresses = (numbers << _SHIFT) + (region.hva - region.gpa) * lanes.ones
            iovec = lanes.buffers[:]
            iovec[::2] = array("Q", addresses.to_bytes(8 * count, "little"))
            iovec[0] += offset
            iovec[1] = PAGE_SIZE - offset
            iovec[-1] -= count * PAGE_SIZE - offset - length
            return PageVector(region, whole, iovec, length)
    return None


def piece_vector(memory: Ram, pieces: int, count: int) -> PageVector | None:
    """`count` pieces of RAM as one long integer: 64 bits each of address and length, the first one lowest.

    A length has 32 bits. None where memoryviews do as well, or must do, as with `page_vector`.
    """
    if not LEAST_PAGES <= count <= MOST_PAGES or _preadv2 is None or _pwritev2 is None:
        return None
    pairs = _pairs(count)
    addresses = pieces & pairs.low
    ends = addresses + (pieces >> 64 & pairs.low)
    for region in memory.regions:
        # A pair has room for a carry, so that no address can reach the next one's.
        if (addresses + (_PAIR_TOP - region.gpa) * pairs.ones) & pairs.tops != pairs.tops:
            continue
        if (ends + (_PAIR_TOP - 1 - region.end) * pairs.ones) & pairs.tops:
            continue
        whole = _whole(memory, region)
        if whole is None:
            return None
        iovec = array("Q", (pieces + (region.hva - region.gpa) * pairs.ones).to_bytes(16 * count, "little"))
        return PageVector(region, whole, iovec, sum(iovec[1::2]))
    return None


def _whole(memory: Ram, region: RamRegion) -> memoryview | None:
    """All of a region, which stays mapped for as long as the view lives."""
    try:
        return memory.view(region.gpa, region.size)[:]
    except GuestMemoryError:  # it is closed
        return None
