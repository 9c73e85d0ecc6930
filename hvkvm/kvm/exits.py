"""Exits as typed values, for diagnosis, traces and slow paths.

Hot handlers read `vcpu.run` directly; `decode` copies the same fields into a
frozen dataclass that outlives the next KVM_RUN. An exit that is not known here
is an `UnknownExit`, never an error. Call on the vCPU's own thread, before it enters again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvkvm.abi import kvm
from hvkvm.kvm.exit_names import exit_name

if TYPE_CHECKING:
    from hvkvm.abi.kvm_structs import kvm_run


_INTERNAL_ERRORS = {
    getattr(kvm, name): name
    for name in (
        "KVM_INTERNAL_ERROR_EMULATION",
        "KVM_INTERNAL_ERROR_SIMUL_EX",
        "KVM_INTERNAL_ERROR_DELIVERY_EV",
        "KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON",
    )
}
_ENTRY_FAILURES = {
    # VMX: bit 31, and the basic exit reason (SDM volume 3, 27.8 and appendix C).
    0x80000021: "invalid guest state",
    0x80000022: "an MSR that cannot be loaded",
    0x80000029: "a machine check",
    # SVM: VMEXIT_INVALID (APM volume 2, appendix C), of which old kernels give 32 bits.
    0xFFFFFFFF: "invalid guest state",
    0xFFFFFFFFFFFFFFFF: "invalid guest state",
}


@dataclass(frozen=True, slots=True)
class Exit:
    """Base of all decoded exits; `reason` is KVM_EXIT_*."""

    reason: int

    @property
    def name(self) -> str:
        return exit_name(self.reason)


@dataclass(frozen=True, slots=True)
class UnknownExit(Exit):
    """KVM_EXIT_UNKNOWN, or a reason this build has no decoder for."""

    hardware_exit_reason: int


@dataclass(frozen=True, slots=True)
class PlainExit(Exit):
    """An exit that carries nothing."""


class HltExit(PlainExit):
    """HLT without an in-kernel LAPIC."""

    __slots__ = ()


class ShutdownExit(PlainExit):
    """Triple fault."""

    __slots__ = ()


class IntrExit(PlainExit):
    """KVM_RUN was interrupted."""

    __slots__ = ()


class IrqWindowOpenExit(PlainExit):
    """The guest can take an interrupt now."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class ExceptionExit(Exit):
    exception: int
    error_code: int


@dataclass(frozen=True, slots=True)
class IoExit(Exit):
    """`data` holds count*size bytes for OUT (empty where the caller gave no map)."""

    is_write: bool
    port: int
    size: int
    count: int
    data: bytes


@dataclass(frozen=True, slots=True)
class MmioExit(Exit):
    """`data` holds `len` bytes for a write."""

    is_write: bool
    phys_addr: int
    len: int
    data: bytes


@dataclass(frozen=True, slots=True)
class HypercallExit(Exit):
    nr: int
    args: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DebugExit(Exit):
    exception: int
    pc: int
    dr6: int
    dr7: int


@dataclass(frozen=True, slots=True)
class TprAccessExit(Exit):
    rip: int
    is_write: bool


@dataclass(frozen=True, slots=True)
class FailEntryExit(Exit):
    """The CPU refused to enter the guest: bad vCPU state, or a KVM that runs in an odd place."""

    hardware_entry_failure_reason: int
    cpu: int

    def __str__(self) -> str:
        number = self.hardware_entry_failure_reason
        why = _ENTRY_FAILURES.get(number)
        reason = f"hardware reason {number:#x}{f' ({why})' if why else ''}"
        return f"{self.name}, {reason}, on the host's CPU {self.cpu}"


