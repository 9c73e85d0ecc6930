"""The receive and send buffers that a NIC's driver lends its host, and who has which part of the first.

The guest describes each as a GPADL and keeps it mapped. The receive buffer is handed out front to back, in
pieces as long as what goes into them: a guest learns where by the packet that names them, and gives them back
by the packet's completion. Linux takes a piece of up to the size it was told (`section`), anywhere in the
buffer, and keeps as many completions at a time as it was told there are sections.

Owner: the I/O loop. Nothing here raises for what a guest does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from hvkvm.abi.vmbus import HV_HYP_PAGE_SIZE
from hvkvm.vmbus.gpadl import Gpadl
from hvkvm.vmbus.pages import GuestPages, Ram

MAX_BUFFER_BYTES = 1 << 28
"""Longest buffer: Linux's are 16 MiB and 1 MiB, and may be made some times longer."""


class GuestBuffer:
    """A GPADL of one range as bytes. `offset` counts from the range's first byte."""

    __slots__ = ("_base", "_pages", "gpadl_id", "size")

    def __init__(self, memory: Ram, gpadl: Gpadl) -> None:
        """ValueError for a GPADL that is no buffer."""
        if len(gpadl.ranges) != 1 or gpadl.ranges[0].byte_count > MAX_BUFFER_BYTES:
            raise ValueError("a buffer is one range")
        only = gpadl.ranges[0]
        self._pages = GuestPages(memory, only.pfns)
        self._base = only.byte_offset
        self.size = min(only.byte_count, len(only.pfns) * HV_HYP_PAGE_SIZE - only.byte_offset)
        self.gpadl_id = gpadl.gpadl_id

    def read(self, offset: int, n: int) -> bytes:
        """A copy; the caller keeps it inside `size`."""
        only, at = self._pages.only, self._base + offset
        return self._pages.read(at, n) if only is None else only[at : at + n].tobytes()

    def write_all(self, offset: int, parts: Sequence[bytes | memoryview]) -> None:
        """Write all of `parts`, one behind the other; the caller keeps them inside `size`."""
        self._pages.write_all(self._base + offset, parts)


class Pieces:
    """Which pieces of `size` bytes are lent out: a ring, in order; at most `count` at a time.

    A piece is known by the transaction id of its packet. What comes back out of order waits for those
    before it.
    """

    __slots__ = ("_count", "_head", "_lent", "_next_id", "_order", "_size")

    def __init__(self, size: int, count: int, first_id: int = 1) -> None:
        self._size = size
        self._count = count
        self._next_id = first_id
        self._order: deque[int] = deque()
        self._lent: dict[int, tuple[int, int]] = {}
        """Of each id in `_order` where it begins, and whether it is back: (start, 0) out, (start, 1) back."""
        self._head = 0

    @property
    def lent(self) -> int:
        """How many are out, those that are back but wait for others included."""
        return len(self._order)

    @property
    def next_id(self) -> int:
        """The id of the next piece."""
        return self._next_id

    def is_out(self, ident: int) -> bool:
        """Whether the guest has a piece of that id."""
        found = self._lent.get(ident)
        return found is not None and not found[1]

    def room(self, most: int) -> tuple[int, int]:
        """Where the longest free stretch that comes next begins, and its bytes, up to `most`."""
        order = self._order
        if not order:
            self._head = 0
            return 0, min(most, self._size)
        if len(order) >= self._count:
            return 0, 0
        tail = self._lent[order[0]][0]
        head = self._head
        if head < tail:
            return head, max(0, min(most, tail - head - 8))
        if self._size - head >= most or self._size - head > tail:
            return head, min(most, self._size - head)
        return 0, max(0, min(most, tail - 8))

    def lend(self, start: int, n: int) -> int:
        """Give out `n` bytes at `start`, as `room` said; the id."""
        ident = self._next_id
        self._next_id += 1
        self._head = start + n
        self._order.append(ident)
        self._lent[ident] = (start, 0)
        return ident

    def take_back_last(self) -> None:
        """Undo the last `lend`: its packet could not be sent."""
        ident = self._order.pop()
        self._next_id = ident
        self._head = self._lent.pop(ident)[0]

    def back(self, ident: int) -> bool:
        """The guest has done with a piece; False if it has none of that id."""
        found = self._lent.get(ident)
        if found is None or found[1]:
            return False
        self._lent[ident] = (found[0], 1)
        order, lent = self._order, self._lent
        while order and lent[order[0]][1]:
            del lent[order.popleft()]
        return True

    def save(self) -> tuple[tuple[int, int, int], ...]:
        """The pieces in order: id, start, whether it is back; and last (next id, head, 0)."""
        found = [(ident, *self._lent[ident]) for ident in self._order]
        return (*found, (self._next_id, self._head, 0))

    def load(self, saved: tuple[tuple[int, int, int], ...]) -> None:
        """Be what `save` gave. ValueError for what it cannot have been."""
        *pieces, (next_id, head, _zero) = saved or ((0, -1, 0),)
        idents = [ident for ident, _start, _is_back in pieces]
        right = 0 < next_id < 1 << 63 and 0 <= head <= self._size and len(pieces) <= self._count
        right = right and idents == sorted(set(idents)) and all(0 < ident < next_id for ident in idents)
        if not right or any(not 0 <= start < self._size for _id, start, _is_back in pieces):
            raise ValueError("the receive buffer is lent out as it cannot have been")
        self._next_id, self._head = next_id, head
        self._order = deque(idents)
        self._lent = {ident: (start, int(bool(is_back))) for ident, start, is_back in pieces}
