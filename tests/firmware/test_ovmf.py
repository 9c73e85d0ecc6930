"""The distribution's UEFI firmware, as packaged, to its shell and what runs in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from firmware_guest import FIRMWARES, fat_disk, firmware_guest

from hvkvm.machine.disk_spec import DiskSpec
from hvkvm.machine.outcome import Ending

pytestmark = [pytest.mark.hyperv, pytest.mark.firmware]

SCRIPT = b"""@echo -off
echo script begins
ls fs0:
pci
smbiosview -t 1
echo script ends
reset -s
"""


@pytest.mark.parametrize("firmware", FIRMWARES)
def test_the_shell_runs_a_script_from_a_disk(tmp_path: Path, firmware: str) -> None:
    """NVMe by the firmware's driver, PCI by its enumerator, power-off by the FADT's and PMBA's ports."""
    image = fat_disk(tmp_path / "disk", {"startup.nsh": SCRIPT})
    with firmware_guest(firmware, memory=256 << 20, disks=(DiskSpec(str(image)),)) as guest:
        outcome = guest.finish()
        text = guest.text
        assert "script begins" in text, guest.report()
        assert "startup.nsh" in text.split("script begins")[1], guest.report()
        assert "script ends" in text, guest.report()
        for identity in ("8086", "1237", "7113", "1414"):
            assert identity in text.split("script begins")[1].upper(), identity
        assert outcome.ending is Ending.POWERED_OFF
