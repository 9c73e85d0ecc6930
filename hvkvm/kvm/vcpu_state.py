"""All of a vCPU's state: taken in one piece, and put back in an order that works.

A machine reset is the putting back of what was taken before the first KVM_RUN:
KVM knows no reset of a machine, and what it gives a new vCPU is by definition the
power-on state. Nothing here is copied out of a manual, and nothing is chosen by
what guests are known to use: every register that KVM shows is taken.

Two things are not here. The Hyper-V MSRs (0x40000000 and up) belong to the SynIC,
which has its own order of putting them back. CPUID and what depends on the host
(the TSC's rate) a guest cannot change.

Owner: the vCPU's thread, or whoever has it paused; taking and putting back need
it outside KVM_RUN, with its last exit completed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

from hvkvm.abi.kvm_structs import (
    kvm_debugregs,
    kvm_lapic_state,
    kvm_nested_state,
    kvm_regs,
    kvm_sregs,
    kvm_vcpu_events,
    kvm_xcrs,
)
from hvkvm.abi.tlfs import HV_X64_MSR_COUNT, HV_X64_MSR_FIRST
from hvkvm.kvm.kind import probe
from hvkvm.kvm.vcpu import Vcpu
from hvkvm.tuples import NamedTuple

MSR_IA32_TSC = 0x10

UNLISTED_MSRS = (
    0x1D9,  # IA32_DEBUGCTL
    *range(0x200, 0x210),  # IA32_MTRR_PHYSBASEn, PHYSMASKn
    0x250,  # IA32_MTRR_FIX*
    0x258,
    0x259,
    *range(0x268, 0x270),
    0x2FF,  # IA32_MTRR_DEF_TYPE
    *range(0x400, 0x480),  # IA32_MCi_CTL, STATUS, ADDR, MISC
    0xC0010015,  # HWCR
    0xC0010114,  # VM_CR
)
"""What guests may write although not every kernel has it in KVM_GET_MSR_INDEX_LIST."""

_AVAILABLE_TSS, _BUSY_TSS = 9, 11  # 64-bit ones, of segment descriptors' types

_NOBODYS_VMXON = (1 << 64) - 1
_NESTED_GIF = 1 << 8  # KVM_STATE_NESTED_GIF_SET: a CPU outside of SVM has it, too


class VcpuState(NamedTuple):
    """One vCPU's registers, each kind as its KVM_GET_* gives it. Whoever holds one changes nothing in it."""

    sregs: kvm_sregs
    regs: kvm_regs
    xcrs: kvm_xcrs
    xsave: bytes
    debugregs: kvm_debugregs
    lapic: kvm_lapic_state
    msrs: dict[int, int]
    """By index: all that can be read, but the TSC and Hyper-V's."""
    events: kvm_vcpu_events
    mp_state: int
    nested: bytes
    """struct kvm_nested_state with its data; empty where KVM has none."""


def state_msrs(listed: Iterable[int]) -> list[int]:
    """The MSRs that are state, of those `listed` by KVM_GET_MSR_INDEX_LIST and those it may leave out."""
    hyperv = range(HV_X64_MSR_FIRST, HV_X64_MSR_FIRST + HV_X64_MSR_COUNT)
    wanted = dict.fromkeys((*listed, *UNLISTED_MSRS))
    return sorted(index for index in wanted if index != MSR_IA32_TSC and index not in hyperv)


def capture(vcpu: Vcpu, msrs: Sequence[int]) -> VcpuState:
    """Take the state of `vcpu`, with those of `msrs` that it lets us read. Raises KvmIoctlError."""
    return VcpuState(
        sregs=vcpu.sregs(),
        regs=vcpu.regs(),
        xcrs=vcpu.xcrs(),
        xsave=vcpu.xsave(),
        debugregs=vcpu.debugregs(),
        lapic=vcpu.lapic(),
        msrs=vcpu.readable_msrs(msrs),
        events=vcpu.vcpu_events(),
        mp_state=vcpu.mp_state(),
        nested=vcpu.nested_state(),
    )


