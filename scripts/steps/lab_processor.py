"""Whether the lab's emulated processor works, waits for its turn on this machine, or stands still.

Why: a slow lab and one that stands still are both silent, and only what its processor
does tells them apart. Called by `steps.lab_session`. One thread.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

SAMPLE_SECONDS = 5.0
# Measured on a busy machine: a lab that only beats and answers our interrupts takes 1 % of a processor, one
# in which a test looks fifty times a second for what does not come 6 to 10 %, and queues for 14 to 25 %.
# One in which a guest runs takes all it can get.
IDLE_SHARE = 0.15
# A lab that runs little because others have the processors is not idle: its threads queue for them.
QUEUED_SHARE = 0.5


class Usage(NamedTuple):
    """Seconds of all threads of a process: on a processor, and in the queue for one."""

    running: float
    queued: float


def usage(pid: int) -> Usage | None:
    """What the process took so far; None once it is gone."""
    running = queued = 0
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            fields = (thread / "schedstat").read_text().split()
            running, queued = running + int(fields[0]), queued + int(fields[1])
    except (OSError, ValueError, IndexError):
        # No schedstat in this kernel, or a thread ended: the sum of the process does.
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return Usage((int(fields[11]) + int(fields[12])) / 100, 0.0)
    return Usage(running / 1e9, queued / 1e9)


class Processor:
    """Watches one process; `idle(now)` says for how many seconds it has stood still."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.since = self.at = time.monotonic()
        self.last = usage(pid)
        self.longest = 0.0

    def idle(self, now: float) -> float:
        """Seconds up to the last sample in which it neither ran nor queued; samples if it is time."""
        seconds = now - self.at
        if seconds < SAMPLE_SECONDS:
            return self.at - self.since
        seen = usage(self.pid)
        if seen is None or self.last is None or not stands_still(self.last, seen, seconds):
            self.since = now
        self.last, self.at = seen, now
        self.longest = max(self.longest, now - self.since)
        return now - self.since


def stands_still(before: Usage, after: Usage, seconds: float) -> bool:
    """Whether a process did next to nothing in these `seconds`, though nobody kept it from it."""
    running, queued = after.running - before.running, after.queued - before.queued
    return 0 <= running < IDLE_SHARE * seconds and queued < QUEUED_SHARE * seconds
