"""KVM's ioctl requests: C name, number, and the kind of fd that takes them.

Numbers are derived from the structures the way <asm/ioctl.h> derives them, and
`tests/abi` compares each with what the C compiler says. To add one: its struct
in `kvm_structs`, one line here, one method on the handle that owns the fd.
"""

from __future__ import annotations

from ctypes import c_uint64, sizeof
from typing import Any

from hvkvm.abi import kvm_structs as s
from hvkvm.tuples import NamedTuple

KVMIO = 0xAE


class Request(NamedTuple):
    """One ioctl: `scope` ("system", "vm", "vcpu", "device") only serves error texts."""

    name: str
    number: int
    scope: str


REQUESTS: dict[str, Request] = {}

_NONE, _WRITE, _READ = 0, 1, 2  # from the caller's side, as in <asm-generic/ioctl.h>


def _request(
    name: str, scope: str, nr: int, direction: int = _NONE, argument: type[Any] | None = None
) -> Request:
    size = 0 if argument is None else sizeof(argument)
    made = Request(name, direction << 30 | size << 16 | KVMIO << 8 | nr, scope)
    REQUESTS[name] = made
    return made


KVM_GET_API_VERSION = _request("KVM_GET_API_VERSION", "system", 0x00)
KVM_CREATE_VM = _request("KVM_CREATE_VM", "system", 0x01)
KVM_GET_MSR_INDEX_LIST = _request("KVM_GET_MSR_INDEX_LIST", "system", 0x02, _READ | _WRITE, s.kvm_msr_list)
KVM_CHECK_EXTENSION = _request("KVM_CHECK_EXTENSION", "system", 0x03)
KVM_GET_VCPU_MMAP_SIZE = _request("KVM_GET_VCPU_MMAP_SIZE", "system", 0x04)
KVM_GET_SUPPORTED_CPUID = _request("KVM_GET_SUPPORTED_CPUID", "system", 0x05, _READ | _WRITE, s.kvm_cpuid2)
KVM_GET_SUPPORTED_HV_CPUID = _request(
    "KVM_GET_SUPPORTED_HV_CPUID", "system", 0xC1, _READ | _WRITE, s.kvm_cpuid2
)

KVM_CREATE_VCPU = _request("KVM_CREATE_VCPU", "vm", 0x41)
KVM_GET_DIRTY_LOG = _request("KVM_GET_DIRTY_LOG", "vm", 0x42, _WRITE, s.kvm_dirty_log)
KVM_SET_USER_MEMORY_REGION = _request(
    "KVM_SET_USER_MEMORY_REGION", "vm", 0x46, _WRITE, s.kvm_userspace_memory_region
)
KVM_SET_TSS_ADDR = _request("KVM_SET_TSS_ADDR", "vm", 0x47)
KVM_SET_IDENTITY_MAP_ADDR = _request("KVM_SET_IDENTITY_MAP_ADDR", "vm", 0x48, _WRITE, c_uint64)
KVM_CREATE_IRQCHIP = _request("KVM_CREATE_IRQCHIP", "vm", 0x60)
KVM_IRQ_LINE = _request("KVM_IRQ_LINE", "vm", 0x61, _WRITE, s.kvm_irq_level)
KVM_GET_IRQCHIP = _request("KVM_GET_IRQCHIP", "vm", 0x62, _READ | _WRITE, s.kvm_irqchip)
KVM_SET_IRQCHIP = _request("KVM_SET_IRQCHIP", "vm", 0x63, _READ, s.kvm_irqchip)
KVM_REGISTER_COALESCED_MMIO = _request(
    "KVM_REGISTER_COALESCED_MMIO", "vm", 0x67, _WRITE, s.kvm_coalesced_mmio_zone
)
KVM_UNREGISTER_COALESCED_MMIO = _request(
    "KVM_UNREGISTER_COALESCED_MMIO", "vm", 0x68, _WRITE, s.kvm_coalesced_mmio_zone
)
KVM_SET_GSI_ROUTING = _request("KVM_SET_GSI_ROUTING", "vm", 0x6A, _WRITE, s.kvm_irq_routing)
KVM_IRQFD = _request("KVM_IRQFD", "vm", 0x76, _WRITE, s.kvm_irqfd)
KVM_CREATE_PIT2 = _request("KVM_CREATE_PIT2", "vm", 0x77, _WRITE, s.kvm_pit_config)
KVM_SET_BOOT_CPU_ID = _request("KVM_SET_BOOT_CPU_ID", "vm", 0x78)
KVM_IOEVENTFD = _request("KVM_IOEVENTFD", "vm", 0x79, _WRITE, s.kvm_ioeventfd)
KVM_SET_CLOCK = _request("KVM_SET_CLOCK", "vm", 0x7B, _WRITE, s.kvm_clock_data)
KVM_GET_CLOCK = _request("KVM_GET_CLOCK", "vm", 0x7C, _READ, s.kvm_clock_data)
KVM_GET_PIT2 = _request("KVM_GET_PIT2", "vm", 0x9F, _READ, s.kvm_pit_state2)
KVM_SET_PIT2 = _request("KVM_SET_PIT2", "vm", 0xA0, _WRITE, s.kvm_pit_state2)
KVM_SIGNAL_MSI = _request("KVM_SIGNAL_MSI", "vm", 0xA5, _WRITE, s.kvm_msi)
KVM_HYPERV_EVENTFD = _request("KVM_HYPERV_EVENTFD", "vm", 0xBD, _WRITE, s.kvm_hyperv_eventfd)
KVM_CLEAR_DIRTY_LOG = _request("KVM_CLEAR_DIRTY_LOG", "vm", 0xC0, _READ | _WRITE, s.kvm_clear_dirty_log)
KVM_X86_SET_MSR_FILTER = _request("KVM_X86_SET_MSR_FILTER", "vm", 0xC6, _WRITE, s.kvm_msr_filter)

