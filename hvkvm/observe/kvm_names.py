"""Names for what hvkvm itself never asks of KVM, but other VMMs do.

`hvkvm.abi` holds what hvkvm uses; a trace of QEMU needs more names, and only the
names. No state, any thread. Source: <linux/kvm.h>.
"""

from __future__ import annotations

from hvkvm.abi import kvm, tlfs
from hvkvm.abi.kvm_requests import REQUESTS

_OTHER_REQUESTS = {
    0xC008AE09: "KVM_GET_EMULATED_CPUID",
    0xC004AE0A: "KVM_GET_MSR_FEATURE_INDEX_LIST",
    0xAE44: "KVM_SET_NR_MMU_PAGES",
    0xAE45: "KVM_GET_NR_MMU_PAGES",
    0x40A0AE49: "KVM_SET_USER_MEMORY_REGION2",
    0xAE64: "KVM_CREATE_PIT",
    0xC048AE65: "KVM_GET_PIT",
    0x8048AE66: "KVM_SET_PIT",
    0xC008AE67: "KVM_IRQ_LINE_STATUS",
    0xAE71: "KVM_REINJECT_CONTROL",
    0x4038AE7A: "KVM_XEN_HVM_CONFIG",
    0x4008AE8A: "KVM_SET_CPUID",
    0x4004AE8B: "KVM_SET_SIGNAL_MASK",
    0xC028AE92: "KVM_TPR_ACCESS_REPORTING",
    0x4008AE93: "KVM_SET_VAPIC_ADDR",
    0x4008AE9C: "KVM_X86_SETUP_MCE",
    0x8008AE9D: "KVM_X86_GET_MCE_CAP_SUPPORTED",
    0x4040AE9E: "KVM_X86_SET_MCE",
    0x4010AEAB: "KVM_GET_ONE_REG",
    0x4010AEAC: "KVM_SET_ONE_REG",
    0xAEAD: "KVM_KVMCLOCK_CTRL",
    0xC008AEB0: "KVM_GET_REG_LIST",
    0x4020AEB2: "KVM_SET_PMU_EVENT_FILTER",
    0xAEB7: "KVM_SMI",
    0xC008AEBA: "KVM_MEMORY_ENCRYPT_OP",
    0x8010AEBB: "KVM_MEMORY_ENCRYPT_REG_REGION",
    0x8010AEBC: "KVM_MEMORY_ENCRYPT_UNREG_REGION",
    0xC080AEBE: "KVM_GET_NESTED_STATE",
    0x4080AEBF: "KVM_SET_NESTED_STATE",
    0xAEC7: "KVM_RESET_DIRTY_RINGS",
    0xC048AEC8: "KVM_XEN_HVM_GET_ATTR",
    0x4048AEC9: "KVM_XEN_HVM_SET_ATTR",
    0xC048AECA: "KVM_XEN_VCPU_GET_ATTR",
    0x4048AECB: "KVM_XEN_VCPU_SET_ATTR",
    0x8140AECC: "KVM_GET_SREGS2",
    0x4140AECD: "KVM_SET_SREGS2",
    0xAECE: "KVM_GET_STATS_FD",
    0x400CAED0: "KVM_XEN_HVM_EVTCHN_SEND",
    0x4020AED2: "KVM_SET_MEMORY_ATTRIBUTES",
    0xC040AED4: "KVM_CREATE_GUEST_MEMFD",
    0xC00CAEE0: "KVM_CREATE_DEVICE",
    0x4018AEE1: "KVM_SET_DEVICE_ATTR",
    0x4018AEE2: "KVM_GET_DEVICE_ATTR",
    0x4018AEE3: "KVM_HAS_DEVICE_ATTR",
}
REQUEST_NAMES: dict[int, str] = {
    **_OTHER_REQUESTS,
    **{request.number: request.name for request in REQUESTS.values()},
}

