"""Hours of load on a bad wire, in miniature: what arrives is what was sent, and nothing of ours grows.

HVKVM_SOAK_SECONDS is how long (3600), HVKVM_SOAK_SEED whose faults.
"""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from random import Random

import pytest
from linux_lan import HOST, HOST6, guest_lan
from linux_programs import ahead
from linux_vmbus import see_no_complaints

from tests.net.conftest import needs_taps

SECONDS = float(os.environ.get("HVKVM_SOAK_SECONDS", "3600"))
SEED = int(os.environ.get("HVKVM_SOAK_SEED") or time.time_ns() % 1_000_000_000)
MOST_GROWTH_KIB = 16 << 10
pytestmark = [
    pytest.mark.hyperv,
    pytest.mark.timeout(SECONDS + 3600),
    pytest.mark.skipif(not os.environ.get("HVKVM_SOAK"), reason="a long run: make soak-linux"),
    needs_taps,
]
FAULTS = {"loss": 0.005, "corrupt": 0.001, "duplicate": 0.005, "reorder": 0.005, "jitter": 0.002}

ahead("nic")


def private_kib() -> int:
    """Of this process, without its guest's RAM."""
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0])


def test_load_on_a_bad_wire_for_long(capfd: pytest.CaptureFixture[str]) -> None:
    random = Random(SEED)
    with guest_lan(cpus=2, queues=2, timeout=SECONDS + 3600, faults={**FAULTS, "seed": SEED}) as lan:
        lan.shell.check("nic udp 7007 > /dev/null 2>&1 &")
        begun = time.monotonic()
        rounds = moved = before = fds = 0
        while time.monotonic() < begun + SECONDS or not fds:
            size = random.choice([1, 4, 16, 32]) << 16
            for host in (HOST, HOST6):
                lan.from_guest(size, host)
                lan.to_guest(size, host)
            lan.datagrams([random.randrange(1, 1472) for _ in range(4)])
            rounds, moved = rounds + 1, moved + 4 * size
            if rounds % 10 == 0:
                for plugged in (False, True):
                    lan.guest.call(lan.wire.plug, plugged)
                    lan.carrier(plugged)
                lan.answered()
            if not fds and time.monotonic() > begun + SECONDS / 5:
                gc.collect()
                before, fds = private_kib(), len(os.listdir("/proc/self/fd"))
        gc.collect()
        grown, left = private_kib() - before, len(os.listdir("/proc/self/fd")) - fds
        shown = lan.guest.call(lan.wire.inspect)
        with capfd.disabled():
            faults = {key: shown[key] for key in shown if key.endswith(("_in", "_out"))}
            told = f"{rounds} rounds, {moved >> 20} MiB; grown by {grown} KiB and {left} fds; {faults}"
            print(f"\n  seed {SEED}: {told}", flush=True)
        assert grown < MOST_GROWTH_KIB
        assert left <= 0
        assert lan.guest.bus.host.server.reports.counts == {}
        assert lan.nic.receive.counters.malformed == 0
        see_no_complaints(lan.shell)
