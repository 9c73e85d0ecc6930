"""Ring buffers in guest pages: what both ends share. `ring_reader` and `ring_writer` serve either side.

The peer owns its index and everything that its packets say, and may change them
at any moment. So an index is read once, checked, and the checked copy is used
(S61); what a packet says about its length is copied before it is believed. A
peer that breaks the rules makes the ring `broken`, with the reason as text: it
gives no more packets, takes none, and raises nothing.

Signals. A producer signals only if the ring was empty when it published and the
consumer's interrupt_mask is 0; a consumer only if a producer waits for room
(pending_send_sz) and now has it. Both publish first, then fence, then look: the
peer does the same the other way round, so that one of them sees the other.

Index stores and loads are single words of a memoryview, which x86 orders as
release and acquire. Owner: one thread a ring end.
"""

from __future__ import annotations

from collections.abc import Sequence

from hvkvm.abi.ring import (
    RING_CONTROL_BYTES,
    WORD_FEATURE_BITS,
    WORD_INTERRUPT_MASK,
    WORD_PENDING_SEND_SZ,
    WORD_READ_INDEX,
    WORD_WRITE_INDEX,
)
from hvkvm.vmbus.pages import GuestPages, Ram

MAX_PACKET_BYTES = 0xFFFF * 8
"""Most that len8 can say, in bytes."""


class RingEnd:
    """What both ends share: the control words and the data area, which wraps."""

    __slots__ = ("_data", "broken", "size", "words")

    def __init__(self, memory: Ram, pfns: Sequence[int]) -> None:
        control = memory.view(pfns[0] * RING_CONTROL_BYTES, RING_CONTROL_BYTES)
        self.words = control.cast("I")
        self._data = GuestPages(memory, pfns[1:])
        self.size = self._data.size
        self.broken = ""
        """Why the ring is used no more; empty while all is well."""

    def _index(self, word: int, name: str) -> int | None:
        """The checked value of an index word, read once; None breaks the ring."""
        value = self.words[word]
        if value >= self.size or value & 7:
            self.broken = self.broken or f"{name} {value:#x} in a ring of {self.size:#x} bytes"
            return None
        return value

    def _read(self, at: int, n: int) -> bytes:
        end = at + n
        if end <= self.size:
            return self._data.read(at, n)
        first = self.size - at
        return self._data.read(at, first) + self._data.read(0, n - first)

    def _views(self, at: int, n: int) -> list[memoryview]:
        end = at + n
        if end <= self.size:
            return self._data.views(at, n)
        first = self.size - at
        return self._data.views(at, first) + self._data.views(0, n - first)

    def _write(self, at: int, data: bytes | memoryview) -> int:
        """Write `data`; the index behind it."""
        n = len(data)
        end = at + n
        if end < self.size:
            self._data.write(at, data)
            return end
        first = self.size - at
        view = memoryview(data)
        self._data.write(at, view[:first])
        if n > first:
            self._data.write(0, view[first:])
        return n - first

    def snapshot(self) -> dict[str, int | str | None]:
        """Indices, mask and pending size as they are now. Any thread.

        `free` bytes are None while the indices make no sense.
        """
        w = self.words
        write, read = w[WORD_WRITE_INDEX], w[WORD_READ_INDEX]
        sane = write < self.size and read < self.size
        return {
            "size": self.size,
            "write_index": write,
            "read_index": read,
            "free": self.size - (write - read) % self.size if sane else None,
            "interrupt_mask": w[WORD_INTERRUPT_MASK],
            "pending_send_sz": w[WORD_PENDING_SEND_SZ],
            "feature_bits": w[WORD_FEATURE_BITS],
            "broken": self.broken,
        }
