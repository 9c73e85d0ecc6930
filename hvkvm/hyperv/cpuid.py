"""From a `FeatureSet` to what KVM is told: CPUID leaves, vCPU capabilities, reset MSRs.

Pure but for `prepare_vcpu`, which the main thread calls while the machine is built. MSRs
are asked for on the I/O loop, too, at a reset and a save.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ctypes import addressof, c_uint16
from typing import TYPE_CHECKING, Protocol

from hvkvm.abi import tlfs
from hvkvm.abi.hv_synic import HV_SYNIC_SINT_COUNT, HV_SYNIC_SINT_RESET, HV_SYNIC_VERSION_1
from hvkvm.abi.kvm import KVM_CAP_HYPERV_ENFORCE_CPUID, KVM_CAP_HYPERV_ENLIGHTENED_VMCS
from hvkvm.abi.kvm_structs import kvm_cpuid_entry2
from hvkvm.hyperv.enlightenments import ALWAYS, BY_NAME, REGISTERS
from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from hvkvm.hyperv.features import FeatureSet

_SYNDBG_VENDOR = b"Microsoft VS"

_evmcs_version = c_uint16()
"""KVM_CAP_HYPERV_ENLIGHTENED_VMCS stores the versions it speaks here; we offer one only."""


class VcpuCap(NamedTuple):
    """One KVM_ENABLE_CAP on a vCPU."""

    name: str
    cap: int
    args: tuple[int, ...] = ()


class CapEnabler(Protocol):
    """What `prepare_vcpu` needs of a Vcpu."""

    def enable_cap(self, cap: int, *args: int) -> object: ...


def hyperv_leaves(features: FeatureSet, cpus: int) -> list[kvm_cpuid_entry2]:
    """The leaves from 0x40000000 on, for a machine of `cpus` vCPUs; empty for an empty set.

    They replace KVM's own leaves there. QEMU moves those to 0x40000100; we drop
    them, because Linux takes the hypervisor with the highest leaf and would then
    see KVM and load no Hyper-V driver.
    """
    if not features:
        return []
    table: dict[int, dict[str, int]] = {}

    def put(leaf: int, eax: int = 0, ebx: int = 0, ecx: int = 0, edx: int = 0) -> None:
        registers = table.setdefault(leaf, dict.fromkeys(REGISTERS, 0))
        for name, value in zip(REGISTERS, (eax, ebx, ecx, edx), strict=True):
            registers[name] |= value

    version = features.version
    put(tlfs.HYPERV_CPUID_INTERFACE, tlfs.HV_CPUID_SIGNATURE_EAX)
    put(
        tlfs.HYPERV_CPUID_VERSION,
        version.build,
        version.major << 16 | version.minor,
        version.spack,
        version.sbranch << 24 | version.snumber,
    )
    put(tlfs.HYPERV_CPUID_FEATURES)
    put(tlfs.HYPERV_CPUID_ENLIGHTMENT_INFO, ebx=features.spinlocks)
    max_vps = cpus if features.max_vps is None else features.max_vps
    put(tlfs.HYPERV_CPUID_IMPLEMENT_LIMITS, max_vps, features.max_lps)
    for bits in (*ALWAYS, *(bits for name in features.names for bits in BY_NAME[name].bits)):
        put(bits.leaf, **{bits.register: bits.mask})
    if "avic" in features.names and "lazy-eoi" not in features.names:
        # Hardware APIC virtualization takes the x2APIC writes; by Hyper-V's MSRs each would exit.
        table[tlfs.HYPERV_CPUID_ENLIGHTMENT_INFO]["eax"] &= ~tlfs.HV_X64_APIC_ACCESS_RECOMMENDED
    if tlfs.HYPERV_CPUID_NESTED_FEATURES in table:
        for leaf in range(tlfs.HYPERV_CPUID_IMPLEMENT_LIMITS + 1, tlfs.HYPERV_CPUID_NESTED_FEATURES):
            put(leaf)
    if "syndbg" in features.names:
        last = tlfs.HYPERV_CPUID_SYNDBG_PLATFORM_CAPABILITIES
        put(tlfs.HYPERV_CPUID_SYNDBG_VENDOR_AND_MAX_FUNCTIONS, last, *_words(_SYNDBG_VENDOR))
        put(tlfs.HYPERV_CPUID_SYNDBG_INTERFACE, tlfs.HYPERV_VS_INTERFACE_EAX_SIGNATURE)
    put(tlfs.HYPERV_CPUID_VENDOR_AND_MAX_FUNCTIONS, max(table), *_words(features.vendor_id))
    return [kvm_cpuid_entry2(function=leaf, **table[leaf]) for leaf in sorted(table)]


def _words(vendor: bytes) -> tuple[int, int, int]:
    a, b, c = (int.from_bytes(vendor[at : at + 4], "little") for at in (0, 4, 8))
    return a, b, c


def vcpu_caps(features: FeatureSet) -> list[VcpuCap]:
    """What to enable on every vCPU after KVM_SET_CPUID2.

    Not KVM_CAP_HYPERV_SYNIC2: that one is `Partition.activate`'s, since the
    interrupt routes depend on it (S16) and another SynIC may stand in for KVM's.
    """
    caps = []
    if "evmcs" in features.names:
        caps.append(
            VcpuCap(
                "KVM_CAP_HYPERV_ENLIGHTENED_VMCS",
                KVM_CAP_HYPERV_ENLIGHTENED_VMCS,
                (addressof(_evmcs_version),),
            )
        )
    if "enforce-cpuid" in features.names:
        caps.append(VcpuCap("KVM_CAP_HYPERV_ENFORCE_CPUID", KVM_CAP_HYPERV_ENFORCE_CPUID, (1,)))
    return caps


def prepare_vcpu(vcpu: CapEnabler, features: FeatureSet) -> None:
    """Enable `vcpu_caps`, after KVM_SET_CPUID2 and before the vCPU runs. Raises KvmIoctlError."""
    for cap in vcpu_caps(features):
        vcpu.enable_cap(cap.cap, *cap.args)


def reset_msrs(features: FeatureSet | None, vp_index: int) -> list[tuple[int, int]]:
    """The MSRs of VP `vp_index` at power-on and reset, in the order KVM is to be given them.

    KVM resets none of these itself. VM-wide ones come with VP 0. None stands for
    a VM of which only SynIC and timers are known. VP_RUNTIME is not among them: KVM
    takes it for the run time of whichever thread writes it.
    """
    return list(_reset_msrs(features, vp_index))


def restore_order(values: Mapping[int, int]) -> list[tuple[int, int]]:
    """Saved MSRs of one VP, by index, in the order in which KVM takes them over.

    The guest OS id goes before what is void without it. A timer comes after the SINT
    that it uses, its count before its config: KVM before 6.7 takes a count by the rules
    for guests, so that behind its config one that has expired would start anew.
    """
    last = [
        tlfs.HV_X64_MSR_STIMER0_CONFIG + 2 * timer + count
        for timer in range(tlfs.HV_STIMER_COUNT)
        for count in (1, 0)
    ]
    first = (tlfs.HV_X64_MSR_GUEST_OS_ID, tlfs.HV_X64_MSR_HYPERCALL)
    middle = sorted(index for index in values if index not in first and index not in last)
    order = (*first, *middle, *last)
    return [(index, values[index]) for index in order if index in values]


def _reset_msrs(features: FeatureSet | None, vp_index: int) -> Iterator[tuple[int, int]]:
    def has(name: str) -> bool:
        return features is not None and name in features.names

    if vp_index == 0 and features:
        # KVM ignores HYPERCALL while there is no guest OS id, and the id's going clears the enable bit only.
        yield tlfs.HV_X64_MSR_GUEST_OS_ID, 1
        yield tlfs.HV_X64_MSR_HYPERCALL, 0
        yield tlfs.HV_X64_MSR_GUEST_OS_ID, 0
        if has("time"):
            yield tlfs.HV_X64_MSR_REFERENCE_TSC, 0
        if has("reenlightenment"):
            yield tlfs.HV_X64_MSR_REENLIGHTENMENT_CONTROL, 0
            yield tlfs.HV_X64_MSR_TSC_EMULATION_CONTROL, 0
            yield tlfs.HV_X64_MSR_TSC_EMULATION_STATUS, 0
        if has("tsc-invariant"):
            yield tlfs.HV_X64_MSR_TSC_INVARIANT_CONTROL, 0
        if has("syndbg"):
            yield tlfs.HV_X64_MSR_SYNDBG_OPTIONS, 0
    if has("vapic"):
        yield tlfs.HV_X64_MSR_VP_ASSIST_PAGE, 0
    if has("crash"):
        for index in range(tlfs.HV_X64_MSR_CRASH_P0, tlfs.HV_X64_MSR_CRASH_P4 + 1):
            yield index, 0
        # What the guest reads there is what it may use. KVM may keep the first bit only.
        yield tlfs.HV_X64_MSR_CRASH_CTL, tlfs.HV_CRASH_CTL_CRASH_NOTIFY | tlfs.HV_CRASH_CTL_CRASH_NOTIFY_MSG
    if has("vpindex"):
        yield tlfs.HV_X64_MSR_VP_INDEX, vp_index
    if features is None or has("synic"):
        yield tlfs.HV_X64_MSR_SVERSION, HV_SYNIC_VERSION_1
        # KVM's own default is 1, the TLFS's reset value is 0.
        yield tlfs.HV_X64_MSR_SCONTROL, 0
        yield tlfs.HV_X64_MSR_SIEFP, 0
        yield tlfs.HV_X64_MSR_SIMP, 0
        for sint in range(HV_SYNIC_SINT_COUNT):
            yield tlfs.HV_X64_MSR_SINT0 + sint, HV_SYNIC_SINT_RESET
    if features is None or has("stimer"):
        for timer in range(tlfs.HV_STIMER_COUNT):
            yield tlfs.HV_X64_MSR_STIMER0_CONFIG + 2 * timer, 0
        for timer in range(tlfs.HV_STIMER_COUNT):
            yield tlfs.HV_X64_MSR_STIMER0_COUNT + 2 * timer, 0
