"""KVM's structures as ctypes, with the names of <linux/kvm.h> and <asm/kvm.h> (x86-64).

Layout only; anyone may import this from any thread. A struct nested in another
takes its C path with `__` for each dot (`kvm_run__io` is `kvm_run.io`), so that
`kvm_headers/probe.py` can ask the C compiler about exactly the same thing. Names
that start with an underscore have no name in C.

Structures that end in a flexible array are declared with an array of length 0;
`kvm_msrs_of(n)` and its kin build the sized version, once for each n. Sizes are
cached without bound on purpose: callers pass lengths of host tables, never a
number a guest chose.

The vCPU's own structures live in `kvm_cpu_structs` and `kvm_run_struct`; this
module passes them on, so one import line serves all.
"""

from __future__ import annotations

from ctypes import (
    POINTER,
    Structure,
    Union,
    c_int32,
    c_int64,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
)
from functools import cache
from typing import Any

from hvkvm.abi.kvm import KVM_IOAPIC_NUM_PINS, KVM_MSR_FILTER_MAX_RANGES
from hvkvm.abi.kvm_cpu_structs import kvm_cpuid2 as kvm_cpuid2
from hvkvm.abi.kvm_cpu_structs import kvm_cpuid_entry2 as kvm_cpuid_entry2
from hvkvm.abi.kvm_cpu_structs import kvm_debug_exit_arch as kvm_debug_exit_arch
from hvkvm.abi.kvm_cpu_structs import kvm_debugregs as kvm_debugregs
from hvkvm.abi.kvm_cpu_structs import kvm_dtable as kvm_dtable
from hvkvm.abi.kvm_cpu_structs import kvm_fpu as kvm_fpu
from hvkvm.abi.kvm_cpu_structs import kvm_guest_debug as kvm_guest_debug
from hvkvm.abi.kvm_cpu_structs import kvm_guest_debug_arch as kvm_guest_debug_arch
from hvkvm.abi.kvm_cpu_structs import kvm_interrupt as kvm_interrupt
from hvkvm.abi.kvm_cpu_structs import kvm_lapic_state as kvm_lapic_state
from hvkvm.abi.kvm_cpu_structs import kvm_mp_state as kvm_mp_state
from hvkvm.abi.kvm_cpu_structs import kvm_msr_entry as kvm_msr_entry
from hvkvm.abi.kvm_cpu_structs import kvm_msr_list as kvm_msr_list
from hvkvm.abi.kvm_cpu_structs import kvm_msrs as kvm_msrs
from hvkvm.abi.kvm_cpu_structs import kvm_nested_state as kvm_nested_state
from hvkvm.abi.kvm_cpu_structs import kvm_regs as kvm_regs
from hvkvm.abi.kvm_cpu_structs import kvm_run__s as kvm_run__s
from hvkvm.abi.kvm_cpu_structs import kvm_segment as kvm_segment
from hvkvm.abi.kvm_cpu_structs import kvm_sregs as kvm_sregs
from hvkvm.abi.kvm_cpu_structs import kvm_sync_regs as kvm_sync_regs
from hvkvm.abi.kvm_cpu_structs import kvm_translation as kvm_translation
from hvkvm.abi.kvm_cpu_structs import kvm_vcpu_events as kvm_vcpu_events
from hvkvm.abi.kvm_cpu_structs import kvm_xcr as kvm_xcr
from hvkvm.abi.kvm_cpu_structs import kvm_xcrs as kvm_xcrs
from hvkvm.abi.kvm_cpu_structs import kvm_xsave as kvm_xsave
from hvkvm.abi.kvm_run_struct import kvm_hyperv_exit as kvm_hyperv_exit
from hvkvm.abi.kvm_run_struct import kvm_run as kvm_run


class kvm_enable_cap(Structure):
    _fields_ = [
        ("cap", c_uint32),
        ("flags", c_uint32),
        ("args", c_uint64 * 4),
        ("pad", c_uint8 * 64),
    ]


class kvm_userspace_memory_region(Structure):
    _fields_ = [
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    ]


