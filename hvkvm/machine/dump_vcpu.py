"""A vCPU described in text: its thread, its exits, its registers, and what could wake it.

Why the last: a guest that stands still has mostly missed an interrupt, or its timer
was never armed. Then what is pending, in service and armed tells which.

Reads registers on the vCPU's own thread through its work queue, and right here when
that has ended, was not started, or is paused; one that does not answer within a moment is said to be
stuck rather than waited for. Any thread but a vCPU's or the I/O loop's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvkvm.abi.hv_synic import HV_SYNIC_SINT_RESET
from hvkvm.abi.tlfs import (
    HV_STIMER_COUNT,
    HV_X64_MSR_SINT0,
    HV_X64_MSR_SINT15,
    HV_X64_MSR_STIMER0_CONFIG,
    HV_X64_MSR_STIMER0_COUNT,
    HV_X64_MSR_TIME_REF_COUNT,
)
from hvkvm.abi.x86 import X86_EFLAGS_IF
from hvkvm.errors import HvkvmError, KvmIoctlError, Stopped
from hvkvm.hyperv import synic_text
from hvkvm.hyperv.usermode.clock import MSR_IA32_TSC
from hvkvm.kvm.exit_names import exit_name

if TYPE_CHECKING:
    from hvkvm.kvm.vcpu import Vcpu
    from hvkvm.runtime.vcpu_thread import VcpuThread

ANSWER_SECONDS = 1.0

MSR_IA32_TSC_DEADLINE = 0x6E0
# Offsets of the local APIC's registers; ISR and IRR have a bit a vector, 32 of them every 16 bytes.
_TPR, _ISR, _IRR, _LVT_TIMER, _TIMER_INITIAL, _TIMER_CURRENT = 0x80, 0x100, 0x200, 0x320, 0x380, 0x390
_TIMER_MODES = ("one-shot", "periodic", "TSC deadline", "reserved")

_MP_STATES = {0: "runnable", 1: "uninitialized", 2: "init received", 3: "halted", 4: "sipi received"}


def describe(thread: VcpuThread, seconds: float = ANSWER_SECONDS) -> list[str]:
    """A line for its state and exits, and some for what only its thread can tell, in so many seconds."""
    counts = ", ".join(
        f"{exit_name(reason)} {count}"
        for reason, count in sorted(thread.exit_counts.items(), key=lambda kv: -kv[1])
    )
    lines = [f"{thread.name}: {thread.state}; exits: {counts or 'none'}"]
    if recent := list(thread.last_exits):
        lines.append(f"  last exits: {' '.join(exit_name(reason) for reason in recent)}")
    try:
        lines += [f"  {line}" for line in _asked(thread, seconds)]
    except (HvkvmError, TimeoutError) as error:
        lines.append(f"  registers: no answer from its thread ({error})")
    return lines


def _asked(thread: VcpuThread, seconds: float) -> list[str]:
    """HvkvmError for a vCPU that is closed, TimeoutError."""
    if thread.quiescent:
        return _at_rest(thread, seconds)
    if not thread.join(0):
        try:
            return list(thread.call(_state, thread.vcpu, timeout=seconds))
        except Stopped:
            if not thread.join(seconds):
                raise
        except TimeoutError:
            if not thread.quiescent:  # it has come to rest, where it takes no work, since it was looked at
                raise
            return _at_rest(thread, seconds)
    return _state(thread.vcpu)  # its thread has ended or never began, and nobody else owns it


def _at_rest(thread: VcpuThread, seconds: float) -> list[str]:
    """Of one that is paused, and takes no work: who pauses it too may look, and does nothing else."""
    thread.request_pause()
    try:
        thread.wait_paused(seconds)
        return list(thread.call(_state, thread.vcpu, timeout=seconds))
    finally:
        thread.resume()


def _state(vcpu: Vcpu) -> list[str]:
    """Runs on the vCPU's thread while there is one, as all below."""
    return [_registers(vcpu), *_interrupts(vcpu), *_synthetic(vcpu)]


