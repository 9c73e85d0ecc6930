"""A list of guest pages read and written as one stretch of bytes, without copying it anywhere.

Why: a ring lies on pages that need not be neighbours. Neighbouring ones become
one run, and a guest's ring is mostly a single run, so that the usual access is
one slice of a memoryview. Where it is not, a run is made when it is first
needed: a guest may open and close a ring of thousands of scattered pages again
and again, and none of that may take long.

The PFNs were checked against RAM when the GPADL was made; offsets are the
caller's to keep in bounds (a ring's are, see `ring`). Owner: who owns the ring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import eq
from typing import Protocol

from hvkvm.abi.vmbus import HV_HYP_PAGE_SIZE
from hvkvm.errors import GuestMemoryError
from hvkvm.memory.guest import RamRegion


class Ram(Protocol):
    """What is needed of `memory.guest.GuestMemory`."""

    @property
    def regions(self) -> Sequence[RamRegion]: ...

    def contains(self, gpa: int, n: int) -> bool: ...

    def view(self, gpa: int, n: int) -> memoryview: ...

    def hva(self, gpa: int, n: int) -> int: ...


RUN_PAGES = 64
"""Most pages of a run that is not the only one."""


class GuestPages:
    """The pages `pfns` in their order, `size` bytes in all. GuestMemoryError for one outside RAM."""

    __slots__ = ("_memory", "_pfns", "_runs", "only", "size")

    def __init__(self, memory: Ram, pfns: Sequence[int]) -> None:
        count, first = len(pfns), pfns[0]
        self.size = count * HV_HYP_PAGE_SIZE
        self._memory = memory
        self._pfns = pfns
        self.only: memoryview | None = None
        """All of them, if they are one run."""
        # By the index of the page that they begin with; up to the next page that is no neighbour.
        self._runs: dict[int, memoryview] = {}
        if pfns[-1] - first == count - 1 and all(map(eq, pfns, range(first, first + count))):
            self.only = memory.view(first * HV_HYP_PAGE_SIZE, self.size)
            return
        lowest, highest = min(pfns), max(pfns)
        if not memory.contains(lowest * HV_HYP_PAGE_SIZE, (highest - lowest + 1) * HV_HYP_PAGE_SIZE):
            for pfn in pfns:
                if not memory.contains(pfn * HV_HYP_PAGE_SIZE, HV_HYP_PAGE_SIZE):
                    raise GuestMemoryError(pfn * HV_HYP_PAGE_SIZE, HV_HYP_PAGE_SIZE)

    def _run(self, index: int) -> memoryview:
        pfns = self._pfns
        pfn, end = pfns[index], index + 1
        most = min(len(pfns), index + RUN_PAGES)
        while end < most and pfns[end] == pfn + end - index:
            end += 1
        run = self._memory.view(pfn * HV_HYP_PAGE_SIZE, (end - index) * HV_HYP_PAGE_SIZE)
        self._runs[index] = run
        return run

    def views(self, offset: int, n: int) -> list[memoryview]:
        """Zero-copy views of `n` bytes from `offset`, in order: made for preadv and pwritev."""
        if self.only is not None:
            return [self.only[offset : offset + n]]
        found = []
        while n > 0:
            index, at = divmod(offset, HV_HYP_PAGE_SIZE)
            part = (self._runs.get(index) or self._run(index))[at : at + n]
            found.append(part)
            n -= len(part)
            offset += len(part)
        return found

    def read(self, offset: int, n: int) -> bytes:
        """A copy of `n` bytes."""
        if self.only is not None:
            return self.only[offset : offset + n].tobytes()
        return b"".join(self.views(offset, n))

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data`."""
        if self.only is not None:
            self.only[offset : offset + len(data)] = data
            return
        at = 0
        for view in self.views(offset, len(data)):
            view[:] = data[at : at + len(view)]
            at += len(view)

    def write_all(self, offset: int, parts: Sequence[bytes | memoryview]) -> None:
        """Write all of `parts`, one behind the other."""
        only = self.only
        if only is not None:
            for part in parts:
                end = offset + len(part)
                only[offset:end] = part
                offset = end
            return
        runs = self._runs
        run, at, left = memoryview(bytearray()), 0, 0
        for part in parts:
            data, n = part, len(part)
            while n > left:
                if left:
                    run[at:] = data[:left]
                    data = data[left:]
                    n -= left
                    offset += left
                index, at = divmod(offset, HV_HYP_PAGE_SIZE)
                run = runs.get(index) or self._run(index)
                left = len(run) - at
            run[at : at + n] = data
            at += n
            left -= n
            offset += n


def range_views(
    memory: Ram,
    pfns: Sequence[int],
    offset: int,
    length: int,
    page: Callable[[int], memoryview] | None = None,
) -> list[memoryview]:
    """Views of `length` bytes that begin `offset` bytes into the first of `pfns`; neighbours are one view.

    The pages hold that many. GuestMemoryError for one outside RAM: they are a guest's words. `page(pfn)` is
    the view of a whole page without neighbours, where there is a cheaper way to it than `memory`.
    """
    if offset + length <= HV_HYP_PAGE_SIZE:
        return [memory.view(pfns[0] * HV_HYP_PAGE_SIZE + offset, length)]
    found = []
    index, count = 0, len(pfns)
    while length > 0:
        first = pfns[index]
        index += 1
        room, neighbour = HV_HYP_PAGE_SIZE - offset, first + 1
        while room < length and index < count and pfns[index] == neighbour:
            index += 1
            neighbour += 1
            room += HV_HYP_PAGE_SIZE
        if room == HV_HYP_PAGE_SIZE <= length and page is not None:
            found.append(page(first))
            length -= HV_HYP_PAGE_SIZE
            continue
        size = min(room, length)
        found.append(memory.view(first * HV_HYP_PAGE_SIZE + offset, size))
        length -= size
        offset = 0
    return found
