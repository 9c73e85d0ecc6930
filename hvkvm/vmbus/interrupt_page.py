"""The interrupt page of a guest that speaks VMBus 0.13 or 1.1: two bitmaps, a channel's bit is its relid.

Why: before 2.4 a connection had one event flag and one doorbell for all of its channels, and the page says
which of them is meant. The first half is the guest's to read and clear, the second half ours: bits are set
and taken one 64-bit word at a time by atomic operations, since both sides write the same words.

The page is guest memory: every bit may be set at any time, for channels that there are not, too. Owner:
the I/O loop.
"""

from __future__ import annotations

from hvkvm.abi.vmbus import HV_HYP_PAGE_SIZE, MAX_RELID, SEND_HALF
from hvkvm.memory.atomics import fetch_and_8, fetch_or_8
from hvkvm.vmbus.pages import Ram

_BYTES = (MAX_RELID + 8) // 8
"""Of each half, those that a relid can stand in; the rest belongs to nobody, and is left alone."""
_NONE = bytes(_BYTES)


class InterruptPage:
    """The page at `gpa`, a multiple of 4096. GuestMemoryError for one outside RAM."""

    __slots__ = ("_receive", "_send", "_sent", "gpa")

    def __init__(self, memory: Ram, gpa: int) -> None:
        self.gpa = gpa
        self._receive = memory.hva(gpa, HV_HYP_PAGE_SIZE)
        self._send = self._receive + SEND_HALF
        self._sent = memory.view(gpa + SEND_HALF, _BYTES)

    def mark(self, relid: int) -> None:
        """Set a channel's bit for the guest; an event flag behind it tells the guest to look."""
        fetch_or_8(self._receive + (relid >> 6) * 8, 1 << (relid & 63))

    def take(self) -> list[int]:
        """The relids whose bits the guest has set, which are cleared. At most MAX_RELID + 1 of them."""
        seen = self._sent.tobytes()
        found: list[int] = []
        if seen == _NONE:
            return found
        for at in range(0, _BYTES, 8):
            if seen[at : at + 8] == _NONE[:8]:
                continue
            word = fetch_and_8(self._send + at, 0)
            first = at * 8
            while word:
                low = word & -word
                found.append(first + low.bit_length() - 1)
                word ^= low
        return found