def _registers(vcpu: Vcpu) -> str:
    regs, sregs = vcpu.regs(), vcpu.sregs()
    state = _MP_STATES.get(vcpu.mp_state(), "unknown")
    names = ("rip", "rsp", "rflags", "rax", "rbx", "rcx", "rdx")
    general = " ".join(f"{name}={getattr(regs, name):#x}" for name in names)
    special = " ".join(f"{name}={getattr(sregs, name):#x}" for name in ("cr0", "cr2", "cr3", "cr4", "efer"))
    interrupts = "on" if regs.rflags & X86_EFLAGS_IF else "off"
    return f"{state}, interrupts {interrupts}, {general} cs={sregs.cs.selector:#x} {special}"


def _interrupts(vcpu: Vcpu) -> list[str]:
    """What waits in the local APIC, and its timer. Nothing for a VM without one in the kernel."""
    try:
        page = bytes(vcpu.lapic().regs)
    except KvmIoctlError:
        return []

    def word(offset: int) -> int:
        return int.from_bytes(page[offset : offset + 4], "little")

    def vectors(offset: int) -> str:
        found = [v for v in range(256) if word(offset + v // 32 * 16) >> v % 32 & 1]
        return " ".join(f"{v:#x}" for v in found) or "none"

    shadow = vcpu.vcpu_events().interrupt
    entry = word(_LVT_TIMER)
    mode = (entry >> 17) & 3
    timer = f"{_TIMER_MODES[mode]}, vector {entry & 0xFF:#x}{', masked' * (entry >> 16 & 1)}"
    if mode == _TIMER_MODES.index("TSC deadline"):
        msrs = vcpu.msrs((MSR_IA32_TSC_DEADLINE, MSR_IA32_TSC))
        timer += f", deadline {msrs[MSR_IA32_TSC_DEADLINE]:#x}, TSC {msrs[MSR_IA32_TSC]:#x}"
    else:
        timer += f", {word(_TIMER_CURRENT):#x} of {word(_TIMER_INITIAL):#x}"
    injected = f", {shadow.nr:#x} being injected" if shadow.injected else ""
    blocked = ", in an interrupt shadow" if shadow.shadow else ""
    waiting = f"interrupts pending {vectors(_IRR)}, in service {vectors(_ISR)}, tpr {word(_TPR):#x}"
    return [f"{waiting}{injected}{blocked}", f"APIC timer {timer}"]


def _synthetic(vcpu: Vcpu) -> list[str]:
    """SINTs and timers that KVM keeps, but for those as at power-on. The SynIC in user space has its own."""
    sints = range(HV_X64_MSR_SINT0, HV_X64_MSR_SINT15 + 1)
    configs = range(HV_X64_MSR_STIMER0_CONFIG, HV_X64_MSR_STIMER0_CONFIG + 2 * HV_STIMER_COUNT, 2)
    counts = range(HV_X64_MSR_STIMER0_COUNT, HV_X64_MSR_STIMER0_COUNT + 2 * HV_STIMER_COUNT, 2)
    found = [
        f"sint {number}: {synic_text.sint(value)}"
        for number, value in enumerate(_msrs(vcpu, *sints))
        if value not in (0, HV_SYNIC_SINT_RESET)  # 0 is that of a vCPU without a SynIC
    ]
    now, *timers = _msrs(vcpu, HV_X64_MSR_TIME_REF_COUNT, *configs, *counts) or (0,)
    pairs = zip(timers[:HV_STIMER_COUNT], timers[HV_STIMER_COUNT:], strict=True)
    return found + [
        f"synthetic timer {number}: {synic_text.stimer(config, count, now)}"
        for number, (config, count) in enumerate(pairs)
        if config
    ]


def _msrs(vcpu: Vcpu, *wanted: int) -> list[int]:
    """Their values, in that order; nothing where KVM does not have them."""
    try:
        msrs = vcpu.msrs(wanted)
    except KvmIoctlError:
        return []
    return [msrs[index] for index in wanted]
