"""The coalesced ring: port writes that KVM queues while the guest runs on, to be read at any later moment.

Right for chatty ports (consoles), wrong for doorbells, since nothing wakes the host. All zones of a
VM share one ring, seen through the map of each vCPU. A ring full of console output is the common
case: strided views take a hundred bytes by three slices, where an object for each write would cost
more than the exits that were spared.

Owner of a zone: the thread that made it. The ring is read on any thread, under the VM's lock.
"""

from __future__ import annotations

from ctypes import sizeof
from typing import TYPE_CHECKING

from hvkvm.abi.kvm import KVM_CAP_COALESCED_MMIO, KVM_CAP_COALESCED_PIO
from hvkvm.abi.kvm_structs import kvm_coalesced_mmio, kvm_coalesced_mmio_ring, kvm_coalesced_mmio_ring_of
from hvkvm.errors import CapabilityMissing
from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from types import TracebackType

    from hvkvm.kvm.vcpu import Vcpu
    from hvkvm.kvm.vm import Vm

_PAGE = 4096
_HEADER = kvm_coalesced_mmio_ring.coalesced_mmio.offset
_SLOT = sizeof(kvm_coalesced_mmio)
_SLOT_WORDS = _SLOT // 8
_DATA = kvm_coalesced_mmio.data.offset
_SLOTS = (_PAGE - _HEADER) // _SLOT
"""KVM_COALESCED_MMIO_MAX, which depends on PAGE_SIZE and so is not in the UAPI."""
_ONE_PORT_BYTE = 1 << 32 | 1  # pio 1, len 1: the second word of a slot


class CoalescedWrite(NamedTuple):
    """One queued guest write: `data` is 1 to 8 bytes, little-endian."""

    address: int
    pio: bool
    data: bytes


class CoalescedPio:
    """A zone of ports whose writes KVM queues. All zones of a VM share one ring of 170 slots.

    When the ring is full a write exits as usual, so nothing is lost or reordered
    as long as every exit drains first. Some kernels (6.1) call it full at 85.
    """

    __slots__ = ("_registered", "_vm", "port", "size")

    def __init__(self, vm: Vm, port: int, size: int) -> None:
        """Raises CapabilityMissing (before Linux 4.20), KvmIoctlError."""
        if not vm.check_extension(KVM_CAP_COALESCED_PIO):
            raise CapabilityMissing("KVM_CAP_COALESCED_PIO: this kernel's KVM cannot queue port writes")
        self._vm = vm
        self.port = port
        self.size = size
        vm.coalesced_zone(port, size, pio=True, register=True)
        self._registered = True

    def close(self) -> None:
        """Unregister the zone; what is queued stays queued. Again does nothing."""
        if self._registered and not self._vm.closed:
            self._vm.coalesced_zone(self.port, self.size, pio=True, register=False)
        self._registered = False

    def __enter__(self) -> CoalescedPio:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class CoalescedRing:
    """The ring of `vm`, seen through the map of `vcpu`, one of its own."""

    def __init__(self, vm: Vm, vcpu: Vcpu) -> None:
        self._lock = vm.coalesced_lock
        start = vm.check_extension(KVM_CAP_COALESCED_MMIO) * _PAGE
        self._ring = kvm_coalesced_mmio_ring_of(_SLOTS).from_buffer(vcpu.data, start)
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

    def take_writes(self) -> list[CoalescedWrite]:
        """Take every write, whichever zone it is in, oldest first.

        Of several threads that take at once each gets its share in order.
        """
        taken: list[CoalescedWrite] = []
        with self._lock:
            ring = self._ring
            first, last = ring.first % _SLOTS, ring.last % _SLOTS
            while first != last:
                entry = ring.coalesced_mmio[first]
                data = bytes(entry.data[: min(entry.len, 8)])
                taken.append(CoalescedWrite(entry.phys_addr, bool(entry.pio), data))
                first = (first + 1) % _SLOTS
            if taken:
                ring.first = first  # one store, after the copy: KVM may use the slots again from here on
        return taken

    def _slots(self, start: int, stop: int, port: int) -> bytes | None:
        count = stop - start
        first, end = _HEADER // 8 + start * _SLOT_WORDS, _HEADER // 8 + stop * _SLOT_WORDS
        if self._words[first:end:_SLOT_WORDS].tolist().count(port) != count:
            return None
        if self._words[first + 1 : end : _SLOT_WORDS].tolist().count(_ONE_PORT_BYTE) != count:
            return None
        return self._page[_HEADER + start * _SLOT + _DATA : _HEADER + stop * _SLOT : _SLOT].tobytes()