KVM_RUN = _request("KVM_RUN", "vcpu", 0x80)
KVM_GET_REGS = _request("KVM_GET_REGS", "vcpu", 0x81, _READ, s.kvm_regs)
KVM_SET_REGS = _request("KVM_SET_REGS", "vcpu", 0x82, _WRITE, s.kvm_regs)
KVM_GET_SREGS = _request("KVM_GET_SREGS", "vcpu", 0x83, _READ, s.kvm_sregs)
KVM_SET_SREGS = _request("KVM_SET_SREGS", "vcpu", 0x84, _WRITE, s.kvm_sregs)
KVM_TRANSLATE = _request("KVM_TRANSLATE", "vcpu", 0x85, _READ | _WRITE, s.kvm_translation)
KVM_INTERRUPT = _request("KVM_INTERRUPT", "vcpu", 0x86, _WRITE, s.kvm_interrupt)
KVM_GET_MSRS = _request("KVM_GET_MSRS", "vcpu", 0x88, _READ | _WRITE, s.kvm_msrs)
KVM_SET_MSRS = _request("KVM_SET_MSRS", "vcpu", 0x89, _WRITE, s.kvm_msrs)
KVM_GET_FPU = _request("KVM_GET_FPU", "vcpu", 0x8C, _READ, s.kvm_fpu)
KVM_SET_FPU = _request("KVM_SET_FPU", "vcpu", 0x8D, _WRITE, s.kvm_fpu)
KVM_GET_LAPIC = _request("KVM_GET_LAPIC", "vcpu", 0x8E, _READ, s.kvm_lapic_state)
KVM_SET_LAPIC = _request("KVM_SET_LAPIC", "vcpu", 0x8F, _WRITE, s.kvm_lapic_state)
KVM_SET_CPUID2 = _request("KVM_SET_CPUID2", "vcpu", 0x90, _WRITE, s.kvm_cpuid2)
KVM_GET_CPUID2 = _request("KVM_GET_CPUID2", "vcpu", 0x91, _READ | _WRITE, s.kvm_cpuid2)
KVM_GET_MP_STATE = _request("KVM_GET_MP_STATE", "vcpu", 0x98, _READ, s.kvm_mp_state)
KVM_SET_MP_STATE = _request("KVM_SET_MP_STATE", "vcpu", 0x99, _WRITE, s.kvm_mp_state)
KVM_NMI = _request("KVM_NMI", "vcpu", 0x9A)
KVM_SET_GUEST_DEBUG = _request("KVM_SET_GUEST_DEBUG", "vcpu", 0x9B, _WRITE, s.kvm_guest_debug)
KVM_GET_VCPU_EVENTS = _request("KVM_GET_VCPU_EVENTS", "vcpu", 0x9F, _READ, s.kvm_vcpu_events)
KVM_SET_VCPU_EVENTS = _request("KVM_SET_VCPU_EVENTS", "vcpu", 0xA0, _WRITE, s.kvm_vcpu_events)
KVM_GET_DEBUGREGS = _request("KVM_GET_DEBUGREGS", "vcpu", 0xA1, _READ, s.kvm_debugregs)
KVM_SET_DEBUGREGS = _request("KVM_SET_DEBUGREGS", "vcpu", 0xA2, _WRITE, s.kvm_debugregs)
KVM_SET_TSC_KHZ = _request("KVM_SET_TSC_KHZ", "vcpu", 0xA2)
KVM_GET_TSC_KHZ = _request("KVM_GET_TSC_KHZ", "vcpu", 0xA3)
KVM_ENABLE_CAP = _request("KVM_ENABLE_CAP", "vm or vcpu", 0xA3, _WRITE, s.kvm_enable_cap)
KVM_GET_XSAVE = _request("KVM_GET_XSAVE", "vcpu", 0xA4, _READ, s.kvm_xsave)
KVM_SET_XSAVE = _request("KVM_SET_XSAVE", "vcpu", 0xA5, _WRITE, s.kvm_xsave)
KVM_GET_XCRS = _request("KVM_GET_XCRS", "vcpu", 0xA6, _READ, s.kvm_xcrs)
KVM_SET_XCRS = _request("KVM_SET_XCRS", "vcpu", 0xA7, _WRITE, s.kvm_xcrs)
KVM_GET_NESTED_STATE = _request("KVM_GET_NESTED_STATE", "vcpu", 0xBE, _READ | _WRITE, s.kvm_nested_state)
KVM_SET_NESTED_STATE = _request("KVM_SET_NESTED_STATE", "vcpu", 0xBF, _WRITE, s.kvm_nested_state)
KVM_GET_XSAVE2 = _request("KVM_GET_XSAVE2", "vcpu", 0xCF, _READ, s.kvm_xsave)
