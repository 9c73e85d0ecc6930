"""A virtual machine's fd: memory slots, interrupt controllers, routing, capabilities, clock.

One method per ioctl, nothing clever. Owner: the main thread, which sets the VM
up and closes it; KVM itself locks what the methods touch, so `irq_line`,
`signal_msi`, `set_user_memory_region` and the fd registrations may be called
from any thread. Interrupt routes are changed by `GsiTable` alone.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence
from threading import Lock

from hvkvm.abi import kvm_requests as rq
from hvkvm.abi.kvm import (
    KVM_CAP_NR_MEMSLOTS,
    KVM_HYPERV_EVENTFD_DEASSIGN,
    KVM_MSR_FILTER_DEFAULT_ALLOW,
    KVM_MSR_FILTER_DEFAULT_DENY,
    KVM_MSR_FILTER_MAX_BITMAP_SIZE,
    KVM_MSR_FILTER_MAX_RANGES,
)
from hvkvm.abi.kvm_structs import (
    kvm_clock_data,
    kvm_coalesced_mmio_zone,
    kvm_enable_cap,
    kvm_hyperv_eventfd,
    kvm_ioeventfd,
    kvm_irq_level,
    kvm_irq_routing_entry,
    kvm_irq_routing_of,
    kvm_irqchip,
    kvm_irqfd,
    kvm_msi,
    kvm_msr_filter,
    kvm_pit_config,
    kvm_pit_state2,
    kvm_userspace_memory_region,
)
from hvkvm.kvm import ioctl as door
from hvkvm.kvm.handle import Handle
from hvkvm.kvm.vcpu import Vcpu
from hvkvm.tuples import NamedTuple

_OLD_MEMORY_SLOTS = 32  # what KVM had before it could be asked
_ENABLE_CAP = rq.KVM_ENABLE_CAP._replace(scope="vm")
_CHECK_EXTENSION = rq.KVM_CHECK_EXTENSION._replace(scope="vm")


class MsrRange(NamedTuple):
    """One range of an MSR filter: `flags` says which accesses (KVM_MSR_FILTER_READ|WRITE) the bitmap decides.

    Bit i of `bitmap` set lets MSR base+i through to KVM; clear denies it. An
    empty bitmap denies the whole range.
    """

    base: int
    nmsrs: int
    flags: int
    bitmap: bytes = b""


class Vm(Handle):
    """One VM, of the process that made it: KVM answers no other. Closing it closes its vCPUs first."""

    __slots__ = ("_pid", "coalesced_lock", "vcpu_mmap_size", "vcpus")

    def __init__(self, fd: int, vcpu_mmap_size: int) -> None:
        super().__init__(fd)
        self._pid = os.getpid()
        self.vcpu_mmap_size = vcpu_mmap_size
        self.vcpus: list[Vcpu] = []
        # The coalesced ring is the VM's, seen through every vCPU's map: see `kvm.coalesced`.
        self.coalesced_lock = Lock()

    @property
    def closed(self) -> bool:
        """Whether there is nothing more to undo in it: closed, or a forked child's copy."""
        return self.fd < 0 or os.getpid() != self._pid

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION on this VM, which may differ from the system's answer."""
        return door.ioctl(self.fd, _CHECK_EXTENSION, cap)

    def enable_cap(self, cap: int, *args: int) -> None:
        """KVM_ENABLE_CAP with up to four arguments. Raises KvmIoctlError."""
        door.ioctl(self.fd, _ENABLE_CAP, kvm_enable_cap(cap=cap, args=args), f"capability {cap}")

    # Memory.

    @property
    def memory_slots(self) -> int:
        """How many memory slots KVM has for a VM."""
        return self.check_extension(KVM_CAP_NR_MEMSLOTS) or _OLD_MEMORY_SLOTS

    def set_user_memory_region(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        """Map `size` bytes of host memory at `hva` to guest physical `gpa`; size 0 deletes the slot.

        All in bytes and multiples of 4096. Raises KvmIoctlError (EEXIST overlap,
        EINVAL alignment or a change KVM does not allow).
        """
        region = kvm_userspace_memory_region(slot, flags, gpa, size, hva)
        door.ioctl(self.fd, rq.KVM_SET_USER_MEMORY_REGION, region, f"slot {slot} at {gpa:#x}+{size:#x}")

    def set_tss_addr(self, gpa: int) -> None:
        """Give VMX three pages below 4 GiB for real-mode emulation; harmless elsewhere."""
        door.ioctl(self.fd, rq.KVM_SET_TSS_ADDR, gpa)

    def set_identity_map_addr(self, gpa: int) -> None:
        """Give VMX one page for its identity map. Before the first vCPU."""
        door.ioctl(self.fd, rq.KVM_SET_IDENTITY_MAP_ADDR, ctypes.c_uint64(gpa))

    # vCPUs.

    def create_vcpu(self, index: int) -> Vcpu:
        """Create vCPU `index` (its APIC id). In order 0, 1, 2...: KVM's VP index is the order of creation.

        Raises KvmIoctlError; then no fd is left behind.
        """
        fd = door.ioctl(self.fd, rq.KVM_CREATE_VCPU, index, f"vCPU {index}")
        vcpu = Vcpu(fd, index, self.vcpu_mmap_size, self.check_extension)
        self.vcpus.append(vcpu)
        return vcpu

    # Interrupts.

    def create_irqchip(self) -> None:
        """In-kernel PIC, IOAPIC and LAPICs with KVM's default routes. Before the first vCPU."""
        door.ioctl(self.fd, rq.KVM_CREATE_IRQCHIP)

    def create_pit2(self, flags: int = 0) -> None:
        """In-kernel i8254; needs the full irqchip."""
        door.ioctl(self.fd, rq.KVM_CREATE_PIT2, kvm_pit_config(flags=flags))

    def irq_line(self, gsi: int, level: int) -> None:
        """Set the level of a GSI's line. ENXIO without an irqchip."""
        door.ioctl(self.fd, rq.KVM_IRQ_LINE, kvm_irq_level(gsi, level), f"GSI {gsi}")

    def signal_msi(self, address: int, data: int) -> int:
        """Deliver one MSI now: >0 delivered, 0 not accepted (no such APIC, or its LAPIC is off)."""
        return door.ioctl(self.fd, rq.KVM_SIGNAL_MSI, kvm_msi(address & 0xFFFFFFFF, address >> 32, data))

    def set_gsi_routing(self, entries: Sequence[kvm_irq_routing_entry]) -> None:
        """Replace the whole routing table: for `GsiTable` only. If it raises, the old one stays."""
        table = kvm_irq_routing_of(len(entries))(nr=len(entries))
        for i, entry in enumerate(entries):
            table.entries[i] = entry
        door.ioctl(self.fd, rq.KVM_SET_GSI_ROUTING, table, f"{len(entries)} routes")

    def irqfd(self, fd: int, gsi: int, flags: int = 0, resamplefd: int = 0) -> None:
        """Tie or untie an eventfd and a GSI (KVM_IRQFD_FLAG_*): for `Irqfd`, which keeps the order right."""
        door.ioctl(self.fd, rq.KVM_IRQFD, kvm_irqfd(fd, gsi, flags, resamplefd), f"GSI {gsi}")

    def ioeventfd(self, address: int, size: int, fd: int, flags: int, datamatch: int = 0) -> None:
        """Tie or untie an eventfd and a write (KVM_IOEVENTFD_FLAG_*): for `IoEventFd`."""
        argument = kvm_ioeventfd(datamatch=datamatch, addr=address, len=size, fd=fd, flags=flags)
        door.ioctl(self.fd, rq.KVM_IOEVENTFD, argument, f"address {address:#x}")

    def coalesced_zone(self, address: int, size: int, *, pio: bool, register: bool) -> None:
        """Add or remove a zone whose writes queue up in the coalesced ring: for `CoalescedPio`."""
        request = rq.KVM_REGISTER_COALESCED_MMIO if register else rq.KVM_UNREGISTER_COALESCED_MMIO
        door.ioctl(
            self.fd, request, kvm_coalesced_mmio_zone(address, size, int(pio)), f"address {address:#x}"
        )

    def hyperv_eventfd(self, conn_id: int, fd: int, deassign: bool = False) -> None:
        """Have KVM answer HvSignalEvent on `conn_id` (24 bits) by signalling `fd`, with no exit (S41, S43).

        KVM keeps its own reference to the eventfd: deassign before closing it.
        Raises KvmIoctlError: EEXIST, ENOENT, EINVAL, EBADF; ENOTTY without
        CONFIG_KVM_HYPERV.
        """
        flags = KVM_HYPERV_EVENTFD_DEASSIGN if deassign else 0
        argument = kvm_hyperv_eventfd(conn_id, fd, flags)
        door.ioctl(self.fd, rq.KVM_HYPERV_EVENTFD, argument, f"connection {conn_id:#x}")

    # MSR filter.

    def set_msr_filter(self, ranges: Iterable[MsrRange], default_deny: bool = False) -> None:
        """Replace the filter of guest RDMSR/WRMSR; denied ones exit if KVM_CAP_X86_USER_SPACE_MSR says so.

        KVM copies the bitmaps. Raises ValueError for a range KVM has no place
        for, KvmIoctlError for the rest. x2APIC MSRs cannot be filtered.
        """
        flags = KVM_MSR_FILTER_DEFAULT_DENY if default_deny else KVM_MSR_FILTER_DEFAULT_ALLOW
        argument = kvm_msr_filter(flags=flags)
        keep = []  # the bitmaps must live until the ioctl returns
        for i, item in enumerate(ranges):
            size = -(-item.nmsrs // 64) * 8  # KVM reads whole longs
            if i >= KVM_MSR_FILTER_MAX_RANGES or not 0 < size <= KVM_MSR_FILTER_MAX_BITMAP_SIZE:
                raise ValueError(f"MSR filter range {i} ({item.base:#x}+{item.nmsrs}) is more than KVM takes")
            bitmap = (ctypes.c_uint8 * size).from_buffer_copy(item.bitmap[:size].ljust(size, b"\0"))
            keep.append(bitmap)
            slot = argument.ranges[i]
            slot.flags, slot.nmsrs, slot.base = item.flags, item.nmsrs, item.base
            slot.bitmap = ctypes.cast(bitmap, ctypes.POINTER(ctypes.c_uint8))
        door.ioctl(self.fd, rq.KVM_X86_SET_MSR_FILTER, argument)
        del keep

    # State for save, restore and reset.

    def get_clock(self) -> kvm_clock_data:
        """kvmclock, in nanoseconds."""
        clock = kvm_clock_data()
        door.ioctl(self.fd, rq.KVM_GET_CLOCK, clock)
        return clock

    def set_clock(self, clock: kvm_clock_data) -> None:
        """Set kvmclock; of `flags` only KVM_CLOCK_REALTIME is accepted."""
        door.ioctl(self.fd, rq.KVM_SET_CLOCK, clock)

    def get_irqchip(self, chip_id: int) -> kvm_irqchip:
        """State of one chip of the full irqchip (KVM_IRQCHIP_PIC_MASTER, _PIC_SLAVE, _IOAPIC)."""
        chip = kvm_irqchip(chip_id=chip_id)
        door.ioctl(self.fd, rq.KVM_GET_IRQCHIP, chip)
        return chip

    def set_irqchip(self, chip: kvm_irqchip) -> None:
        """Put back what `get_irqchip` gave."""
        door.ioctl(self.fd, rq.KVM_SET_IRQCHIP, chip)

    def get_pit2(self) -> kvm_pit_state2:
        """State of the in-kernel i8254."""
        state = kvm_pit_state2()
        door.ioctl(self.fd, rq.KVM_GET_PIT2, state)
        return state

    def set_pit2(self, state: kvm_pit_state2) -> None:
        """Put back what `get_pit2` gave."""
        door.ioctl(self.fd, rq.KVM_SET_PIT2, state)

    def close(self) -> None:
        """Close every vCPU, then the VM; again does nothing."""
        while self.vcpus:
            self.vcpus.pop().close()
        super().close()
