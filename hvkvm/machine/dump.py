"""Who waits for what: a machine described in text, for SIGQUIT, time-outs and `hvkvm ctl`.

What a thread of the host's waits for is told by where it is in our code: a worker in a read
of a disk, a save in a write, the I/O loop in a callback that does not end.

Any thread but a vCPU's or the I/O loop's: `dump_vcpu` asks the vCPUs' threads.
"""

from __future__ import annotations

import threading
from time import monotonic
from typing import TYPE_CHECKING

from hvkvm.abi.kvm import KVM_EXIT_SHUTDOWN
from hvkvm.boot.linux import resets_by_triple_fault
from hvkvm.machine import dump_vcpu, inspect, kernel_log
from hvkvm.machine.exits import FATAL
from hvkvm.machine.lifecycle import Phase
from hvkvm.observe import bus_text, tree
from hvkvm.runtime.where import where

if TYPE_CHECKING:
    from hvkvm.machine.lifecycle import Lifecycle
    from hvkvm.machine.parts import Parts

CONSOLE_LINES = 12

PATIENCE_SECONDS = 5.0
"""How long vCPUs that do not answer are waited for, all together: who asked waits for the rest, too."""
LEAST_SECONDS = 0.05
"""What each of the others gets then, so that those that do answer are heard."""


def describe(parts: Parts) -> str:
    """Many lines: vCPUs and their exits, what the SynIC, the bus, PCI and the wires hold, and the last of
    console and kernel log."""
    lines = []
    platform, lifecycle, partition = parts.platform, parts.lifecycle, parts.hyperv.partition
    elapsed = 0.0 if lifecycle.started_at is None else monotonic() - lifecycle.started_at
    started = platform.config.kernel or f"firmware {platform.config.firmware}"
    lines.append(f"hvkvm: {started} after {elapsed:.1f} s, {lifecycle.resets} resets, {_rest(lifecycle)}")
    if (path := parts.saver.path) is not None:
        lines.append(f"it is being saved to {path}")
    patience_ends = monotonic() + PATIENCE_SECONDS
    for thread in platform.threads:
        left = patience_ends - monotonic()
        lines += dump_vcpu.describe(thread, min(dump_vcpu.ANSWER_SECONDS, max(LEAST_SECONDS, left)))
    if partition is not None:
        lines += bus_text.synic_lines(partition.snapshot())
    if parts.bus is not None:
        lines += bus_text.bus_lines(parts.bus.host.snapshot())
        lines += bus_text.device_lines(inspect.devices(parts.bus))
    lines += tree.lines(inspect.beyond_the_bus(parts))
    lines += _serial_lines(parts)
    lines.append(f"i/o loop: {platform.io.state}")
    lines += _thread_lines()
    tail = parts.board.tail.lines(CONSOLE_LINES)
    lines.append("console: no output yet" if not tail else "console, last lines:")
    lines += [f"  | {line}" for line in tail]
    if log := kernel_log.last_lines(platform, CONSOLE_LINES, tail):
        lines.append("kernel log, last lines:")
        lines += [f"  | {line}" for line in log]
    return "\n".join(lines)


def _rest(lifecycle: Lifecycle) -> str:
    """How far it is: whose rest it waits for, and for how long."""
    phase, part = lifecycle.phase, lifecycle.stopping
    if lifecycle.outcome is not None:
        return f"{'ended' if phase is Phase.ENDED else 'ending'}: {lifecycle.outcome}"
    if phase in (Phase.BUILT, Phase.RUNNING):
        return str(phase.value)
    whose = f", now the {part.name}" if part is not None and phase is Phase.STOPPING else ""
    return f"{phase.value}{whose}, for {monotonic() - lifecycle.phase_since:.1f} s"


def describe_fatal(parts: Parts) -> str:
    """The vCPUs that KVM runs no more, by a triple fault or an error of its own; "" where there are none.

    Nor is there anything to look for behind a triple fault that Linux was told to reset by.

    The run's end is told while the thread that met it still handles that exit: its own end is waited for.
    """
    from hvkvm.kvm.kind import probe

    if resets_by_triple_fault(parts.platform.config.append):
        return ""
    fatal = FATAL - {KVM_EXIT_SHUTDOWN} if probe().forgets_triple_faults else FATAL
    found: list[str] = []
    for thread in parts.platform.threads:
        if not fatal.isdisjoint(thread.last_exits[-1:]):
            thread.join(dump_vcpu.ANSWER_SECONDS)
            found += dump_vcpu.describe(thread)
    return "\n".join(found)


def _serial_lines(parts: Parts) -> list[str]:
    """The serial ports in which something waits."""
    ports = enumerate((parts.board.serial, *parts.board.command_ports), 1)
    return [f"serial port {number}: {text}" for number, port in ports if (text := port.described())]


def _thread_lines() -> list[str]:
    """The process's threads but for vCPUs, which have lines of their own, and where each is."""
    me = threading.current_thread()
    found = []
    for thread in threading.enumerate():
        if thread is me or thread.name.startswith("vcpu"):
            continue
        if place := where(thread):
            found.append(f"thread {thread.name}: in {place}")
    return found
