"""The distribution's UEFI firmware, as packaged, to its shell and what runs in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from firmware_guest import FIRMWARES, console_of, fat_disk, firmware_guest, lab_tick, wait_until
from guest_artifacts import artifact
from linux_guest import SECONDS
from png_files import pixels_of

from hvkvm.machine.disk_spec import DiskSpec
from hvkvm.machine.machine import Machine
from hvkvm.machine.outcome import Ending
from hvkvm.machine.screenshot import screenshot

pytestmark = [pytest.mark.hyperv, pytest.mark.firmware, pytest.mark.timeout(4 * SECONDS)]

SCRIPT = b"""@echo -off
echo script begins
ls fs0:
ls fs1:
pci
smbiosview -t 1
echo script ends
reset -s
"""


@pytest.mark.parametrize("firmware", FIRMWARES)
def test_the_shell_runs_a_script_from_a_disk(tmp_path: Path, firmware: str) -> None:
    """NVMe and virtio by the firmware's drivers, PCI by its enumerator, power-off by the FADT's ports."""
    first = fat_disk(tmp_path / "disk", {"startup.nsh": SCRIPT})
    second = fat_disk(tmp_path / "more", {"virtio.txt": b"read by the firmware's driver"})
    disks = (DiskSpec(str(first)), DiskSpec(str(second), bus="virtio"))
    display = "ramfb" if firmware == "newer" else "none"
    with firmware_guest(firmware, memory=256 << 20, disks=disks, display=display) as guest:
        outcome = guest.finish()
        text = guest.text
        assert "script begins" in text, guest.report()
        assert "startup.nsh" in text.split("script begins")[1], guest.report()
        assert "virtio.txt" in text.split("script begins")[1], guest.report()
        assert "script ends" in text, guest.report()
        for identity in ("8086", "1237", "7113", "1414", "1042"):
            assert identity in text.split("script begins")[1].upper(), identity
        assert outcome.ending is Ending.POWERED_OFF
        if display == "ramfb":
            shows_text(guest.machine, tmp_path / "screen.png")


def shows_text(machine: Machine, picture: Path) -> None:
    """On the framebuffer that the firmware's driver has set up; RAM outlives the run."""
    assert machine.firmware is not None
    assert machine.firmware.display is not None
    width, height = screenshot(machine.firmware.display, machine.memory, picture)
    assert (width, height) >= (640, 480)
    _, _, pixels = pixels_of(picture.read_bytes())
    assert len(set(zip(pixels[::3], pixels[1::3], pixels[2::3], strict=True))) > 1


COUNTING = b"""@echo -off
echo before-%hvkvmtest%-
set hvkvmtest %hvkvmtest%x
echo after-%hvkvmtest%-
"""
CONFIG = """
firmware = "{firmware}"
firmware_vars = "{variables}"
hv = "none"
memory = "256M"
apic_bus_ns = {tick}
control = "off"
[[disks]]
file = "{disk}"
readonly = true
"""


def test_variables_persist_over_boots_and_a_kill(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The shell keeps a variable. Three processes: one is killed, one powers off, one reads the result."""
    variables = tmp_path / "vars"
    seen = []
    for number in range(3):
        killed = number == 0
        disk = tmp_path / f"disk{number}"
        fat_disk(disk, {"startup.nsh": COUNTING + (b"" if killed else b"reset -s\n")})
        config = tmp_path / "vm.toml"
        config.write_text(
            CONFIG.format(
                firmware=artifact(FIRMWARES["newer"]), variables=variables, tick=lab_tick(), disk=disk
            )
        )
        with console_of(["run", "--quiet", "--config", str(config)], request) as vm:
            vm.wait_for("after-")
            seen.append(vm.text.split("before-")[1].split("-")[0])
            if killed:
                # The guest goes on to its prompt, and what it has changed is in the file soon.
                wait_until(lambda: b"h\0v\0k\0v\0m\0t\0e\0s\0t\0" in variables.read_bytes())
                vm.process.kill()
                vm.process.wait()
            else:
                assert vm.process.wait(SECONDS) == 0, vm.text
    assert seen == ["", "x", "xx"]