class kvm_dirty_log(Structure):
    """`dirty_bitmap` is a host address (a pointer in C), one bit a page."""

    _fields_ = [("slot", c_uint32), ("padding1", c_uint32), ("dirty_bitmap", c_uint64)]


class kvm_clear_dirty_log(Structure):
    _fields_ = [
        ("slot", c_uint32),
        ("num_pages", c_uint32),
        ("first_page", c_uint64),
        ("dirty_bitmap", c_uint64),
    ]


class kvm_irq_level(Structure):
    """KVM_IRQ_LINE_STATUS answers in `irq` (called `status` then)."""

    _fields_ = [("irq", c_uint32), ("level", c_uint32)]


class kvm_pic_state(Structure):
    _fields_ = [
        ("last_irr", c_uint8),
        ("irr", c_uint8),
        ("imr", c_uint8),
        ("isr", c_uint8),
        ("priority_add", c_uint8),
        ("irq_base", c_uint8),
        ("read_reg_select", c_uint8),
        ("poll", c_uint8),
        ("special_mask", c_uint8),
        ("init_state", c_uint8),
        ("auto_eoi", c_uint8),
        ("rotate_on_auto_eoi", c_uint8),
        ("special_fully_nested_mode", c_uint8),
        ("init4", c_uint8),
        ("elcr", c_uint8),
        ("elcr_mask", c_uint8),
    ]


class kvm_ioapic_state(Structure):
    """`redirtbl` holds the 64-bit redirection entries as they are (the union's `bits`)."""

    _fields_ = [
        ("base_address", c_uint64),
        ("ioregsel", c_uint32),
        ("id", c_uint32),
        ("irr", c_uint32),
        ("pad", c_uint32),
        ("redirtbl", c_uint64 * KVM_IOAPIC_NUM_PINS),
    ]


class kvm_irqchip__chip(Union):
    _fields_ = [("dummy", c_uint8 * 512), ("pic", kvm_pic_state), ("ioapic", kvm_ioapic_state)]


class kvm_irqchip(Structure):
    _fields_ = [("chip_id", c_uint32), ("pad", c_uint32), ("chip", kvm_irqchip__chip)]


class kvm_pit_config(Structure):
    _fields_ = [("flags", c_uint32), ("pad", c_uint32 * 15)]


class kvm_pit_channel_state(Structure):
    _fields_ = [
        ("count", c_uint32),
        ("latched_count", c_uint16),
        ("count_latched", c_uint8),
        ("status_latched", c_uint8),
        ("status", c_uint8),
        ("read_state", c_uint8),
        ("write_state", c_uint8),
        ("write_latch", c_uint8),
        ("rw_mode", c_uint8),
        ("mode", c_uint8),
        ("bcd", c_uint8),
        ("gate", c_uint8),
        ("count_load_time", c_int64),
    ]


class kvm_pit_state2(Structure):
    _fields_ = [
        ("channels", kvm_pit_channel_state * 3),
        ("flags", c_uint32),
        ("reserved", c_uint32 * 9),
    ]


class kvm_clock_data(Structure):
    """`clock`, `realtime` in nanoseconds; the last two are valid if `flags` says so."""

    _fields_ = [
        ("clock", c_uint64),
        ("flags", c_uint32),
        ("pad0", c_uint32),
        ("realtime", c_uint64),
        ("host_tsc", c_uint64),
        ("pad", c_uint32 * 4),
    ]


class kvm_irq_routing_irqchip(Structure):
    _fields_ = [("irqchip", c_uint32), ("pin", c_uint32)]


class kvm_irq_routing_msi(Structure):
    _fields_ = [
        ("address_lo", c_uint32),
        ("address_hi", c_uint32),
        ("data", c_uint32),
        ("devid", c_uint32),
    ]


class kvm_irq_routing_hv_sint(Structure):
    """`vcpu` is the VP index."""

    _fields_ = [("vcpu", c_uint32), ("sint", c_uint32)]


class kvm_irq_routing_entry__u(Union):
    _fields_ = [
        ("irqchip", kvm_irq_routing_irqchip),
        ("msi", kvm_irq_routing_msi),
        ("hv_sint", kvm_irq_routing_hv_sint),
        ("pad", c_uint32 * 8),
    ]


