"""Numbers for KVM memory slots: a few, reused lowest first.

`GuestMemory` owns the one allocator of its VM. Any thread.
"""

from __future__ import annotations

import heapq
import threading

from hvkvm.errors import HvkvmError


class NoSlotLeft(HvkvmError):
    """Every memory slot that KVM has for a VM is taken."""


class SlotAllocator:
    """Hands out slot numbers 0..limit-1 (KVM_CAP_NR_MEMSLOTS); raises NoSlotLeft when none is left."""

    def __init__(self, limit: int) -> None:
        self._lock = threading.Lock()
        self._limit = limit
        self._next = 0
        self._free: list[int] = []

    def take(self) -> int:
        """The lowest free number."""
        with self._lock:
            if self._free:
                return heapq.heappop(self._free)
            if self._next == self._limit:
                raise NoSlotLeft(f"no KVM memory slot is left of {self._limit}")
            self._next += 1
            return self._next - 1

    def give_back(self, slot: int) -> None:
        """Free a number; ValueError if it is not taken."""
        with self._lock:
            if not 0 <= slot < self._next or slot in self._free:
                raise ValueError(f"memory slot {slot} is not taken")
            heapq.heappush(self._free, slot)
