"""The table of Hyper-V enlightenments: one row each, under QEMU's hv-* name.

To add one, add a row (and its MSRs to `cpuid.reset_msrs` if a reset must clear
them). Data only; `features` reads requests and resolves them against a host,
`cpuid` turns the result into leaves.
"""

from __future__ import annotations

from typing import Literal

from hvkvm.abi import tlfs
from hvkvm.abi.tlfs import HYPERV_CPUID_ENLIGHTMENT_INFO as INFO
from hvkvm.abi.tlfs import HYPERV_CPUID_FEATURES as FEATURES
from hvkvm.abi.tlfs import HYPERV_CPUID_NESTED_FEATURES as NESTED
from hvkvm.abi.tlfs import HYPERV_CPUID_SYNDBG_PLATFORM_CAPABILITIES as SYNDBG
from hvkvm.tuples import NamedTuple

REGISTERS = ("eax", "ebx", "ecx", "edx")

EVMCS_VERSIONS = 0x0101
"""NESTED.EAX: lowest and highest enlightened VMCS version, both 1."""


class Bits(NamedTuple):
    """What a row sets in one register of one leaf."""

    leaf: int
    register: Literal["eax", "ebx", "ecx", "edx"]
    mask: int


class Enlightenment(NamedTuple):
    """One row. `name` is without "hv-"; `kvm_caps` are C names, all needed."""

    name: str
    summary: str
    bits: tuple[Bits, ...] = ()
    requires: tuple[str, ...] = ()
    kvm_caps: tuple[str, ...] = ("KVM_CAP_HYPERV",)
    value: Literal["", "number", "tristate"] = ""
    in_host_model: bool = True
    """Part of host-model and passthrough. Not what is a policy, or opens the guest to a debugger."""
    needs_host: bool = True
    """KVM must report `bits`; else the bits are a statement about the host that only the user can make."""
    needs_cpu: frozenset[str] = frozenset()
    """CPU features, by /proc/cpuinfo's names: of no use to a guest whose CPUID shows none of them."""


ALWAYS = (
    Bits(FEATURES, "eax", tlfs.HV_MSR_HYPERCALL_AVAILABLE),
    Bits(FEATURES, "edx", tlfs.HV_X64_CPU_DYNAMIC_PARTITIONING_AVAILABLE),
)
"""Shown with any enlightenment at all, as QEMU does; KVM does not report the second."""

_NESTING = frozenset({"vmx", "svm"})

