"""The CPUID a vCPU shows: what KVM can do, with this machine's topology and no foreign hypervisor leaf.

Pure: takes KVM_GET_SUPPORTED_CPUID's entries and returns new ones. `guest_cpuid` does what is
the same for all vCPUs, `vcpu_cpuid` what differs. Topology is one socket of N single-threaded
cores, APIC id = vCPU index, which is also the VP index (the order in which vCPUs are created).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hvkvm.abi.kvm import KVM_CPUID_FLAG_SIGNIFCANT_INDEX
from hvkvm.abi.kvm_structs import kvm_cpuid_entry2
from hvkvm.machine.cpu_features import HOST, CpuRequest, must_show, without

HYPERVISOR_LEAVES = range(0x40000000, 0x40010000)

_1_ECX_MONITOR = 1 << 3
_1_ECX_VMX = 1 << 5
_1_ECX_X2APIC = 1 << 21
_1_ECX_TSC_DEADLINE = 1 << 24
_1_ECX_HYPERVISOR = 1 << 31
_1_EDX_HTT = 1 << 28
_80000001_ECX_CMP_LEGACY = 1 << 1
_80000001_ECX_SVM = 1 << 2

_DROPPED = frozenset({0x1F, 0x80000026})
"""V2 topology leaves would contradict ours."""


def entry(
    function: int,
    index: int = 0,
    *,
    eax: int = 0,
    ebx: int = 0,
    ecx: int = 0,
    edx: int = 0,
    indexed: bool = False,
) -> kvm_cpuid_entry2:
    """One CPUID entry; `indexed` marks the sub-leaf as significant."""
    flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX if indexed else 0
    return kvm_cpuid_entry2(function=function, index=index, flags=flags, eax=eax, ebx=ebx, ecx=ecx, edx=edx)


def id_bits(cpus: int) -> int:
    """Bits of the APIC id that number a core within the socket."""
    return (cpus - 1).bit_length()


def guest_cpuid(
    host: Sequence[kvm_cpuid_entry2], request: CpuRequest = HOST, *, tsc_deadline: bool
) -> list[kvm_cpuid_entry2]:
    """What every vCPU shows: KVM's entries without what hvkvm or `request` hides, and what needs that.

    `tsc_deadline` says that KVM's in-kernel APIC has the TSC deadline timer. Raises
    CapabilityMissing for a feature that was asked for and cannot be shown.
    """
    kept = []
    for source in host:
        if source.function in _DROPPED or (source.function == 0xB and source.index):
            continue
        leaf = kvm_cpuid_entry2.from_buffer_copy(source)
        if leaf.function == 1:
            leaf.ecx &= ~(_1_ECX_MONITOR | _1_ECX_VMX) & 0xFFFFFFFF
            leaf.ecx |= _1_ECX_HYPERVISOR | _1_ECX_X2APIC
            if tsc_deadline:
                leaf.ecx |= _1_ECX_TSC_DEADLINE
        elif leaf.function == 0x80000001:
            leaf.ecx &= ~_80000001_ECX_SVM & 0xFFFFFFFF
        kept.append(leaf)
    guest = without(kept, request.hide)
    must_show(request, kept, guest)
    return guest


def vcpu_cpuid(
    guest: Sequence[kvm_cpuid_entry2],
    index: int,
    cpus: int,
    hypervisor_leaves: Iterable[kvm_cpuid_entry2] | None,
) -> list[kvm_cpuid_entry2]:
    """The entries for KVM_SET_CPUID2 on vCPU `index` of `cpus`, from those of `guest_cpuid`.

    `hypervisor_leaves` replaces everything from 0x40000000 on; None keeps
    KVM's own paravirtual leaves (a machine without enlightenments).
    """
    kept = []
    for source in guest:
        if source.function == 0xB:
            kept += _extended_topology(index, cpus)
            continue
        if source.function in HYPERVISOR_LEAVES and hypervisor_leaves is not None:
            continue
        copy = kvm_cpuid_entry2.from_buffer_copy(source)
        _patch(copy, index, cpus)
        kept.append(copy)
    if hypervisor_leaves is not None:
        kept += hypervisor_leaves
    return kept


def _patch(leaf: kvm_cpuid_entry2, index: int, cpus: int) -> None:
    if leaf.function == 1:
        leaf.ebx = (leaf.ebx & 0xFFFF) | min(cpus, 255) << 16 | index << 24
        leaf.edx = leaf.edx | _1_EDX_HTT if cpus > 1 else leaf.edx & ~_1_EDX_HTT
    elif leaf.function == 4 and leaf.eax & 0x1F:
        # Private caches, and the socket's core count; only the last level is shared.
        shared = (1 << id_bits(cpus)) - 1 if (leaf.eax >> 5 & 7) >= 3 else 0
        cores = (1 << id_bits(cpus)) - 1
        leaf.eax = (leaf.eax & 0x3FFF) | shared << 14 | min(cores, 63) << 26
    elif leaf.function == 0x80000001:
        leaf.ecx &= ~_80000001_ECX_CMP_LEGACY & 0xFFFFFFFF
        if cpus > 1:
            leaf.ecx |= _80000001_ECX_CMP_LEGACY
    elif leaf.function == 0x80000008:
        leaf.ecx = (leaf.ecx & ~0xF0FF) | (cpus - 1) | id_bits(cpus) << 12
    elif leaf.function == 0x8000001D and leaf.eax & 0x1F:
        shared = cpus - 1 if (leaf.eax >> 5 & 7) >= 3 else 0
        leaf.eax = (leaf.eax & 0x3FFF) | shared << 14
    elif leaf.function == 0x8000001E:
        leaf.eax, leaf.ebx, leaf.ecx = index, index & 0xFF, 0


def _extended_topology(index: int, cpus: int) -> list[kvm_cpuid_entry2]:
    """Leaf 0xB: an SMT level of one thread, a core level of `cpus`."""
    smt, core = 1, 2
    return [
        entry(0xB, 0, eax=0, ebx=1, ecx=smt << 8, edx=index, indexed=True),
        entry(0xB, 1, eax=id_bits(cpus), ebx=cpus, ecx=1 | core << 8, edx=index, indexed=True),
        entry(0xB, 2, ecx=2, edx=index, indexed=True),
    ]
