"""A guest's physical addresses, as KVM has them: memory slots, each a range backed by host memory.

RAM, overlay pages outside of it, and ROM meet here, and nowhere else: each asks for a range and gets
its slot's number. The numbers are few, so they are reused, lowest first.

`GuestMemory` makes the one address space of its VM. Any thread.
"""

from __future__ import annotations

import heapq
import threading
from typing import Protocol

from hvkvm.errors import HvkvmError
from hvkvm.tuples import NamedTuple


class NoSlotLeft(HvkvmError):
    """Every memory slot that KVM has for a VM is taken."""


class SlotOwner(Protocol):
    """What is needed of a VM: KVM_SET_USER_MEMORY_REGION, size 0 deletes; and how many slots there are."""

    @property
    def memory_slots(self) -> int: ...

    def set_user_memory_region(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None: ...


class _Range(NamedTuple):
    gpa: int
    hva: int
    size: int


class AddressSpace:
    """What is shown to the guest, by slot number."""

    def __init__(self, vm: SlotOwner) -> None:
        self._vm = vm
        self._lock = threading.Lock()
        self._limit = vm.memory_slots
        self._next = 0
        self._free: list[int] = []
        self._shown: dict[int, _Range] = {}

    def show(self, gpa: int, size: int, hva: int, flags: int = 0) -> int:
        """Back [gpa, gpa+size) with host memory; the slot's number. All multiples of 4096 bytes.

        NoSlotLeft; KvmIoctlError (EEXIST: overlaps another; EINVAL: no guest address): nothing stays then.
        """
        slot = self._take()
        try:
            self._vm.set_user_memory_region(slot, gpa, size, hva, flags)
        except BaseException:
            self._give_back(slot)
            raise
        self._shown[slot] = _Range(gpa, hva, size)
        return slot

    def hide(self, slot: int) -> None:
        """Undo a `show`: accesses exit as MMIO. ValueError if there is no such slot.

        KvmIoctlError, and then it is shown still.
        """
        shown = self._shown.get(slot)
        if shown is None:
            raise ValueError(f"memory slot {slot} is not taken")
        self._vm.set_user_memory_region(slot, shown.gpa, 0, shown.hva)
        del self._shown[slot]
        self._give_back(slot)

    def backs(self, gpa: int) -> bool:
        """Whether something is shown at `gpa`; an access exits as MMIO else."""
        return any(0 <= gpa - one.gpa < one.size for one in list(self._shown.values()))

    def _take(self) -> int:
        """The lowest free number."""
        with self._lock:
            if self._free:
                return heapq.heappop(self._free)
            if self._next == self._limit:
                raise NoSlotLeft(f"no KVM memory slot is left of {self._limit}")
            self._next += 1
            return self._next - 1

    def _give_back(self, slot: int) -> None:
        with self._lock:
            heapq.heappush(self._free, slot)