@dataclass(frozen=True, slots=True)
class InternalErrorExit(Exit):
    """KVM gave up; for KVM_INTERNAL_ERROR_EMULATION `insn` has the bytes it could not emulate, if told."""

    suberror: int
    data: tuple[int, ...]
    insn: bytes

    def __str__(self) -> str:
        words = [self.name, _INTERNAL_ERRORS.get(self.suberror, f"suberror {self.suberror}")]
        if self.insn:
            words.append(f"instruction {self.insn.hex(' ')}")
        elif self.data:
            words.append(f"data {' '.join(f'{word:#x}' for word in self.data)}")
        return ", ".join(words)


@dataclass(frozen=True, slots=True)
class SystemEventExit(Exit):
    """`type` is KVM_SYSTEM_EVENT_*."""

    type: int
    data: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class IoapicEoiExit(Exit):
    vector: int


@dataclass(frozen=True, slots=True)
class HypervSynicExit(Exit):
    """A guest wrote `msr`; the three values are those in force now (S57)."""

    msr: int
    control: int
    evt_page: int
    msg_page: int


@dataclass(frozen=True, slots=True)
class HypervHcallExit(Exit):
    """For HvSignalEvent `params[0]` is the event itself since Linux 5.13, even in the slow form (S52)."""

    input: int
    params: tuple[int, int]


@dataclass(frozen=True, slots=True)
class HypervSyndbgExit(Exit):
    msr: int
    control: int
    status: int
    send_page: int
    recv_page: int
    pending_page: int


@dataclass(frozen=True, slots=True)
class HypervUnknownExit(Exit):
    """KVM_EXIT_HYPERV of a type newer than this build."""

    type: int


@dataclass(frozen=True, slots=True)
class RdmsrExit(Exit):
    """`msr_reason` is one KVM_MSR_EXIT_REASON_*."""

    index: int
    msr_reason: int


@dataclass(frozen=True, slots=True)
class WrmsrExit(Exit):
    """`msr_reason` is one KVM_MSR_EXIT_REASON_*."""

    index: int
    data: int
    msr_reason: int


@dataclass(frozen=True, slots=True)
class NotifyExit(Exit):
    flags: int


@dataclass(frozen=True, slots=True)
class MemoryFaultExit(Exit):
    """KVM could not resolve a guest access (Linux 6.8 and later); gpa and size in bytes."""

    flags: int
    gpa: int
    size: int


def _io(run: kvm_run, data: memoryview | None) -> Exit:
    io = run.io
    is_write = io.direction == kvm.KVM_EXIT_IO_OUT
    start, size = io.data_offset, io.count * io.size
    payload = bytes(data[start : start + size]) if is_write and data is not None else b""
    return IoExit(run.exit_reason, is_write, io.port, io.size, io.count, payload)


def _mmio(run: kvm_run, data: memoryview | None) -> Exit:
    mmio = run.mmio
    payload = bytes(mmio.data[: min(mmio.len, 8)]) if mmio.is_write else b""
    return MmioExit(run.exit_reason, bool(mmio.is_write), mmio.phys_addr, mmio.len, payload)


def _internal_error(run: kvm_run, data: memoryview | None) -> Exit:
    internal = run.internal
    words = tuple(internal.data[: min(internal.ndata, 16)])
    insn = b""
    # insn_size and insn_bytes are the second and third u64 of `internal.data`: there if ndata says so.
    if internal.suberror == kvm.KVM_INTERNAL_ERROR_EMULATION and internal.ndata >= 3:
        failure = run.emulation_failure
        if failure.flags & kvm.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES:
            insn = bytes(failure.insn_bytes[: min(failure.insn_size, 15)])
    return InternalErrorExit(run.exit_reason, internal.suberror, words, insn)


def _system_event(run: kvm_run, data: memoryview | None) -> Exit:
    event = run.system_event
    return SystemEventExit(run.exit_reason, event.type, tuple(event.data[: min(event.ndata, 16)]))


