"""A Linux guest's serial console under each VMM: many short lines, timed by the guest's own uptime.

Called by `scripts/bench`. A line costs the driver's interrupts and register
accesses, and the host's work to pass it on.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from steps import artifacts
from steps.bench_measure import BOOT_DEADLINE, PEER
from steps.bench_synics import Figures, Progress, alternate
from steps.bench_table import Row
from steps.bench_vmm import HVKVM, Guest, Running, linux_append
from steps.distribution import StepError

LINES = 1000
COMMAND = ["sh", "-c", f"cat /proc/uptime; yes line | head -n {LINES}; cat /proc/uptime; sleep 1000"]
_UPTIME = re.compile(r"(\d+\.\d\d) \d+\.\d\d")


def milliseconds_a_line(said: Iterable[str]) -> float:
    """The time between the two uptimes in what the guest said. StepError unless all lines lie between."""
    began: float | None = None
    lines = 0
    for text in said:
        found = _UPTIME.fullmatch(text)
        if found and began is not None:
            if lines != LINES:
                raise StepError(f"{lines} lines of {LINES} came")
            return (float(found[1]) - began) * 1000 / LINES
        if found:
            began = float(found[1])
        lines += text == "line"
    raise StepError("the guest ended before its last line")


def rows(runs: int, tell: Progress, *, suite: str | None = None) -> list[Row]:
    """`runs` boots of hvkvm and QEMU."""
    from hvkvm.boot import initramfs

    with tempfile.TemporaryDirectory(prefix="hvkvm-bench-") as folder:
        initrd = Path(folder) / "initramfs"
        initrd.write_bytes(initramfs.build(COMMAND, busybox=artifacts.path("busybox")))
        kernel = artifacts.path("guest-kernel", suite)

        def once(vmm: str) -> Figures:
            guest = Guest(kernel, initrd, linux_append(vmm))
            with Running(vmm, guest, deadline=BOOT_DEADLINE) as running:
                taken = milliseconds_a_line(text for _seconds, text in running.lines())
            return {("console: a short line of Linux", "ms"): (taken, "less")}

        return alternate("console", (HVKVM, PEER), runs, tell, once, PEER)
