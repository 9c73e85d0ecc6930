"""A copy of a warm guest that is late to go on, as on a busy host, still has the time of when it asks."""

from __future__ import annotations

from pathlib import Path
from time import sleep, time_ns

import kernel_images as ki
import pytest

import hvkvm
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.machine import Machine
from hvkvm.machine.outcome import Ending

pytestmark = pytest.mark.kvm

MIB = 1 << 20
SOURCE = Path(__file__).parents[1] / "guests/warm_late.s"
LATE = 1.5
"""Seconds: more than the one that a copy's clock may be wrong by."""


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    return ki.assembled_pvh(SOURCE, tmp_path)


def test_the_time_is_that_of_the_asking(kernel: Path, tmp_path: Path) -> None:
    file = tmp_path / "warm"
    hvkvm.warm(MachineConfig(kernel=kernel, hv="none", memory=64 * MIB, timeout=100), file)
    printed = bytearray()
    with Machine(MachineConfig(kernel=file, warm=file, command=("true",), timeout=100)) as machine:
        machine.board.attach_sink(printed.extend)
        machine.start()
        sleep(LATE)
        asked = time_ns()
        machine.board.serial.feed(b"x")
        outcome = machine.wait(100)
    assert outcome is not None
    assert outcome.ending is Ending.POWERED_OFF
    seconds, nanoseconds = (int.from_bytes(printed[at : at + 8], "little") for at in (0, 8))
    assert asked <= seconds * 10**9 + nanoseconds <= time_ns()
