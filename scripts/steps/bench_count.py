"""What one message or event costs hvkvm in work that no machine changes: exits, eventfd writes, copies.

Called by `scripts/bench`, in a process of its own making: the counters stand in
for the functions they count, so nothing is timed here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steps.bench_guest import BATCHES, PROJECT, image
from steps.distribution import StepError

COUNT = 100
_DEADLINE = 120.0
_LABELS = {
    "exits": "exits to the VMM",
    "eventfd writes": "eventfds signalled",
    "eventfd reads": "eventfds read",
    "ioctls": "ioctls besides KVM_RUN",
    "copies out of the guest": "copies of the message out of the guest",
    "copies into the guest": "copies of the message into the guest",
}


def count(operation: str, synic: str = "kernel") -> dict[str, float]:
    """Average numbers of one `operation` on that SynIC, less what a guest that does none costs. StepError."""
    busy, idle = _run(image(operation, COUNT), synic), _run(image(operation, 0), synic)
    names = dict.fromkeys((*_LABELS, *busy))
    return {name: (busy.get(name, 0) - idle.get(name, 0)) / (COUNT * BATCHES) for name in names}


def text(found: dict[str, float]) -> str:
    """The numbers as indented lines."""
    return "\n".join(f"  {_LABELS.get(name, name):45} {value:6.2f}" for name, value in found.items())


def _run(kernel: Path, synic: str) -> dict[str, int]:
    words = [str(PROJECT / ".venv/bin/python"), "-B", "-m", "steps.bench_count", str(kernel), synic]
    done = subprocess.run(
        words, cwd=PROJECT / "scripts", capture_output=True, text=True, check=False, timeout=2 * _DEADLINE
    )
    if done.returncode:
        raise StepError(f"counting: {done.stderr.strip()[-500:]}")
    found: dict[str, int] = json.loads(done.stdout)
    return found


def _counted(counts: Counter[str], name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def counting(*arguments: Any, **named: Any) -> Any:
        counts[name] += 1
        return original(*arguments, **named)

    return counting


def _inside(kernel: Path, synic: Any) -> dict[str, int]:
    """Run the guest in this process, with counters in place."""
    import os
    import threading

    counts: Counter[str] = Counter()
    # Before the package is imported: some modules keep these functions by name.
    os.eventfd_write = _counted(counts, "eventfd writes", os.eventfd_write)
    os.eventfd_read = _counted(counts, "eventfd reads", os.eventfd_read)

    from hvkvm.hyperv.synic.pages import MessagePage
    from hvkvm.kvm import ioctl as door
    from hvkvm.machine.config import MachineConfig
    from hvkvm.machine.machine import Machine
    from hvkvm.memory.guest import GuestMemory

    door.ioctl = _counted(counts, "ioctls", door.ioctl)
    GuestMemory.read = _counted(counts, "copies out of the guest", GuestMemory.read)  # type: ignore[method-assign]
    MessagePage.post = _counted(counts, "copies into the guest", MessagePage.post)  # type: ignore[method-assign]
    said = bytearray()
    done = threading.Event()

    def sink(data: bytes) -> None:
        said.extend(data)
        if b"bench: done" in said:
            done.set()

    config = MachineConfig(kernel=kernel, memory=64 << 20, devices=("hyperv-testdev",), synic=synic)
    with Machine(config) as machine:
        machine.board.attach_sink(sink)
        machine.start()
        if not done.wait(_DEADLINE):
            raise StepError(f"the guest did not finish: {bytes(said[-200:])!r}")
        exits = machine.exit_counts()
        found = dict(counts)
    found["exits"] = sum(number for name, number in exits.items() if name != "KVM_EXIT_INTR")
    return found


if __name__ == "__main__":
    print(json.dumps(_inside(Path(sys.argv[1]), sys.argv[2])))
