"""A stock Linux saved at moments of its boot and of its life, each time gone on with by another machine."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path
from time import sleep

import pytest
from linux_guest import LinuxGuest, linux_guest

from hvkvm.machine.config import MachineConfig
from hvkvm.machine.machine import Machine
from hvkvm.machine.outcome import Ending

pytestmark = [pytest.mark.hyperv, pytest.mark.timeout(900)]

SOAK = bool(os.environ.get("HVKVM_SOAK"))
LINES = 300
SCRIPT = rf"""
i=0
while [ $i -lt {LINES} ]; do i=$((i + 1)); echo "line $i"; usleep 20000; done
dmesg | grep -E 'WARNING: CPU|BUG:|Oops|stall|soft lockup|hung_task|Watchdog' | sed 's/^/complaint: /'
echo the end
exit 5
"""


@pytest.mark.parametrize(
    ("synic", "cpus"), [("kernel", 2), ("user", 1), *([("kernel", 1), ("user", 2)] if SOAK else [])]
)
def test_linux_goes_on_wherever_it_was_saved(synic: str, cpus: int, tmp_path: Path) -> None:
    rounds = 50 if SOAK else 6
    chance = random.Random(cpus)
    file = tmp_path / "vm"
    with linux_guest(SCRIPT, synic=synic, cpus=cpus, append="") as guest:
        guest.start()
        machine, output = guest.machine, guest.output
        try:
            for _ in range(rounds):
                sleep(chance.random() * 3)
                if machine.outcome is not None:
                    break
                machine.save(file)
                machine.close()
                settings = MachineConfig(kernel=file, restore=file, timeout=guest.machine.config.timeout)
                machine = Machine(settings)
                machine.board.attach_sink(output.extend)
                machine.start()
            told = LinuxGuest(machine, output)
            outcome = told.finish()
        finally:
            machine.close()
        text = bytes(output).decode(errors="replace").replace("\r\n", "\n")
        # By its command's end, which writes an I/O port in user mode: the task state is whole, too.
        assert (outcome.ending, outcome.status) == (Ending.COMMAND_EXITED, 5), text[-3000:]
        assert "the end" in text
        counted = [int(number) for number in re.findall(r"^line (\d+)$", text, re.MULTILINE)]
        assert counted == list(range(1, LINES + 1)), text[-3000:]
        assert "complaint" not in text, text[-3000:]