class kvm_irq_routing_entry(Structure):
    _fields_ = [
        ("gsi", c_uint32),
        ("type", c_uint32),
        ("flags", c_uint32),
        ("pad", c_uint32),
        ("u", kvm_irq_routing_entry__u),
    ]


class kvm_irq_routing(Structure):
    _fields_ = [("nr", c_uint32), ("flags", c_uint32), ("entries", kvm_irq_routing_entry * 0)]


class kvm_irqfd(Structure):
    _fields_ = [
        ("fd", c_uint32),
        ("gsi", c_uint32),
        ("flags", c_uint32),
        ("resamplefd", c_uint32),
        ("pad", c_uint8 * 16),
    ]


class kvm_ioeventfd(Structure):
    _fields_ = [
        ("datamatch", c_uint64),
        ("addr", c_uint64),
        ("len", c_uint32),
        ("fd", c_int32),
        ("flags", c_uint32),
        ("pad", c_uint8 * 36),
    ]


class kvm_msi(Structure):
    _fields_ = [
        ("address_lo", c_uint32),
        ("address_hi", c_uint32),
        ("data", c_uint32),
        ("flags", c_uint32),
        ("devid", c_uint32),
        ("pad", c_uint8 * 12),
    ]


class kvm_hyperv_eventfd(Structure):
    _fields_ = [
        ("conn_id", c_uint32),
        ("fd", c_int32),
        ("flags", c_uint32),
        ("padding", c_uint32 * 3),
    ]


class kvm_msr_filter_range(Structure):
    """`bitmap` points at host memory; a clear bit denies the accesses in `flags`."""

    _fields_ = [
        ("flags", c_uint32),
        ("nmsrs", c_uint32),
        ("base", c_uint32),
        ("bitmap", POINTER(c_uint8)),
    ]


class kvm_msr_filter(Structure):
    _fields_ = [("flags", c_uint32), ("ranges", kvm_msr_filter_range * KVM_MSR_FILTER_MAX_RANGES)]


class kvm_coalesced_mmio_zone(Structure):
    _fields_ = [("addr", c_uint64), ("size", c_uint32), ("pio", c_uint32)]


class kvm_coalesced_mmio(Structure):
    _fields_ = [
        ("phys_addr", c_uint64),
        ("len", c_uint32),
        ("pio", c_uint32),
        ("data", c_uint8 * 8),
    ]


class kvm_coalesced_mmio_ring(Structure):
    _fields_ = [("first", c_uint32), ("last", c_uint32), ("coalesced_mmio", kvm_coalesced_mmio * 0)]


def _sized(base: type[Structure], element: type[Structure] | type[c_uint32], n: int) -> type[Any]:
    """A copy of `base` whose trailing array has n elements."""
    fields = list(base._fields_)
    fields[-1] = (fields[-1][0], element * n)
    return type(f"{base.__name__}_{n}", (Structure,), {"_fields_": fields})


@cache
def kvm_msrs_of(n: int) -> type[Any]:
    """struct kvm_msrs with room for n entries."""
    return _sized(kvm_msrs, kvm_msr_entry, n)


@cache
def kvm_msr_list_of(n: int) -> type[Any]:
    """struct kvm_msr_list with room for n indices."""
    return _sized(kvm_msr_list, c_uint32, n)


@cache
def kvm_cpuid2_of(n: int) -> type[Any]:
    """struct kvm_cpuid2 with room for n entries."""
    return _sized(kvm_cpuid2, kvm_cpuid_entry2, n)


@cache
def kvm_irq_routing_of(n: int) -> type[Any]:
    """struct kvm_irq_routing with room for n entries."""
    return _sized(kvm_irq_routing, kvm_irq_routing_entry, n)


@cache
def kvm_coalesced_mmio_ring_of(n: int) -> type[Any]:
    """struct kvm_coalesced_mmio_ring with n slots."""
    return _sized(kvm_coalesced_mmio_ring, kvm_coalesced_mmio, n)