_OTHER_CAPS = {
    2: "MMU_SHADOW_CACHE_CONTROL",
    6: "VAPIC",
    8: "CLOCKSOURCE",
    13: "PV_MMU",
    21: "DESTROY_MEMORY_REGION_WORKS",
    24: "REINJECT_CONTROL",
    30: "JOIN_MEMORY_REGIONS_WORKS",
    38: "XEN_HVM",
    47: "PCI_SEGMENT",
    49: "INTR_SHADOW",
    59: "ASYNC_PF",
    70: "ONE_REG",
    75: "PCI_2_3",
    89: "DEVICE_CTRL",
    95: "EXT_EMUL_CPUID",
    97: "IOAPIC_POLARITY_IGNORED",
    101: "VM_ATTRIBUTES",
    116: "DISABLE_QUIRKS",
    117: "X86_SMM",
    119: "GUEST_DEBUG_HW_BPS",
    120: "GUEST_DEBUG_HW_WPS",
    127: "VCPU_ATTRIBUTES",
    143: "X86_DISABLE_EXITS",
    159: "MSR_PLATFORM_INFO",
    166: "MANUAL_DIRTY_LOG_PROTECT",
    173: "PMU_EVENT_FILTER",
    183: "ASYNC_PF_INT",
    185: "SMALLER_MAXPHYADDR",
    187: "STEAL_TIME",
    195: "SET_GUEST_DEBUG2",
    196: "SGX_ATTRIBUTE",
    197: "VM_COPY_ENC_CONTEXT_FROM",
    198: "PTP_KVM",
    204: "EXIT_ON_EMULATION_FAILURE",
    206: "VM_MOVE_ENC_CONTEXT_FROM",
    207: "VM_GPA_BITS",
    212: "PMU_CAPABILITY",
    213: "DISABLE_QUIRKS2",
    218: "X86_TRIPLE_FAULT_EVENT",
    223: "DIRTY_LOG_RING_ACQ_REL",
    225: "DIRTY_LOG_RING_WITH_BITMAP",
    231: "USER_MEMORY2",
    233: "MEMORY_ATTRIBUTES",
    234: "GUEST_MEMFD",
    235: "VM_TYPES",
    236: "PRE_FAULT_MEMORY",
    237: "X86_APIC_BUS_CYCLES_NS",
}
_CAPS = {
    **{number: f"KVM_CAP_{name}" for number, name in _OTHER_CAPS.items()},
    **{value: name for name, value in vars(kvm).items() if name.startswith("KVM_CAP_")},
}

_MSR_RANGE = range(tlfs.HV_X64_MSR_FIRST, tlfs.HV_X64_MSR_FIRST + tlfs.HV_X64_MSR_COUNT)
_MSRS = {
    **{
        value: name
        for name, value in vars(tlfs).items()
        if name.startswith("HV_X64_MSR_") and value in _MSR_RANGE and name != "HV_X64_MSR_FIRST"
    },
    **{tlfs.HV_X64_MSR_SINT0 + n: f"HV_X64_MSR_SINT{n}" for n in range(16)},
    **{
        tlfs.HV_X64_MSR_STIMER0_CONFIG + 2 * n + odd: f"HV_X64_MSR_STIMER{n}_{what}"
        for n in range(tlfs.HV_STIMER_COUNT)
        for odd, what in enumerate(("CONFIG", "COUNT"))
    },
}


def request_name(number: int) -> str:
    """The C name of a request, or its number, size and direction where this build has no name for it."""
    name = REQUEST_NAMES.get(number)
    if name is not None:
        return name
    direction = ("", "W", "R", "RW")[number >> 30 & 3]
    return f"KVM_IO{direction}_{number & 0xFF:#04x}" + (f"_{number >> 16 & 0x3FFF}" if direction else "")


def cap_name(number: int) -> str:
    """`KVM_CAP_...`, or `KVM_CAP_<number>`."""
    return _CAPS.get(number) or f"KVM_CAP_{number}"


def msr_name(index: int) -> str:
    """The Hyper-V name of an MSR, or its number in hex."""
    return _MSRS.get(index) or f"{index:#x}"
