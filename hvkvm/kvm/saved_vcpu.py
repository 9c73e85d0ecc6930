"""A vCPU's state as bytes and numbers: what can be written to a file, and back.

The structures are KVM's, byte for byte, so that a newer kernel's reserved fields
live on. What comes from a file is held against their sizes here; what it means
KVM checks when it is put back.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TypeVar

from hvkvm.abi.kvm_structs import (
    kvm_cpuid_entry2,
    kvm_debugregs,
    kvm_lapic_state,
    kvm_regs,
    kvm_sregs,
    kvm_vcpu_events,
    kvm_xcrs,
)
from hvkvm.kvm.vcpu import Vcpu
from hvkvm.kvm.vcpu_state import VcpuState, capture, restore
from hvkvm.tuples import NamedTuple

S = TypeVar("S", bound=ctypes.Structure)


class SavedVcpu(NamedTuple):
    """One vCPU but its TSC. Each field but the last two is the structure of that name."""

    sregs: bytes
    regs: bytes
    xcrs: bytes
    xsave: bytes
    debugregs: bytes
    lapic: bytes
    events: bytes
    nested: bytes
    cpuid: bytes
    """kvm_cpuid_entry2, one behind the other."""
    mp_state: int
    msrs: dict[int, int]


def save_vcpu(vcpu: Vcpu, msrs: Sequence[int]) -> SavedVcpu:
    """Take all of a paused `vcpu`, with those of `msrs` that it lets us read. Raises KvmIoctlError."""
    state = capture(vcpu, msrs)
    return SavedVcpu(
        bytes(state.sregs),
        bytes(state.regs),
        bytes(state.xcrs),
        state.xsave,
        bytes(state.debugregs),
        bytes(state.lapic),
        bytes(state.events),
        state.nested,
        b"".join(map(bytes, vcpu.cpuid2())),
        state.mp_state,
        state.msrs,
    )


def load_vcpu(vcpu: Vcpu, saved: SavedVcpu) -> list[int]:
    """Put it back; the MSRs that KVM refused. ValueError for bytes of another size, else KvmIoctlError.

    Its TSC is right already, since the TSC deadline is among the MSRs.
    """
    state = VcpuState(
        _structure(kvm_sregs, saved.sregs),
        _structure(kvm_regs, saved.regs),
        _structure(kvm_xcrs, saved.xcrs),
        saved.xsave,
        _structure(kvm_debugregs, saved.debugregs),
        _structure(kvm_lapic_state, saved.lapic),
        saved.msrs,
        _structure(kvm_vcpu_events, saved.events),
        saved.mp_state,
        saved.nested,
    )
    numbers = (saved.mp_state, *saved.msrs, *saved.msrs.values())
    if not all(0 <= number < 1 << 64 for number in numbers) or any(index >> 32 for index in saved.msrs):
        raise ValueError(f"vCPU {vcpu.index} has a register that is no 64-bit number")
    vcpu.set_cpuid2(cpuid_of(saved))
    return restore(vcpu, state)


def cpuid_of(saved: SavedVcpu) -> list[kvm_cpuid_entry2]:
    """What the guest was shown. ValueError for bytes that are no table."""
    size = ctypes.sizeof(kvm_cpuid_entry2)
    if len(saved.cpuid) % size or not saved.cpuid:
        raise ValueError("its CPUID is no table of entries")
    return [kvm_cpuid_entry2.from_buffer_copy(saved.cpuid, at) for at in range(0, len(saved.cpuid), size)]


def _structure(kind: type[S], data: bytes) -> S:
    if len(data) != ctypes.sizeof(kind):
        raise ValueError(f"its {kind.__name__} has {len(data)} bytes, not {ctypes.sizeof(kind)}")
    return kind.from_buffer_copy(data)