ENLIGHTENMENTS = (
    Enlightenment(
        "relaxed",
        "no watchdog on timer interrupts",
        (Bits(INFO, "eax", tlfs.HV_X64_RELAXED_TIMING_RECOMMENDED),),
    ),
    Enlightenment(
        "vapic",
        "APIC access by MSR, VP assist page",
        (
            Bits(FEATURES, "eax", tlfs.HV_MSR_APIC_ACCESS_AVAILABLE),
            Bits(INFO, "eax", tlfs.HV_X64_APIC_ACCESS_RECOMMENDED),
        ),
    ),
    Enlightenment(
        "spinlocks",
        "tries of a spinlock before the guest tells the hypervisor",
        kvm_caps=("KVM_CAP_HYPERV", "KVM_CAP_HYPERV_SPIN"),
        value="number",
    ),
    Enlightenment(
        "vpindex", "virtual processor index", (Bits(FEATURES, "eax", tlfs.HV_MSR_VP_INDEX_AVAILABLE),)
    ),
    Enlightenment("runtime", "run time of a VP", (Bits(FEATURES, "eax", tlfs.HV_MSR_VP_RUNTIME_AVAILABLE),)),
    Enlightenment("reset", "reset by MSR", (Bits(FEATURES, "eax", tlfs.HV_MSR_RESET_AVAILABLE),)),
    Enlightenment(
        "crash", "crash report by MSR", (Bits(FEATURES, "edx", tlfs.HV_FEATURE_GUEST_CRASH_MSR_AVAILABLE),)
    ),
    Enlightenment(
        "time",
        "reference counter and reference TSC page",
        (
            Bits(
                FEATURES,
                "eax",
                tlfs.HV_MSR_TIME_REF_COUNT_AVAILABLE | tlfs.HV_MSR_REFERENCE_TSC_AVAILABLE,
            ),
        ),
        kvm_caps=("KVM_CAP_HYPERV", "KVM_CAP_HYPERV_TIME"),
    ),
    Enlightenment(
        "synic",
        "synthetic interrupt controller, HvPostMessage and HvSignalEvent",
        (
            Bits(FEATURES, "eax", tlfs.HV_MSR_SYNIC_AVAILABLE),
            Bits(FEATURES, "ebx", tlfs.HV_POST_MESSAGES | tlfs.HV_SIGNAL_EVENTS),
        ),
        requires=("vpindex",),
        kvm_caps=("KVM_CAP_HYPERV", "KVM_CAP_HYPERV_SYNIC2"),
    ),
    Enlightenment(
        "stimer",
        "synthetic timers",
        (Bits(FEATURES, "eax", tlfs.HV_MSR_SYNTIMER_AVAILABLE),),
        requires=("synic", "time"),
    ),
    Enlightenment(
        "stimer-direct",
        "synthetic timers that raise a vector instead of a message",
        (Bits(FEATURES, "edx", tlfs.HV_STIMER_DIRECT_MODE_AVAILABLE),),
        requires=("stimer",),
    ),
    Enlightenment(
        "tlbflush",
        "TLB flush by hypercall",
        (
            Bits(
                INFO,
                "eax",
                tlfs.HV_X64_REMOTE_TLB_FLUSH_RECOMMENDED | tlfs.HV_X64_EX_PROCESSOR_MASKS_RECOMMENDED,
            ),
        ),
        requires=("vpindex",),
        kvm_caps=("KVM_CAP_HYPERV", "KVM_CAP_HYPERV_TLBFLUSH"),
    ),
    Enlightenment(
        "tlbflush-ext",
        "TLB flush of many address ranges in one call",
        (Bits(FEATURES, "edx", tlfs.HV_FEATURE_EXT_GVA_RANGES_FLUSH),),
        requires=("tlbflush",),
    ),
    Enlightenment(
        "tlbflush-direct",
        "TLB flush of a nested guest without its hypervisor",
        (Bits(NESTED, "eax", tlfs.HV_X64_NESTED_DIRECT_FLUSH),),
        requires=("vapic",),
        needs_cpu=_NESTING,
    ),
    Enlightenment(
        "ipi",
        "IPIs to many VPs by hypercall",
        (
            Bits(
                INFO,
                "eax",
                tlfs.HV_X64_CLUSTER_IPI_RECOMMENDED | tlfs.HV_X64_EX_PROCESSOR_MASKS_RECOMMENDED,
            ),
        ),
        requires=("vpindex",),
        kvm_caps=("KVM_CAP_HYPERV", "KVM_CAP_HYPERV_SEND_IPI"),
    ),
    Enlightenment(
        "frequencies",
        "TSC and APIC frequency by MSR",
        (
            Bits(FEATURES, "eax", tlfs.HV_ACCESS_FREQUENCY_MSRS),
            Bits(FEATURES, "edx", tlfs.HV_FEATURE_FREQUENCY_MSRS_AVAILABLE),
        ),
    ),
    Enlightenment(
        "reenlightenment",
        "notice of a changed TSC frequency after migration",
        (Bits(FEATURES, "eax", tlfs.HV_ACCESS_REENLIGHTENMENT),),
    ),
    # No CPUID bit is as useful to a plain guest: with it Linux keeps the TSC as its clocksource, without it
    # Linux marks the TSC unstable on Hyper-V. QEMU has no name for it; KVM reports it since Linux 6.2.
    Enlightenment(
        "tsc-invariant",
        "the guest may trust the TSC (hvkvm's own name)",
        (Bits(FEATURES, "eax", tlfs.HV_ACCESS_TSC_INVARIANT),),
        needs_cpu=frozenset({"nonstop_tsc"}),
    ),
    Enlightenment(
        "evmcs",
        "enlightened VMCS for nested guests (Intel)",
        (Bits(INFO, "eax", tlfs.HV_X64_ENLIGHTENED_VMCS_RECOMMENDED), Bits(NESTED, "eax", EVMCS_VERSIONS)),
        requires=("vapic",),
        kvm_caps=("KVM_CAP_HYPERV", "KVM_CAP_HYPERV_ENLIGHTENED_VMCS"),
        needs_cpu=frozenset({"vmx"}),
    ),
    Enlightenment(
        "emsr-bitmap",
        "enlightened MSR bitmap for nested guests",
        (Bits(NESTED, "eax", tlfs.HV_X64_NESTED_MSR_BITMAP),),
        needs_cpu=_NESTING,
    ),
    Enlightenment(
        "xmm-input",
        "hypercall input in XMM registers",
        (Bits(FEATURES, "edx", tlfs.HV_X64_HYPERCALL_XMM_INPUT_AVAILABLE),),
    ),
    Enlightenment(
        "avic",
        "no AutoEOI, so that hardware APIC virtualization stays on",
        (Bits(INFO, "eax", tlfs.HV_DEPRECATING_AEOI_RECOMMENDED),),
    ),
    # avic's advice is right where the hardware has an APIC for guests. Elsewhere each EOI by x2APIC's MSR
    # is an exit, and by Hyper-V's accessor it is none whenever KVM marks the VP assist page. QEMU has no name
    # for both.
    Enlightenment(
        "lazy-eoi",
        "APIC access by MSR with hv-avic too, so that most EOIs do not exit (hvkvm's own name)",
        requires=("vapic",),
        kvm_caps=("KVM_CAP_HYPERV", "KVM_CAP_HYPERV_VAPIC"),
    ),
    Enlightenment(
        "syndbg",
        "synthetic debugger MSRs (nobody is attached)",
        (
            Bits(FEATURES, "edx", tlfs.HV_FEATURE_DEBUG_MSRS_AVAILABLE),
            Bits(SYNDBG, "eax", tlfs.HV_X64_SYNDBG_CAP_ALLOW_KERNEL_DEBUGGING),
        ),
        requires=("synic", "relaxed"),
        in_host_model=False,
    ),
    Enlightenment(
        "no-nonarch-coresharing",
        "no two VPs share a core unless their topology says so",
        (Bits(INFO, "eax", tlfs.HV_X64_NO_NONARCH_CORESHARING),),
        value="tristate",
        needs_host=False,
    ),
    Enlightenment(
        "enforce-cpuid",
        "KVM refuses what CPUID does not offer",
        kvm_caps=("KVM_CAP_HYPERV", "KVM_CAP_HYPERV_ENFORCE_CPUID"),
        in_host_model=False,
    ),
)

