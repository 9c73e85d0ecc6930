"""What a test may change of a guest that runs: cables and faults. And what it hears of one that has ended."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvkvm.devices.port import serial_output
from hvkvm.errors import ConfigError, HvkvmError
from hvkvm.testing.guest import GuestFailure
from hvkvm.testing.micro import MicroGuest

pytestmark = pytest.mark.kvm

SPIN = "1: jmp 1b"
Make = Callable[..., MicroGuest]


def test_a_cable_and_faults_change_while_it_runs(
    micro_guest: Make, disk: Callable[..., Any], net: Callable[[str], Any], tmp_path: Path
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = {"hv": "host-model", "synic": "user", "vmbus": "on", "memory": 64 << 20}
        disks = (disk("1M", faults="# none yet"), disk("1M"))
        guest = micro_guest(SPIN, **settings, disks=disks, nets=(net(f"listen={folder}/wire"),))
        guest.start()
        wire = guest.machine.nics.nics["net0"].wire  # type: ignore[union-attr]
        plugged = []
        plug, wire.plug = wire.plug, lambda on: (plugged.append(on), plug(on))  # type: ignore[method-assign]
        guest.plug("net0", False)
        guest.plug("net0", True)
        assert plugged == [False, True]
        guest.set_faults("disk0", '[[fault]]\ndo = "busy"\ntimes = 3\n')
        plan = guest.machine.disk_shelf.attached["disk0"].unit.plan  # type: ignore[union-attr]
        assert [rule.times for rule in plan.rules] == [3]
        guest.set_faults("disk0", "")
        assert guest.machine.disk_shelf.attached["disk0"].unit.plan.rules == ()  # type: ignore[union-attr]
        for error, text, call in (
            (HvkvmError, "net7: no such NIC; there are net0", lambda: guest.plug("net7", True)),
            (HvkvmError, "disk7: no such disk; there are disk0", lambda: guest.set_faults("disk7", "")),
            (
                HvkvmError,
                "disk1: no disk of the VMBus that was made with faults",
                lambda: guest.set_faults("disk1", ""),
            ),
            (ConfigError, "faults of disk0: ", lambda: guest.set_faults("disk0", "[")),
            (ConfigError, "faults of disk0", lambda: guest.set_faults("disk0", '[[fault]]\ndo = "x"\n')),
        ):
            with pytest.raises(error, match=text):
                call()


def test_what_a_guest_says_last_has_come_when_it_has_ended(
    micro_guest: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line that follows another closely waits a little before it is given on: here each, and for a day."""
    monkeypatch.setattr(serial_output.OutputBatch, "_pause", 0.0)
    monkeypatch.setattr(serial_output, "TX_INTERVAL", 1e5)
    guest = micro_guest('print "first\\n"\nprint "last\\n"\nexit 0')
    guest.start()
    assert guest.wait_for("last\n") == "first\nlast\n"


def test_a_guest_without_a_bus_has_neither(micro_guest: Make) -> None:
    guest = micro_guest(SPIN)
    with pytest.raises(HvkvmError, match="net0: no such NIC; there are none"):
        guest.plug("net0", True)
    with pytest.raises(HvkvmError, match="disk0: no such disk; there are none"):
        guest.set_faults("disk0", "")


def test_the_io_loop_itself_may_ask_for_a_change(micro_guest: Make, disk: Callable[..., Any]) -> None:
    """It waited for itself, for as long as the guest may take."""
    settings = {"hv": "host-model", "synic": "user", "vmbus": "on", "memory": 64 << 20}
    guest = micro_guest(SPIN, **settings, disks=(disk("1M", faults="# none yet"),))
    guest.start()
    changed = threading.Event()

    def change() -> None:
        guest.set_faults("disk0", '[[fault]]\ndo = "busy"\n')
        changed.set()

    guest.later(0.0, change)
    guest.wait_until(changed.is_set, "faults by a timer")


def test_a_guest_that_nobody_started_is_told_from_one_that_says_nothing(micro_guest: Make) -> None:
    guest = micro_guest('print "x"')
    with pytest.raises(
        GuestFailure, match=r"^no 'x' on the console within 0.01 s; the guest was not started"
    ):
        guest.wait_for("x", seconds=0.01)
    guest.start()
    guest.wait_for("x")


def test_each_disk_has_files_of_its_own(disk: Callable[..., Any], tmp_path: Path) -> None:
    """Faults of a second disk on a file took the first one's place; an image took that of the test's own."""
    mine = tmp_path / "disk1.raw"
    mine.write_bytes(b"mine")
    plans = [disk(file=mine, faults="# 0"), disk("1M", faults="# 1"), disk(file=str(mine), faults="# 2")]
    disk("1M")
    assert [plan.faults.read_text() for plan in plans] == ["# 0", "# 1", "# 2"]
    assert mine.read_bytes() == b"mine"
    assert len({str(plan.file) for plan in plans}) == 2
    assert plans[0].file == plans[2].file == str(mine)
