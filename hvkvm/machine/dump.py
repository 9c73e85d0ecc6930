"""Who waits for what: a machine described in text, for SIGQUIT, time-outs and `hvkvm ctl`.

Any thread but a vCPU's or the I/O loop's: `dump_vcpu` asks the vCPUs' threads.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

from hvkvm.machine import dump_vcpu, inspect
from hvkvm.observe import bus_text

if TYPE_CHECKING:
    from hvkvm.machine.machine import Machine

CONSOLE_LINES = 12


def describe(machine: Machine) -> str:
    """Several lines: each vCPU's state, registers and exits, the SynIC's queues, the last console lines."""
    lines = []
    elapsed = 0.0 if machine.started_at is None else monotonic() - machine.started_at
    lines.append(f"hvkvm: {machine.config.kernel} after {elapsed:.1f} s, {machine.resets} resets")
    for thread in machine.threads:
        lines += dump_vcpu.describe(thread)
    if machine.partition is not None:
        lines += bus_text.synic_lines(machine.partition.snapshot())
    if machine.bus is not None:
        lines += bus_text.bus_lines(machine.bus.host.snapshot())
        lines += bus_text.device_lines(inspect.devices(machine))
    lines.append(f"i/o loop: {machine.io.state}")
    tail = machine.board.tail.lines(CONSOLE_LINES)
    lines.append("console: no output yet" if not tail else "console, last lines:")
    lines += [f"  | {line}" for line in tail]
    return "\n".join(lines)