def _hyperv(run: kvm_run, data: memoryview | None) -> Exit:
    reason, kind, u = run.exit_reason, run.hyperv.type, run.hyperv.u
    if kind == kvm.KVM_EXIT_HYPERV_SYNIC:
        s = u.synic
        return HypervSynicExit(reason, s.msr, s.control, s.evt_page, s.msg_page)
    if kind == kvm.KVM_EXIT_HYPERV_HCALL:
        return HypervHcallExit(reason, u.hcall.input, tuple(u.hcall.params))
    if kind == kvm.KVM_EXIT_HYPERV_SYNDBG:
        d = u.syndbg
        return HypervSyndbgExit(reason, d.msr, d.control, d.status, d.send_page, d.recv_page, d.pending_page)
    return HypervUnknownExit(reason, kind)


def _debug(run: kvm_run, data: memoryview | None) -> Exit:
    arch = run.debug.arch
    return DebugExit(run.exit_reason, arch.exception, arch.pc, arch.dr6, arch.dr7)


_DECODERS: dict[int, Callable[[kvm_run, memoryview | None], Exit]] = {
    kvm.KVM_EXIT_EXCEPTION: lambda r, _: ExceptionExit(r.exit_reason, r.ex.exception, r.ex.error_code),
    kvm.KVM_EXIT_IO: _io,
    kvm.KVM_EXIT_HYPERCALL: lambda r, _: HypercallExit(
        r.exit_reason, r.hypercall.nr, tuple(r.hypercall.args)
    ),
    kvm.KVM_EXIT_DEBUG: _debug,
    kvm.KVM_EXIT_HLT: lambda r, _: HltExit(r.exit_reason),
    kvm.KVM_EXIT_MMIO: _mmio,
    kvm.KVM_EXIT_IRQ_WINDOW_OPEN: lambda r, _: IrqWindowOpenExit(r.exit_reason),
    kvm.KVM_EXIT_SHUTDOWN: lambda r, _: ShutdownExit(r.exit_reason),
    kvm.KVM_EXIT_FAIL_ENTRY: lambda r, _: FailEntryExit(
        r.exit_reason, r.fail_entry.hardware_entry_failure_reason, r.fail_entry.cpu
    ),
    kvm.KVM_EXIT_INTR: lambda r, _: IntrExit(r.exit_reason),
    kvm.KVM_EXIT_SET_TPR: lambda r, _: PlainExit(r.exit_reason),
    kvm.KVM_EXIT_TPR_ACCESS: lambda r, _: TprAccessExit(
        r.exit_reason, r.tpr_access.rip, bool(r.tpr_access.is_write)
    ),
    kvm.KVM_EXIT_INTERNAL_ERROR: _internal_error,
    kvm.KVM_EXIT_SYSTEM_EVENT: _system_event,
    kvm.KVM_EXIT_IOAPIC_EOI: lambda r, _: IoapicEoiExit(r.exit_reason, r.eoi.vector),
    kvm.KVM_EXIT_HYPERV: _hyperv,
    kvm.KVM_EXIT_X86_RDMSR: lambda r, _: RdmsrExit(r.exit_reason, r.msr.index, r.msr.reason),
    kvm.KVM_EXIT_X86_WRMSR: lambda r, _: WrmsrExit(r.exit_reason, r.msr.index, r.msr.data, r.msr.reason),
    kvm.KVM_EXIT_DIRTY_RING_FULL: lambda r, _: PlainExit(r.exit_reason),
    kvm.KVM_EXIT_X86_BUS_LOCK: lambda r, _: PlainExit(r.exit_reason),
    kvm.KVM_EXIT_NOTIFY: lambda r, _: NotifyExit(r.exit_reason, r.notify.flags),
    kvm.KVM_EXIT_MEMORY_FAULT: lambda r, _: MemoryFaultExit(
        r.exit_reason, r.memory_fault.flags, r.memory_fault.gpa, r.memory_fault.size
    ),
}


def decode(run: kvm_run, data: memoryview | None = None) -> Exit:
    """The exit in `run` as a value. `data` (`vcpu.data`) is needed for the bytes of a port write."""
    decoder = _DECODERS.get(run.exit_reason)
    if decoder is None:
        return UnknownExit(run.exit_reason, run.hw.hardware_exit_reason)
    return decoder(run, data)
