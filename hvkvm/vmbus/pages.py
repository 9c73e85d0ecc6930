"""A list of guest pages read and written as one stretch of bytes, without copying it anywhere.

Why: a ring lies on pages that need not be neighbours. Neighbouring ones become
one run, and a guest's ring is mostly a single run, so that the usual access is
one slice of a memoryview.

The PFNs were checked against RAM when the GPADL was made; offsets are the
caller's to keep in bounds (a ring's are, see `ring`). Owner: who owns the ring.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Protocol

from hvkvm.abi.vmbus import HV_HYP_PAGE_SIZE


class Ram(Protocol):
    """What is needed of `memory.guest.GuestMemory`."""

    def contains(self, gpa: int, n: int) -> bool: ...

    def view(self, gpa: int, n: int) -> memoryview: ...


class GuestPages:
    """The pages `pfns` in their order, `size` bytes in all. GuestMemoryError for one outside RAM."""

    __slots__ = ("_only", "_runs", "_starts", "size")

    def __init__(self, memory: Ram, pfns: Sequence[int]) -> None:
        runs: list[memoryview] = []
        starts: list[int] = []
        first = 0
        for index in range(1, len(pfns) + 1):
            if index < len(pfns) and pfns[index] == pfns[index - 1] + 1:
                continue
            starts.append(first * HV_HYP_PAGE_SIZE)
            runs.append(memory.view(pfns[first] * HV_HYP_PAGE_SIZE, (index - first) * HV_HYP_PAGE_SIZE))
            first = index
        self._runs = runs
        self._starts = starts
        self._only = runs[0] if len(runs) == 1 else None
        self.size = len(pfns) * HV_HYP_PAGE_SIZE

    def views(self, offset: int, n: int) -> list[memoryview]:
        """Zero-copy views of `n` bytes from `offset`, one for each run: made for preadv and pwritev."""
        if self._only is not None:
            return [self._only[offset : offset + n]]
        found = []
        at = bisect_right(self._starts, offset) - 1
        offset -= self._starts[at]
        while n > 0:
            part = self._runs[at][offset : offset + n]
            found.append(part)
            n -= len(part)
            at, offset = at + 1, 0
        return found

    def read(self, offset: int, n: int) -> bytes:
        """A copy of `n` bytes."""
        if self._only is not None:
            return self._only[offset : offset + n].tobytes()
        return b"".join(self.views(offset, n))

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data`."""
        if self._only is not None:
            self._only[offset : offset + len(data)] = data
            return
        at = 0
        for view in self.views(offset, len(data)):
            view[:] = data[at : at + len(view)]
            at += len(view)
