"""Which exit goes where: the table that every vCPU thread dispatches on.

Handlers run on the exiting vCPU's own thread, outside KVM_RUN, and must not
block. Guest-triggered endings go through `Machine.finish`, never as exceptions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hvkvm.abi.kvm import (
    KVM_EXIT_FAIL_ENTRY,
    KVM_EXIT_HYPERV,
    KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_IO,
    KVM_EXIT_MMIO,
    KVM_EXIT_SHUTDOWN,
    KVM_EXIT_SYSTEM_EVENT,
    KVM_EXIT_X86_RDMSR,
    KVM_EXIT_X86_WRMSR,
    KVM_SYSTEM_EVENT_CRASH,
    KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN,
)
from hvkvm.hyperv.crash import crash_text
from hvkvm.hyperv.partition import Partition
from hvkvm.kvm.vcpu import Vcpu
from hvkvm.machine.outcome import EXIT_MACHINE_FAULT, Ending

if TYPE_CHECKING:
    from hvkvm.hyperv.usermode.interface import UserHyperv
    from hvkvm.machine.machine import Machine

Handlers = dict[int, Callable[[Vcpu], None]]


def handlers(machine: Machine) -> Handlers:
    """The exits that every machine has."""

    def shutdown(vcpu: Vcpu) -> None:
        detail = f"vcpu{vcpu.index} at rip={vcpu.regs().rip:#x}"
        machine.finish(Ending.TRIPLE_FAULT, EXIT_MACHINE_FAULT, detail)

    def broken(vcpu: Vcpu) -> None:
        from hvkvm.kvm.exits import decode

        detail = f"vcpu{vcpu.index}: {decode(vcpu.run)} at rip={vcpu.regs().rip:#x}"
        machine.finish(Ending.KVM_ERROR, EXIT_MACHINE_FAULT, detail)

    def system_event(vcpu: Vcpu) -> None:
        kind = vcpu.run.system_event.type
        if kind == KVM_SYSTEM_EVENT_CRASH:
            machine.guest_panicked(crash_text(vcpu, machine.memory))
        elif kind == KVM_SYSTEM_EVENT_RESET:
            machine.request_reset("the guest wrote HV_X64_MSR_RESET")
        elif kind == KVM_SYSTEM_EVENT_SHUTDOWN:
            machine.finish(Ending.POWERED_OFF, 0)
        else:
            broken(vcpu)

    return {
        KVM_EXIT_IO: machine.board.ports.handle_io,
        KVM_EXIT_MMIO: machine.board.mmio.handle_mmio,
        KVM_EXIT_SHUTDOWN: shutdown,
        KVM_EXIT_INTERNAL_ERROR: broken,
        KVM_EXIT_FAIL_ENTRY: broken,
        KVM_EXIT_SYSTEM_EVENT: system_event,
    }


def add_hyperv_handlers(table: Handlers, partition: Partition) -> None:
    """The exits that only a machine with enlightenments has."""
    table[KVM_EXIT_HYPERV] = partition.handle_hyperv_exit


def add_user_hyperv_handlers(table: Handlers, user: UserHyperv) -> None:
    """The exits of a machine whose Hyper-V interface is in user space."""
    table[KVM_EXIT_X86_RDMSR] = user.handle_rdmsr
    table[KVM_EXIT_X86_WRMSR] = user.handle_wrmsr
