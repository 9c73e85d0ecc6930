"""A stock Linux saved at moments of its boot and of its life, each time gone on with by another machine."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep

import pytest
from linux_guest import LinuxGuest, linux_guest

from hvkvm.errors import StateError
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.machine import Machine
from hvkvm.machine.outcome import Ending

SOAK = bool(os.environ.get("HVKVM_SOAK"))
pytestmark = [pytest.mark.hyperv, pytest.mark.timeout(0 if SOAK else 900)]
LINES = 150
SHORT_LINES = 20


def script(lines: int) -> str:
    """Counts, says what the kernel complained of, and ends with status 5.

    The kernel itself says nothing meanwhile: in the middle of a line it would be taken for a lost one.
    """
    return rf"""
dmesg -n 1
i=0
while [ $i -lt {lines} ]; do i=$((i + 1)); echo "line $i"; usleep 20000; done
dmesg | grep -E 'WARNING: CPU|BUG:|Oops|stall|soft lockup|hung_task|Watchdog' | sed 's/^/complaint: /'
echo the end
exit 5
"""


SCRIPT, SHORT = script(LINES), script(SHORT_LINES)


MOMENTS = int(os.environ.get("HVKVM_SOAK_MOMENTS", "50"))
"""So many moments of boots in a soak, of each kind of machine."""


def settings_of(file: Path, before: Machine) -> MachineConfig:
    """What goes on from `file`, for as long as `before` had."""
    return MachineConfig(kernel=file, restore=file, timeout=before.config.timeout)


def judge(machine: Machine, output: bytearray, lines: int) -> None:
    """Have it run to its end, which is as it would have been without all this."""
    outcome = LinuxGuest(machine, output).finish()
    text = bytes(output).decode(errors="replace").replace("\r\n", "\n")
    # By its command's end, which writes an I/O port in user mode: the task state is whole, too.
    assert (outcome.ending, outcome.status) == (Ending.COMMAND_EXITED, 5), text[-3000:]
    assert "the end" in text
    counted = [int(number) for number in re.findall(r"^line (\d+)$", text, re.MULTILINE)]
    assert counted == list(range(1, lines + 1)), text[-3000:]
    assert "complaint" not in text, text[-3000:]


def carried_on(
    guest: LinuxGuest, file: Path, pause: Callable[[], float], more: Callable[[int], bool]
) -> tuple[Machine, int]:
    """Save it while `more(saves)`, `pause()` seconds apart; the last machine, and how often it was."""
    machine, output = guest.machine, guest.output
    saves = 0
    while more(saves):
        sleep(pause())
        if machine.outcome is not None:
            break
        try:
            machine.save(file, end=True)  # what it printed until it was closed the next would print again
        except StateError:
            assert machine.outcome is not None  # it has come to its end meanwhile
            break
        machine.close()
        machine = Machine(settings_of(file, machine))
        machine.board.attach_sink(output.extend)
        machine.start()
        saves += 1
    return machine, saves


@pytest.mark.parametrize(("synic", "cpus"), [("kernel", 2), ("user", 1)])
def test_linux_goes_on_wherever_it_was_saved(synic: str, cpus: int, tmp_path: Path) -> None:
    chance = random.Random(cpus)
    with linux_guest(SCRIPT, synic=synic, cpus=cpus, append="") as guest:
        guest.start()
        machine, _rounds = carried_on(
            guest, tmp_path / "vm", lambda: chance.random() * 3, lambda saves: saves < 4
        )
        try:
            # However far those came: where a boot takes long, all of them are of the boot.
            counting = LinuxGuest(machine, guest.output)
            counting.wait_for("line 3")
            machine, _rounds = carried_on(counting, tmp_path / "vm", chance.random, lambda saves: saves < 2)
            judge(machine, guest.output, LINES)
        finally:
            machine.close()


@pytest.mark.skipif(not SOAK, reason="a long run: set HVKVM_SOAK=1 or use make soak-state")
@pytest.mark.parametrize("cpus", [1, 4])
@pytest.mark.parametrize("synic", ["kernel", "user"])
def test_a_boot_goes_on_from_each_of_many_moments(synic: str, cpus: int, tmp_path: Path) -> None:
    """Of each boot from its first instruction until its script counts, or as many as are wanted."""
    seed = int(os.environ.get("HVKVM_SOAK_SEED", "1"))
    ends = monotonic() + float(os.environ.get("HVKVM_SOAK_SECONDS", "inf"))
    moments = boots = 0
    while moments < MOMENTS and monotonic() < ends:
        chance = random.Random(f"{seed} {boots}")
        with linux_guest(SHORT, synic=synic, cpus=cpus, append="") as guest:
            guest.start()
            boot = Boot(guest.output)

            def more(saves: int) -> bool:
                return boot.goes_on(saves) and moments + saves < MOMENTS and monotonic() < ends  # noqa: B023

            machine, saved = carried_on(guest, tmp_path / "vm", chance.random, more)
            try:
                judge(machine, guest.output, SHORT_LINES)
            finally:
                machine.close()
        moments, boots = moments + max(saved, 1), boots + 1
        print(f"{synic}, {cpus} vCPUs: {moments} moments, {boots} boots; this at {boot.seen}", flush=True)


class Boot:
    """How far a boot has come, by its console."""

    def __init__(self, output: bytearray) -> None:
        self._output = output
        self.seen: list[str] = []
        """The kernel's time of its last line at each save."""

    def goes_on(self, saves: int) -> bool:
        """Whether it has not come to its script's lines yet."""
        text = bytes(self._output)
        stamps = re.findall(rb"\[ *(\d+\.\d)\d*\]", text)
        if saves:
            self.seen.append(stamps[-1].decode() if stamps else "-")
        return b"line 3" not in text
