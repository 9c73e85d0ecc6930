"""A hostile guest at a NIC for long (`make soak-nics`, HVKVM_SOAK=1). Needs no KVM.

HVKVM_SOAK_SECONDS is how long (600), HVKVM_SOAK_SEED where to begin; without it each run is a new one. A
failure names its seed: `python tests/guests/netvsp_fuzz.py SEED` replays it.
"""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

import netvsp_fuzz
import pytest

pytestmark = [
    pytest.mark.skipif(
        not os.environ.get("HVKVM_SOAK"), reason="a long run: set HVKVM_SOAK=1 or use make soak"
    ),
    pytest.mark.timeout(0),
]

SECONDS = float(os.environ.get("HVKVM_SOAK_SECONDS", "600"))
SEED = int(os.environ.get("HVKVM_SOAK_SEED") or time.time_ns() % 1_000_000_000)
MOST_GROWTH_KIB = 16 << 10


def resident_kib() -> int:
    """Of this process."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0])


def test_a_hostile_guest_for_long(capfd: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    before = count = steps = 0
    while time.monotonic() < start + SECONDS:
        steps += netvsp_fuzz.fuzz(SEED + count)
        count += 1
        if not before and time.monotonic() > start + SECONDS / 5:
            gc.collect()
            before = resident_kib()
    gc.collect()
    grown = resident_kib() - before
    with capfd.disabled():
        print(f"\n  {count} guests from seed {SEED}, {steps} steps; grown by {grown} KiB", flush=True)
    assert grown < MOST_GROWTH_KIB