BY_NAME = {row.name: row for row in ENLIGHTENMENTS}

WINDOWS = (
    "relaxed",
    "vapic",
    "vpindex",
    "runtime",
    "crash",
    "time",
    "synic",
    "stimer",
    "tlbflush",
    "ipi",
    "frequencies",
    "avic",
)
"""What `--hv windows` asks for: cloud-hypervisor's set for Windows, and crash reports (docs/windows.md)."""
WINDOWS_NEEDS = ("vpindex",)
"""Without it, and the hypercalls that come with any, Windows takes an "Hv#1" for broken."""

ALIASES = {"apicv": "avic"}
"""QEMU's second names."""

VERSION_FIELDS = {
    "version-id-build": ("build", 0xFFFFFFFF),
    "version-id-major": ("major", 0xFFFF),
    "version-id-minor": ("minor", 0xFFFF),
    "version-id-spack": ("spack", 0xFFFFFFFF),
    "version-id-sbranch": ("sbranch", 0xFF),
    "version-id-snumber": ("snumber", 0xFFFFFF),
}
"""Settings of leaf 0x40000002: field of `features.Version`, largest value."""


class Version(NamedTuple):
    """The version the guest sees; the default is QEMU's and KVM's, Windows Server 2016."""

    build: int = 0x3839
    major: int = 0x0A
    minor: int = 0
    spack: int = 0
    sbranch: int = 0
    snumber: int = 0
