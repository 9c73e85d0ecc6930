"""The VMBus host and its devices under a fuzzer for long (`make soak-vmbus`, HVKVM_SOAK=1). Needs no KVM.

HVKVM_SOAK_SECONDS is how long (600), HVKVM_SOAK_SEED where to begin; without it each run is a
new one. A failure prints its seed and the shortest steps: `tests/vmbus/test_vmbus_fuzz.py` keeps those.
"""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

import fuzz_run
import pytest

pytestmark = [
    pytest.mark.skipif(
        not os.environ.get("HVKVM_SOAK"), reason="a long run: set HVKVM_SOAK=1 or use make soak"
    ),
    pytest.mark.timeout(0),
]

SECONDS = float(os.environ.get("HVKVM_SOAK_SECONDS", "600"))
SEED = int(os.environ.get("HVKVM_SOAK_SEED") or time.time_ns() % 1_000_000_000)
GRIND_EVERY = 25
MOST_GROWTH_KIB = 16 << 10
REPORT_SECONDS = 30.0


def resident_kib() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError("no VmRSS")


def test_a_hostile_guest_for_long(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start = told = time.monotonic()
    before, count, grinds = 0, 0, 0
    while time.monotonic() < start + SECONDS:
        seed = SEED + count
        fuzz_run.fuzz(seed, tmp_path)
        if not count % GRIND_EVERY:
            fuzz_run.grind(seed, tmp_path)
            grinds += 1
        count += 1
        if not before and time.monotonic() > start + SECONDS / 5:
            gc.collect()
            before = resident_kib()
        if time.monotonic() > told + REPORT_SECONDS:
            told = time.monotonic()
            with capfd.disabled():
                print(
                    f"\n  {count} sequences, {grinds} grinds, seed {seed}, {resident_kib()} KiB", flush=True
                )
    gc.collect()
    grown = resident_kib() - before
    with capfd.disabled():
        print(f"\n  {count} sequences from seed {SEED}, {grinds} grinds; grown by {grown} KiB", flush=True)
    assert grown < MOST_GROWTH_KIB
