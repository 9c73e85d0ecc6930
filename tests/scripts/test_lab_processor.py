"""A process that stands still, one that works, and one that waits for its turn."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from steps import lab_processor
from steps.lab_processor import Processor, Usage, stands_still


@pytest.mark.parametrize(
    ("running", "queued", "still"),
    [(0.0, 0.0, True), (0.3, 0.1, True), (5.0, 0.0, False), (0.3, 4.0, False), (-1.0, 0.0, False)],
    ids=["halted", "polls", "works", "waits for its turn", "another process by now"],
)
def test_rest_is_neither_running_nor_queueing(running: float, queued: float, still: bool) -> None:
    assert stands_still(Usage(10, 10), Usage(10 + running, 10 + queued), 5.0) is still


def test_a_process_that_sleeps_is_told_from_one_that_spins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab_processor, "SAMPLE_SECONDS", 0.2)
    sleeper = subprocess.Popen(["sleep", "1000"])
    spinner = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
    try:
        before = lab_processor.usage(spinner.pid)
        assert before is not None
        # On a busy machine it may not have run at all yet, but then it queues.
        while sum(lab_processor.usage(spinner.pid) or ()) == sum(before):
            time.sleep(0.01)
        idle, busy = Processor(sleeper.pid), Processor(spinner.pid)
        while idle.idle(time.monotonic()) < 1:
            assert busy.idle(time.monotonic()) < 1
            time.sleep(0.02)
    finally:
        for process in (sleeper, spinner):
            process.kill()
            process.wait()
    assert lab_processor.usage(sleeper.pid) is None


def test_every_thread_counts() -> None:
    """The emulated processor is a thread of QEMU, and not its first."""
    code = "import threading,time; threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()"
    process = subprocess.Popen([sys.executable, "-S", "-c", f"{code}; time.sleep(1000)"])
    try:
        task = Path(f"/proc/{process.pid}/task")
        while True:
            seen, first = (
                lab_processor.usage(process.pid),
                (task / str(process.pid) / "schedstat").read_text(),
            )
            assert seen is not None
            if seen.running > 1 + int(first.split()[0]) / 1e9:
                break
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
