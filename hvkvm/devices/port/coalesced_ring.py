"""The coalesced ring read in bulk: all bytes queued for one port at the price of one.

A ring full of console output is the common case. `kvm.doorbell.drain_coalesced`
makes an object of each write; here strided views take a hundred bytes by three
slices. One reader at a time: its owner's lock, on any thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvkvm.abi.kvm import KVM_CAP_COALESCED_MMIO

if TYPE_CHECKING:
    from hvkvm.kvm.vcpu import Vcpu

_PAGE = 4096
_HEADER = 8  # kvm_coalesced_mmio_ring: u32 first, last
_SLOT = 24  # kvm_coalesced_mmio: u64 phys_addr, u32 len, u32 pio, u8 data[8]
_SLOT_WORDS = _SLOT // 8
_DATA = 16
_SLOTS = (_PAGE - _HEADER) // _SLOT
_ONE_PORT_BYTE = 1 << 32 | 1  # pio 1, len 1


class CoalescedRing:
    """The ring of `vcpu`'s VM, seen through that vCPU's map."""

    def __init__(self, vcpu: Vcpu) -> None:
        self._lock = vcpu.vm.coalesced_lock
        start = vcpu.vm.check_extension(KVM_CAP_COALESCED_MMIO) * _PAGE
        self._page = vcpu.data[start : start + _PAGE]
        self._ends = self._page[:_HEADER].cast("I")
        self._words = self._page.cast("Q")

    @property
    def empty(self) -> bool:
        """Whether nothing is queued. Any thread."""
        ends = self._ends
        return ends[0] == ends[1]

    @property
    def last(self) -> int:
        """The slot KVM fills next: changes with every write queued."""
        return self._ends[1]

    def take_bytes(self, port: int) -> bytes | None:
        """Take everything if it is single bytes written to `port`; else None, and it all stays."""
        ends = self._ends
        with self._lock:
            first, last = ends[0] % _SLOTS, ends[1] % _SLOTS
            if first == last:
                return b""
            if first < last:
                taken = self._slots(first, last, port)
            else:
                older, newer = self._slots(first, _SLOTS, port), self._slots(0, last, port)
                taken = None if older is None or newer is None else older + newer
            if taken is not None:
                ends[0] = last  # one store, after the copy: KVM may use the slots again from here on
            return taken

    def _slots(self, start: int, stop: int, port: int) -> bytes | None:
        count = stop - start
        first, end = _HEADER // 8 + start * _SLOT_WORDS, _HEADER // 8 + stop * _SLOT_WORDS
        if self._words[first:end:_SLOT_WORDS].tolist().count(port) != count:
            return None
        if self._words[first + 1 : end : _SLOT_WORDS].tolist().count(_ONE_PORT_BYTE) != count:
            return None
        return self._page[_HEADER + start * _SLOT + _DATA : _HEADER + stop * _SLOT : _SLOT].tobytes()
