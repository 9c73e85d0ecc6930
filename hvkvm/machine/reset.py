"""Power-on state of the vCPUs and interrupt chips, recorded once and put back at every reset.

KVM knows no machine reset: the VMM must write every register back. What KVM
gives a new vCPU is by definition the power-on state, so it is read before the
first KVM_RUN and restored (`kvm.vcpu_state`), rather than copied out of a manual.
kvmclock and the TSC count on from the making of the VM.

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
from hvkvm.events import NULL_OBSERVER, Observer, Warned
from hvkvm.kvm.system import Kvm
from hvkvm.kvm.vcpu import Vcpu
from hvkvm.kvm.vcpu_state import begin_tsc, capture, restore, state_msrs
from hvkvm.kvm.vm import Vm

_IRQCHIPS = (KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC)


class PowerOnState:
    """The whole machine's power-on state. Raises KvmIoctlError."""

    def __init__(
        self, kvm: Kvm, vm: Vm, vcpus: Sequence[Vcpu], *, observer: Observer = NULL_OBSERVER
    ) -> None:
        self._vm = vm
        self._observer = observer
        msrs = state_msrs(kvm.msr_index_list())
        self._vcpus = []
        for vcpu in vcpus:
            state = capture(vcpu, msrs)
            self._vcpus.append((vcpu, state))
            msrs = list(state.msrs)  # what one vCPU does not let us read, none does
        self._chips: list[Any] = [vm.get_irqchip(chip) for chip in _IRQCHIPS]
        self._pit = vm.get_pit2()

    def restore(self) -> None:
        """Put everything back. Every vCPU must be paused. Raises KvmIoctlError."""
        # The timer before the chips: one that runs still may raise its line until it has stopped.
        self._vm.set_pit2(self._pit)
        for chip in self._chips:
            self._vm.set_irqchip(chip)
        for vcpu, state in self._vcpus:
            begin_tsc(vcpu)
            for index in restore(vcpu, state):
                text = f"vcpu{vcpu.index}: KVM does not put MSR {index:#x} back at a reset"
                self._observer.event(Warned("reset", text))
