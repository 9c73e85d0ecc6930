"""Who waits for what: a machine described in text, for SIGQUIT, time-outs and `hvkvm ctl`.

Any thread but a vCPU's or the I/O loop's: `dump_vcpu` asks the vCPUs' threads.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

from hvkvm.machine import dump_vcpu, inspect, kernel_log
from hvkvm.observe import bus_text, tree

if TYPE_CHECKING:
    from hvkvm.machine.parts import Parts

CONSOLE_LINES = 12


def describe(parts: Parts) -> str:
    """Many lines: vCPUs and their exits, what the SynIC, the bus, PCI and the wires hold, and the last of
    console and kernel log."""
    lines = []
    platform, lifecycle, partition = parts.platform, parts.lifecycle, parts.hyperv.partition
    elapsed = 0.0 if lifecycle.started_at is None else monotonic() - lifecycle.started_at
    started = platform.config.kernel or f"firmware {platform.config.firmware}"
    lines.append(f"hvkvm: {started} after {elapsed:.1f} s, {lifecycle.resets} resets")
    for thread in platform.threads:
        lines += dump_vcpu.describe(thread)
    if partition is not None:
        lines += bus_text.synic_lines(partition.snapshot())
    if parts.bus is not None:
        lines += bus_text.bus_lines(parts.bus.host.snapshot())
        lines += bus_text.device_lines(inspect.devices(parts.bus))
    lines += tree.lines(inspect.beyond_the_bus(parts))
    lines.append(f"i/o loop: {platform.io.state}")
    tail = parts.board.tail.lines(CONSOLE_LINES)
    lines.append("console: no output yet" if not tail else "console, last lines:")
    lines += [f"  | {line}" for line in tail]
    if log := kernel_log.last_lines(platform, CONSOLE_LINES, tail):
        lines.append("kernel log, last lines:")
        lines += [f"  | {line}" for line in log]
    return "\n".join(lines)
