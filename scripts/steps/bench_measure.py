"""The measurements themselves: boots, round trips and port exits, VMM by VMM, run by run.

Called by `scripts/bench`. Runs alternate between the VMMs (A B A B), so that a
load that comes and goes meets all of them; figures are medians.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

from steps.bench_guest import DONE, Batch, image, parse
from steps.bench_vmm import HVKVM, HVKVM_USER, Guest, Memory, Running
from steps.distribution import StepError

FIRST_LINE = "hvkvm: init"
BOOT_DEADLINE = 120.0
GUEST_DEADLINE = 240.0
PEER = "qemu-q35"
"""QEMU's machine for the round trips; hyperv-testdev wants an ISA bus."""

COUNTS = {"port": 4000, "message": 400, "event": 400, "ipi": 1000, "hypercall": 1000}
"""Operations a batch."""


class Boot(NamedTuple):
    """Seconds from process start to the guest's first init line, memory then, the guest's own uptime."""

    seconds: float
    memory: Memory
    uptime: float


class Trips(NamedTuple):
    """Nanoseconds an operation (median of the batches), refused requests, exits an operation."""

    nanoseconds: float
    best: float
    refused: float
    kvm_exits: float | None
    vmm_exits: float | None


def boot_once(vmm: str, guest: Guest) -> Boot:
    """Boot `guest` once, up to its init's first line. StepError when that never comes."""
    with Running(vmm, guest, deadline=BOOT_DEADLINE) as running:
        said: list[str] = []
        for seconds, line in running.lines():
            said.append(line)
            if line.startswith(FIRST_LINE):
                return Boot(seconds, running.memory(), float(line.split()[-1]))
        problem = running.stop().strip() or "\n".join(said[-5:])
    raise StepError(f"{vmm}: the guest never said {FIRST_LINE!r}: {problem}")


def boots(
    vmms: dict[str, tuple[str, Guest]], runs: int, tell: Callable[[str], None]
) -> dict[str, list[Boot]]:
    """`runs` boots of each named (VMM, guest), alternating. One that fails is told and left out."""
    found: dict[str, list[Boot]] = {name: [] for name in vmms}
    for run in range(runs):
        for name, (vmm, guest) in vmms.items():
            try:
                boot = boot_once(vmm, guest)
            except StepError as error:
                tell(f"bench: boot {run + 1}/{runs} {name}: {error}")
                continue
            found[name].append(boot)
            tell(f"bench: boot {run + 1}/{runs} {name}: {boot.seconds * 1000:.0f} ms")
    return found


class _Session(NamedTuple):
    batches: list[Batch]
    kvm_exits: int | None
    vmm_exits: int | None


def _session(vmm: str, kernel: Path, *, hyperv: bool) -> _Session:
    guest = Guest(kernel, memory=64, testdev=True, hyperv=hyperv)
    with Running(vmm, guest, deadline=GUEST_DEADLINE) as running:
        said: list[str] = []
        for _seconds, line in running.lines():
            said.append(line)
            if line.startswith(DONE):
                break
            parse([line])  # complains at once
        exits = running.kvm_exits()
        errors = running.stop()
    batches = parse(said)
    if not batches:
        raise StepError(f"{vmm}: the benchmark guest said nothing: {errors.strip()[-500:]}")
    return _Session(batches, exits, _own_exits(errors) if vmm in (HVKVM, HVKVM_USER) else None)


def _own_exits(errors: str) -> int | None:
    """The sum of hvkvm's own exit counters, in its --json line."""
    for line in errors.splitlines():
        if line.startswith("{"):
            counts: dict[str, int] = json.loads(line)["exits"]
            return sum(count for name, count in counts.items() if name != "KVM_EXIT_INTR")
    return None


def _per_operation(loaded: int | None, idle: int | None, operations: int) -> float | None:
    return None if loaded is None or idle is None else (loaded - idle) / operations


def round_trips(
    operation: str,
    vmms: tuple[str, ...],
    runs: int,
    tell: Callable[[str], None],
    *,
    tsc_hz: float,
    hyperv: bool = True,
    count: int | None = None,
) -> dict[str, list[Trips]]:
    """`operation` under each VMM, `runs` times, alternating.

    Exits an operation are those of a run less those of the same guest that does
    none: what booting and printing cost is not counted.
    """
    count = count or COUNTS[operation]
    kernel, idle_kernel = image(operation, count), image(operation, 0)
    idle = {vmm: _session(vmm, idle_kernel, hyperv=hyperv) for vmm in vmms}
    found: dict[str, list[Trips]] = {vmm: [] for vmm in vmms}
    for run in range(runs):
        for vmm in vmms:
            try:
                session = _session(vmm, kernel, hyperv=hyperv)
            except StepError as error:
                tell(f"bench: {operation} {run + 1}/{runs} {vmm}: {error}")
                continue
            times = [batch.nanoseconds(tsc_hz) for batch in session.batches]
            operations = sum(batch.operations for batch in session.batches)
            trips = Trips(
                median(times),
                min(times),
                sum(batch.refused for batch in session.batches) / operations,
                _per_operation(session.kvm_exits, idle[vmm].kvm_exits, operations),
                _per_operation(session.vmm_exits, idle[vmm].vmm_exits, operations),
            )
            found[vmm].append(trips)
            tell(f"bench: {operation} {run + 1}/{runs} {vmm}: {trips.nanoseconds:.0f} ns")
    return found


def tsc_hz() -> float:
    """This machine's TSC rate as /proc/cpuinfo knows it; for guests without a reference clock."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("cpu MHz"):
            return float(line.split(":")[1]) * 1e6
    return 1e9
