"""Which exit goes where: the table that every vCPU thread dispatches on.

Handlers run on the exiting vCPU's own thread, outside KVM_RUN, and must not
block. Guest-triggered endings go through `Lifecycle.finish`, never as exceptions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hvkvm.abi.kvm import (
    KVM_EXIT_FAIL_ENTRY,
    KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_IO,
    KVM_EXIT_MMIO,
    KVM_EXIT_SHUTDOWN,
    KVM_EXIT_SYSTEM_EVENT,
    KVM_INTERNAL_ERROR_EMULATION,
    KVM_SYSTEM_EVENT_CRASH,
    KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN,
)
from hvkvm.errors import KvmIoctlError
from hvkvm.hyperv.crash import crash_text
from hvkvm.kvm.vcpu import Vcpu
from hvkvm.machine.outcome import EXIT_MACHINE_FAULT, Ending

if TYPE_CHECKING:
    from hvkvm.machine.board import Board
    from hvkvm.machine.lifecycle import Lifecycle
    from hvkvm.memory.guest import GuestMemory

FATAL = frozenset({KVM_EXIT_SHUTDOWN, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_FAIL_ENTRY})
"""Exits with which a vCPU runs no more."""

Handlers = dict[int, Callable[[Vcpu], None]]


def handlers(board: Board, lifecycle: Lifecycle, memory: GuestMemory, cmdline: str) -> Handlers:
    """The exits that every machine has; the Hyper-V interface brings its own. `cmdline` is the guest's."""

    def shutdown(vcpu: Vcpu) -> None:
        from hvkvm.boot.linux import resets_by_triple_fault
        from hvkvm.kvm.kind import probe

        if probe().forgets_triple_faults:
            detail = f"vcpu{vcpu.index}; where is not known: on SVM KVM puts a vCPU back to INIT then"
        else:
            detail = f"vcpu{vcpu.index} at rip={vcpu.regs().rip:#x}"
        if given := resets_by_triple_fault(cmdline):
            detail += f"; {given} has Linux reset so: leave it out, or use reboot=acpi"
        lifecycle.finish(Ending.TRIPLE_FAULT, EXIT_MACHINE_FAULT, detail)

    def broken(vcpu: Vcpu) -> None:
        from hvkvm.kvm.exits import InternalErrorExit, decode
        from hvkvm.kvm.kind import probe, why_emulation_failed

        what = decode(vcpu.run)
        detail = f"vcpu{vcpu.index}: {what} at rip={vcpu.regs().rip:#x}"
        if isinstance(what, InternalErrorExit) and what.suberror == KVM_INTERNAL_ERROR_EMULATION:
            gpa = _code_at(vcpu)
            if gpa is not None and not memory.space.backs(gpa):
                detail += f"; gpa {gpa:#x} has no memory, and so no code"
            else:
                detail += why_emulation_failed(probe())
        lifecycle.finish(Ending.KVM_ERROR, EXIT_MACHINE_FAULT, detail)

    def system_event(vcpu: Vcpu) -> None:
        kind = vcpu.run.system_event.type
        if kind == KVM_SYSTEM_EVENT_CRASH:
            lifecycle.panicked(crash_text(vcpu, memory))
        elif kind == KVM_SYSTEM_EVENT_RESET:
            lifecycle.request_reset("the guest wrote HV_X64_MSR_RESET")
        elif kind == KVM_SYSTEM_EVENT_SHUTDOWN:
            lifecycle.finish(Ending.POWERED_OFF, 0)
        else:
            broken(vcpu)

    return {
        KVM_EXIT_IO: board.ports.handle_io,
        KVM_EXIT_MMIO: board.mmio.handle_mmio,
        KVM_EXIT_SHUTDOWN: shutdown,
        KVM_EXIT_INTERNAL_ERROR: broken,
        KVM_EXIT_FAIL_ENTRY: broken,
        KVM_EXIT_SYSTEM_EVENT: system_event,
    }


def _code_at(vcpu: Vcpu) -> int | None:
    """The guest physical address of its next instruction; None where that cannot be told."""
    try:
        return vcpu.translate(vcpu.sregs().cs.base + vcpu.regs().rip)
    except KvmIoctlError:
        return None
