"""Input on its way to a UART's FIFO: a bounded queue, with breaks among the bytes.

It waits here, and nothing typed before the guest's driver opened the port is lost to the driver's
FIFO resets and trial reads. Owner: the UART, under whose lock every call is made.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

RX_LIMIT = 4096
"""Bytes of input that wait for the guest; a feeder with more must wait for room."""


class InputWire:
    """`on_room()` is called when there is room again after an `add` that was cut short."""

    __slots__ = ("_breaks", "_feeder_waits", "_on_room", "_taken", "waiting")

    def __init__(self, on_room: Callable[[], object]) -> None:
        self.waiting = bytearray()
        """What the guest has not read yet. This object for ever, to be looked at only."""
        self._taken = 0  # how many bytes have left
        self._breaks: deque[int] = deque()  # the NULs that are breaks, counted from the first byte ever
        self._feeder_waits = False
        self._on_room = on_room

    @property
    def room(self) -> int:
        """Bytes that `add` would take now."""
        return RX_LIMIT - len(self.waiting)

    @property
    def break_is_next(self) -> bool:
        """Whether the first byte is a break."""
        return bool(self._breaks) and self._breaks[0] == self._taken

    @property
    def breaks(self) -> tuple[int, ...]:
        """Which of the waiting bytes are breaks."""
        return tuple(place - self._taken for place in self._breaks)

    def add(self, data: bytes) -> int:
        """Take what there is room for; the number of bytes."""
        taken = data[: max(0, self.room)]
        self.waiting += taken
        self._feeder_waits = self._feeder_waits or len(taken) < len(data)
        return len(taken)

    def add_break(self) -> bool:
        """A break, which is a NUL among the input; whether there was room."""
        place = self._taken + len(self.waiting)
        if not self.add(b"\0"):
            return False
        self._breaks.append(place)
        return True

    def put_before(self, data: bytes, breaks: Iterable[int]) -> None:
        """Have `data` come before all that waits; `breaks` are places in it, whatever they are."""
        data = data[:RX_LIMIT]
        behind = [place + len(data) for place in self._breaks]
        before = [self._taken + place for place in sorted(breaks) if 0 <= place < len(data)]
        self.waiting[:0] = data
        self._breaks = deque([*before, *behind])

    def take(self, count: int) -> bool:
        """Bytes leave; whether a break was among them."""
        del self.waiting[:count]
        self._taken += count
        passed = False
        while self._breaks and self._breaks[0] < self._taken:
            self._breaks.popleft()
            passed = True
        self._tell_feeder()
        return passed

    def drop(self) -> None:
        """Forget all of it."""
        self.waiting.clear()
        self._breaks.clear()
        self._tell_feeder()

    def _tell_feeder(self) -> None:
        if self._feeder_waits and len(self.waiting) <= RX_LIMIT // 2:
            self._feeder_waits = False
            self._on_room()
