"""UEFI firmware from the start of the process to its shell: hvkvm beside QEMU, one image, one KVM.

Called by `scripts/bench` where it is asked for (`--only firmware`). In the nested lab it needs a newer kernel
(`--lab-kernel trixie`), and QEMU may end the lab there: its guest's APIC timer cannot be slowed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

from steps.bench_table import Row
from steps.bench_vmm import HVKVM, Guest, Running
from steps.distribution import StepError

MARKER = "UEFI Interactive Shell"
DEADLINE = 300.0
MEGABYTES = 256
_LAB_TICK = 100
_CONFIG = """
firmware = "{firmware}"
memory = "{megabytes}M"
hv = "none"
apic_bus_ns = {tick}
control = "off"
"""


class Start(NamedTuple):
    """Seconds until the firmware said so, and KVM's count of exits by then."""

    seconds: float
    exits: int | None


def once(vmm: str, firmware: Path, folder: Path, marker: str = MARKER) -> Start:
    """Start `firmware` once under "hvkvm" or "qemu-" and a machine type. StepError without `marker`."""
    guest = Guest(firmware, memory=MEGABYTES, hyperv=False, firmware=firmware)
    if vmm == HVKVM:
        config = folder / "firmware.toml"
        tick = _LAB_TICK if "HVKVM_IN_LAB" in os.environ else 0
        config.write_text(_CONFIG.format(firmware=firmware, megabytes=MEGABYTES, tick=tick))
        guest = guest._replace(config=config)
    with Running(vmm, guest, deadline=DEADLINE) as running:
        for seconds, line in running.lines():
            if marker in line:
                return Start(seconds, running.kvm_exits())
        raise StepError(f"{vmm}: {firmware} never said {marker!r}: {running.stop()[-500:]}")


def rows(firmware: Path, machines: tuple[str, ...], runs: int, tell: Callable[[str], None]) -> list[Row]:
    """hvkvm beside each of `machines`, "qemu-pc" and the like, alternating."""
    found: dict[str, list[Start]] = {vmm: [] for vmm in (HVKVM, *machines)}
    with tempfile.TemporaryDirectory(prefix="hvkvm-bench-") as name:
        for run in range(runs):
            for vmm, starts in found.items():
                try:
                    starts.append(once(vmm, firmware, Path(name)))
                except StepError as error:
                    tell(f"bench: firmware {run + 1}/{runs} {vmm}: {error}")
                    continue
                tell(f"bench: firmware {run + 1}/{runs} {vmm}: {starts[-1].seconds:.1f} s")

    def middle(vmm: str, which: str) -> float | None:
        known = [value for one in found[vmm] if (value := getattr(one, which)) is not None]
        return median(known) if known else None

    made = []
    for vmm in machines:
        seconds = middle(HVKVM, "seconds"), middle(vmm, "seconds")
        made.append(Row("process start to UEFI's shell", "s", *seconds, "less", vmm))
        exits = middle(HVKVM, "exits"), middle(vmm, "exits")
        made.append(Row("process start to UEFI's shell: exits (KVM's count)", "", *exits, "", vmm))
    return made
