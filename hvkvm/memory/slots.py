"""Numbers for KVM memory slots: a few, reused lowest first.

`GuestMemory` owns the one allocator of its VM. Any thread.
"""

from __future__ import annotations

import heapq
import threading

from hvkvm.errors import HvkvmError

DEFAULT_LIMIT = 509
"""Slots that every KVM x86 has ever offered to userspace (KVM_USER_MEM_SLOTS of old kernels)."""


class SlotAllocator:
    """Hands out slot numbers 0..limit-1; raises HvkvmError when none is left."""

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
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
                raise HvkvmError(f"no KVM memory slot is left of {self._limit}")
            self._next += 1
            return self._next - 1

    def give_back(self, slot: int) -> None:
        """Free a number; ValueError if it is not taken."""
        with self._lock:
            if not 0 <= slot < self._next or slot in self._free:
                raise ValueError(f"memory slot {slot} is not taken")
            heapq.heappush(self._free, slot)
