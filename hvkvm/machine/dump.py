"""Who waits for what: a machine described in text, for SIGQUIT, time-outs and `hvkvm ctl`.

Reads registers on each vCPU's own thread through its work queue; a vCPU that
does not answer within a moment is said to be stuck rather than waited for.
Any thread but a vCPU's or the I/O loop's.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

from hvkvm.errors import HvkvmError
from hvkvm.kvm.exits import exit_name
from hvkvm.machine import inspect
from hvkvm.observe import bus_text

if TYPE_CHECKING:
    from hvkvm.kvm.vcpu import Vcpu
    from hvkvm.machine.machine import Machine
    from hvkvm.runtime.vcpu_thread import VcpuThread

ANSWER_SECONDS = 1.0
CONSOLE_LINES = 12

_MP_STATES = {0: "runnable", 1: "uninitialized", 2: "init received", 3: "halted", 4: "sipi received"}


def describe(machine: Machine) -> str:
    """Several lines: each vCPU's state, registers and exits, the SynIC's queues, the last console lines."""
    lines = []
    elapsed = 0.0 if machine.started_at is None else monotonic() - machine.started_at
    lines.append(f"hvkvm: {machine.config.kernel} after {elapsed:.1f} s, {machine.resets} resets")
    for thread in machine.threads:
        lines += _describe_vcpu(thread)
    if machine.partition is not None:
        lines += [f"synic: {line}" for line in machine.partition.describe()]
    if machine.bus is not None:
        lines += bus_text.bus_lines(machine.bus.host.snapshot())
        lines += bus_text.device_lines(inspect.devices(machine))
    lines.append(f"i/o loop: {machine.io.state}")
    tail = machine.board.tail.lines(CONSOLE_LINES)
    lines.append("console: no output yet" if not tail else "console, last lines:")
    lines += [f"  | {line}" for line in tail]
    return "\n".join(lines)


def _describe_vcpu(thread: VcpuThread) -> list[str]:
    counts = ", ".join(
        f"{exit_name(reason)} {count}"
        for reason, count in sorted(thread.exit_counts.items(), key=lambda kv: -kv[1])
    )
    lines = [f"{thread.name}: {thread.state}; exits: {counts or 'none'}"]
    if recent := list(thread.last_exits):
        lines.append(f"  last exits: {' '.join(exit_name(reason) for reason in recent)}")
    try:
        lines.append("  " + thread.call(_registers, thread.vcpu, timeout=ANSWER_SECONDS))
    except (HvkvmError, TimeoutError) as error:
        lines.append(f"  registers: no answer from its thread ({error})")
    return lines


def _registers(vcpu: Vcpu) -> str:
    """One line of registers; runs on the vCPU's thread."""
    regs, sregs = vcpu.regs(), vcpu.sregs()
    state = _MP_STATES.get(vcpu.mp_state(), "unknown")
    names = ("rip", "rsp", "rflags", "rax", "rbx", "rcx", "rdx")
    general = " ".join(f"{name}={getattr(regs, name):#x}" for name in names)
    special = " ".join(f"{name}={getattr(sregs, name):#x}" for name in ("cr0", "cr2", "cr3", "cr4", "efer"))
    return f"{state}, {general} cs={sregs.cs.selector:#x} {special}"
