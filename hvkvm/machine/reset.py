"""Power-on state of the vCPUs and interrupt chips, recorded once and put back at every reset.

KVM knows no machine reset: the VMM must write every register back. What KVM
gives a new vCPU is by definition the power-on state, so it is read before the
first KVM_RUN and restored, rather than copied out of a manual.

Owner: the thread that builds the machine records; restoring needs every vCPU
paused (outside KVM_RUN, pending exits completed).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hvkvm.abi.kvm import (
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
)
from hvkvm.kvm.system import Kvm
from hvkvm.kvm.vcpu import Vcpu
from hvkvm.kvm.vm import Vm

_IRQCHIPS = (KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC)

ARCHITECTURAL_MSRS = (
    0x174,  # IA32_SYSENTER_CS
    0x175,  # IA32_SYSENTER_ESP
    0x176,  # IA32_SYSENTER_EIP
    0x1A0,  # IA32_MISC_ENABLE
    0x277,  # IA32_PAT
    0x6E0,  # IA32_TSC_DEADLINE
    0xC0000081,  # STAR
    0xC0000082,  # LSTAR
    0xC0000083,  # CSTAR
    0xC0000084,  # SFMASK
    0xC0000102,  # KERNEL_GS_BASE
    0xC0000103,  # TSC_AUX
    0x11,  # MSR_KVM_WALL_CLOCK
    0x12,  # MSR_KVM_SYSTEM_TIME
    0x4B564D00,  # MSR_KVM_WALL_CLOCK_NEW
    0x4B564D01,  # MSR_KVM_SYSTEM_TIME_NEW
    0x4B564D02,  # MSR_KVM_ASYNC_PF_EN
    0x4B564D03,  # MSR_KVM_STEAL_TIME
    0x4B564D04,  # MSR_KVM_PV_EOI_EN
)
"""What a guest sets that outlives a jump to the entry point; the Hyper-V ones are `Partition`'s."""


class VcpuPowerOn:
    """One vCPU's state before it ever ran."""

    def __init__(self, vcpu: Vcpu, supported: frozenset[int]) -> None:
        self._vcpu = vcpu
        self._sregs = vcpu.sregs()
        self._regs = vcpu.regs()
        self._fpu = vcpu.fpu()
        self._lapic = vcpu.lapic()
        self._events = vcpu.vcpu_events()
        self._mp_state = vcpu.mp_state()
        self._msrs = vcpu.msrs([index for index in ARCHITECTURAL_MSRS if index in supported])

    def restore(self) -> None:
        """Put it back: sregs before the LAPIC (APIC base), MSRs after it (TSC deadline), mp_state last."""
        vcpu = self._vcpu
        vcpu.set_sregs(self._sregs)
        vcpu.set_regs(self._regs)
        vcpu.set_fpu(self._fpu)
        vcpu.set_lapic(self._lapic)
        vcpu.set_msrs(self._msrs)
        vcpu.set_vcpu_events(self._events)
        vcpu.set_mp_state(self._mp_state)


class PowerOnState:
    """The whole machine's power-on state."""

    def __init__(self, kvm: Kvm, vm: Vm, vcpus: Sequence[Vcpu]) -> None:
        self._vm = vm
        supported = frozenset(kvm.msr_index_list())
        self._vcpus = [VcpuPowerOn(vcpu, supported) for vcpu in vcpus]
        self._chips: list[Any] = [vm.get_irqchip(chip) for chip in _IRQCHIPS]
        self._pit = vm.get_pit2()

    def restore(self) -> None:
        """Put everything back. Every vCPU must be paused."""
        for chip in self._chips:
            self._vm.set_irqchip(chip)
        self._vm.set_pit2(self._pit)
        for vcpu in self._vcpus:
            vcpu.restore()
