"""Guest writes that cost no trip through Python: ioeventfds and the coalesced ring.

`IoEventFd`: a matching write signals an eventfd and the guest runs on.
`CoalescedPio`: writes to the port queue up in a ring that KVM fills, to be read
at the next exit of any kind; right for chatty ports (debug consoles), wrong for
doorbells, since nothing wakes the host.

Owner: the thread that opened them, except `drain`, which every vCPU thread calls
before it handles an exit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from hvkvm.abi.kvm import (
    KVM_CAP_COALESCED_MMIO,
    KVM_CAP_COALESCED_PIO,
    KVM_IOEVENTFD_FLAG_DATAMATCH,
    KVM_IOEVENTFD_FLAG_DEASSIGN,
    KVM_IOEVENTFD_FLAG_PIO,
)
from hvkvm.abi.kvm_structs import kvm_coalesced_mmio_ring_of
from hvkvm.errors import CapabilityMissing
from hvkvm.kvm.irqfd import EventFd

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from hvkvm.kvm.vcpu import Vcpu
    from hvkvm.kvm.vm import Vm

_PAGE = 4096
_RING_SLOTS = (
    _PAGE - 8
) // 24  # KVM_COALESCED_MMIO_MAX, which depends on PAGE_SIZE and so is not in the UAPI


class IoEventFd:
    """A write of `size` bytes (0: any size) at `address` signals `eventfd`; with `datamatch` only that value.

    Needs no irqchip. `pio` takes a port instead of a guest physical address.
    """

    __slots__ = ("_argument", "_assigned", "_vm", "eventfd")

    def __init__(
        self, vm: Vm, address: int, size: int, datamatch: int | None = None, pio: bool = False
    ) -> None:
        """Raises KvmIoctlError (EEXIST: taken; EINVAL: a size KVM has no match for); no fd is left behind."""
        flags = KVM_IOEVENTFD_FLAG_PIO if pio else 0
        if datamatch is not None:
            flags |= KVM_IOEVENTFD_FLAG_DATAMATCH
        self._vm = vm
        self._argument = (address, size, flags, datamatch or 0)
        self._assigned = False
        self.eventfd = EventFd()
        try:
            vm.ioeventfd(address, size, self.eventfd.fd, flags, datamatch or 0)
            self._assigned = True
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Deassign, then close the eventfd; again does nothing. Stop watching the eventfd first."""
        try:
            if self._assigned and not self._vm.closed:
                address, size, flags, datamatch = self._argument
                self._vm.ioeventfd(
                    address, size, self.eventfd.fd, flags | KVM_IOEVENTFD_FLAG_DEASSIGN, datamatch
                )
        finally:
            self._assigned = False
            self.eventfd.close()

    def __enter__(self) -> IoEventFd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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
        vm.coalesced_offset = vm.check_extension(KVM_CAP_COALESCED_MMIO) * _PAGE
        self._registered = True

    def drain(self, vcpu: Vcpu) -> Iterator[CoalescedWrite]:
        """Take what is queued, for every zone of the VM, oldest first: see `drain_coalesced`."""
        return drain_coalesced(vcpu)

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


def drain_coalesced(vcpu: Vcpu) -> Iterator[CoalescedWrite]:
    """Take the queued writes of the whole VM, oldest first, through this vCPU's map.

    Any vCPU's thread; the VM's lock keeps two of them from taking the same
    write. Of several threads draining at once each gets its share in order.
    """
    vm = vcpu.vm
    if not vm.coalesced_offset:  # no zone was ever made
        return iter(())
    taken: list[CoalescedWrite] = []
    with vm.coalesced_lock:
        ring = kvm_coalesced_mmio_ring_of(_RING_SLOTS).from_buffer(vcpu.data, vm.coalesced_offset)
        first, last = ring.first % _RING_SLOTS, ring.last % _RING_SLOTS
        while first != last:
            entry = ring.coalesced_mmio[first]
            data = bytes(entry.data[: min(entry.len, 8)])
            taken.append(CoalescedWrite(entry.phys_addr, bool(entry.pio), data))
            first = (first + 1) % _RING_SLOTS
        if taken:
            ring.first = first  # one 4-byte store, after the slots were copied: KVM may reuse them now
    return iter(taken)
