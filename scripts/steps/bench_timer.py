"""How well a 1 ms periodic synthetic timer keeps its time, as the guest sees it, on either SynIC.

The agent guest halts between ticks and notes for each its own TSC, when it was
due and when the host delivered it (both in the message). Reference time is tied
to the TSC before and after. Called by `scripts/bench`, or by itself:

    .venv/bin/python scripts/steps/bench_timer.py [kernel|user]...

A figure, not a test: it shares the machine with whatever else runs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from struct import iter_unpack
from typing import Any, NamedTuple

PROJECT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [path for path in (str(PROJECT), str(PROJECT / "tests/guests")) if path not in sys.path]

PERIOD = 10_000
"""Reference time counts 100 ns: this is 1 ms."""
LATE = 5_000
"""A tick seen more than half a millisecond after it was due is late."""

_SINT = 4
_PERIODIC_AUTO_ENABLE = 2 | 8
_READINGS = 8  # ticks.s


class Tick(NamedTuple):
    """One tick: when the guest saw it, was due, was delivered, in 100 ns of reference time."""

    seen: float
    due: int
    delivered: int


def measure(synic: str, ticks: int = 1000) -> dict[str, Any]:
    """The figures of `ticks` ticks on SynIC "kernel" or "user".

    delivered, missed (never sent, because a later one was due already), late;
    median, 99th percentile and worst lateness in microseconds; and the median
    time from the message's delivery to the guest's seeing it. Raises
    HvkvmError where this host lacks that SynIC.
    """
    log = _run(synic, ticks)
    return {"synic": synic, "period_us": PERIOD / 10, **figures(decode(log))}


def decode(log: bytes) -> list[Tick]:
    """The guest's log as ticks."""
    entries = list(iter_unpack("<4Q", log))
    first, last = _tie(entries[:_READINGS]), _tie(entries[-_READINGS:])
    rate = (last[1] - first[1]) / (last[0] - first[0])
    return [
        Tick(first[1] + (tsc - first[0]) * rate, due, delivered)
        for tsc, due, delivered, _flags in entries[_READINGS:-_READINGS]
    ]


def _tie(readings: list[tuple[Any, ...]]) -> tuple[float, int]:
    """(TSC, reference time) of one moment: the reading that took least."""
    before, time, after, _ = min(readings, key=lambda reading: reading[2] - reading[0])
    return (before + after) / 2, time


def figures(ticks: list[Tick]) -> dict[str, Any]:
    """The numbers of `measure`."""
    lateness = sorted(tick.seen - tick.due for tick in ticks)
    due = round((ticks[-1].due - ticks[0].due) / PERIOD) + 1
    return {
        "due": due,
        "delivered": len(ticks),
        "missed": due - len({tick.due for tick in ticks}),
        "late": sum(late > LATE for late in lateness),
        "median_us": round(median(lateness) / 10, 1),
        "p99_us": round(lateness[len(lateness) * 99 // 100] / 10, 1),
        "worst_us": round(lateness[-1] / 10, 1),
        "delivered_to_seen_us": round(median(tick.seen - tick.delivered for tick in ticks) / 10, 1),
    }


def _run(synic: str, ticks: int) -> bytes:
    from guest_agent import SCRATCH
    from guest_machine import Guest

    from hvkvm.abi.tlfs import HV_X64_MSR_STIMER0_CONFIG

    log = SCRATCH + 0x10000
    guest = Guest(cpus=1, hv="passthrough", synic=synic)
    try:
        cpu = guest.start()[0]
        cpu.synic_on(simp=SCRATCH, sints={_SINT: 0})
        cpu.wrmsr(HV_X64_MSR_STIMER0_CONFIG, _PERIODIC_AUTO_ENABLE | _SINT << 16)
        reply = cpu.do("TICKS", _SINT, ticks, log, HV_X64_MSR_STIMER0_CONFIG, PERIOD, seconds=60 + ticks / 10)
        assert reply.value == ticks
        return guest.machine.memory.read(log, 32 * (ticks + 2 * _READINGS))
    finally:
        guest.close()


def main() -> None:
    for synic in sys.argv[1:] or ("kernel", "user"):
        print(" ".join(f"{name}={value}" for name, value in measure(synic).items()), flush=True)


if __name__ == "__main__":
    main()