def begin_tsc(vcpu: Vcpu) -> None:
    """Have its TSC count as the VM's first one does, in step with the others, whatever the guest had written.

    Raises KvmIoctlError.
    """
    vcpu.set_msrs(((MSR_IA32_TSC, 0),))  # KVM's word for a vCPU that begins


def tscs(vcpus: Sequence[Vcpu]) -> tuple[int, ...]:
    """The TSC of each, read with as little as can be in between. Raises KvmIoctlError."""
    return tuple(vcpu.msrs((MSR_IA32_TSC,))[MSR_IA32_TSC] for vcpu in vcpus)


def set_tscs(vcpus: Sequence[Vcpu], values: Sequence[int]) -> None:
    """Put back what `tscs` gave. Raises KvmIoctlError.

    KVM takes what is written within a second of what another vCPU's TSC has by then for the same, and lets
    both count in step. So nothing that takes long may come in between, on a busy host either: the guest
    would find that its CPUs no longer agree on the time.
    """
    for vcpu, value in zip(vcpus, values, strict=True):
        vcpu.set_msrs(((MSR_IA32_TSC, value),))


def restore(vcpu: Vcpu, state: VcpuState) -> list[int]:
    """Put `state` back; the MSRs that KVM refused, which keep what they have.

    Raises KvmIoctlError. The TSC is the caller's to set, before. The order: a guest's own guest ends before
    the control registers that carried it go, and begins after they came. The APIC follows its
    base (sregs); the TSC and the APIC's mode come before the TSC deadline (an MSR).
    XCR0 comes before the areas it names, pending events behind what would drop
    them, and whether the vCPU runs at last.
    """
    run = vcpu.run
    run.kvm_dirty_regs = 0  # or the next KVM_RUN would take registers from there
    nested_runs = _nested_runs(state.nested)
    if not nested_runs:
        vcpu.set_nested_state(state.nested)
    vcpu.set_sregs(_with_idle_tss(state.sregs))
    if nested_runs:
        vcpu.set_nested_state(state.nested)
    vcpu.set_regs(state.regs)
    vcpu.set_xcrs(state.xcrs)
    vcpu.set_xsave(state.xsave)
    vcpu.set_lapic(state.lapic)
    refused = _restore_msrs(vcpu, state.msrs)
    vcpu.set_debugregs(state.debugregs)
    vcpu.set_vcpu_events(state.events)
    vcpu.set_mp_state(state.mp_state)
    return refused


def _with_idle_tss(sregs: kvm_sregs) -> kvm_sregs:
    """Where SVM carries the guest, its TSS as LTR leaves it in the CPU there: available, not busy.

    KVM shows it as busy on every CPU, since VMX knows no other. SVM takes both; QEMU's emulation of it
    takes a busy one for none, and would refuse the guest every port of its user mode.
    """
    if sregs.tr.type != _BUSY_TSS or "svm" not in (_kind().flags or ()):
        return sregs
    changed = kvm_sregs.from_buffer_copy(sregs)
    changed.tr.type = _AVAILABLE_TSS
    return changed


def _restore_msrs(vcpu: Vcpu, wanted: dict[int, int]) -> list[int]:
    """Only those that differ: KVM refuses some that it lists, were it with the value that they have."""
    now = vcpu.readable_msrs(wanted)
    return vcpu.set_writable_msrs(
        {index: value for index, value in wanted.items() if now.get(index) != value}
    )


_kind = cache(probe)


def _nested_runs(nested: bytes) -> bool:
    """Whether a guest has VMX on or runs a guest of its own."""
    if not nested:
        return False
    header = kvm_nested_state.from_buffer_copy(nested)
    # SVM's header holds the VMCB's address, 0 without one; VMX's has all ones where VMX is off.
    return bool(header.flags & ~_NESTED_GIF) or header.hdr.vmx.vmxon_pa not in (0, _NOBODYS_VMXON)
