"""U-Boot as firmware: a second one, with drivers of its own for PCI, NVMe and virtio; on any KVM."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from firmware_guest import fat_disk, file_on
from guest_artifacts import artifact
from linux_guest import LinuxGuest
from u_boot import TIMES, Console

from hvkvm.machine.config import MachineConfig
from hvkvm.machine.disk_spec import DiskSpec
from hvkvm.machine.machine import Machine

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(1000)]

MEMORY = 256 << 20
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
NO_NIC = {"simple network protocol"}
TIMING = {"event services", "task priority levels", "watchdog timer"}
"""These count timer events, and a slow or busy host has them late."""


SCRIPT = r"""@echo -off
echo script begins
ls fs1:
cp fs0:\from.txt fs1:\to.txt
echo script ends
reset
"""


def test_u_boot_reads_disks_on_nvme_and_virtio(tmp_path: Path) -> None:
    """It finds RAM's size in the CMOS, places BARs itself, and polls disks; then come its UEFI's tests."""
    names = ("nvme", "virtio")
    disks = [fat_disk(tmp_path / name, {f"{name}.txt": name.encode() * 1000}) for name in names]
    config = MachineConfig(
        firmware=artifact("HVKVM_GUEST_U_BOOT"),
        hv="none",
        memory=MEMORY,
        disks=tuple(DiskSpec(str(disk), bus=name) for disk, name in zip(disks, names, strict=True)),
        timeout=3 * TIMES,
    )
    with Machine(config) as machine:
        guest = LinuxGuest(machine)
        guest.start()
        console = Console(guest)
        assert f"DRAM:  {MEMORY >> 20} MiB" in console.stop_autoboot()
        found = console.run("pci")
        for identity in ("0x1237", "0x7113", "0x00a9", "0x1042"):
            assert identity in found, found
        for name in names:
            console.run(f"{name} scan")
            assert f"{name}.txt" in console.run(f"ls {name} 0"), guest.report()
            read = console.run(f"load {name} 0 0x1000000 {name}.txt")
            assert f"{1000 * len(name)} bytes read" in read, guest.report()
            wanted = name.encode() * 1000
            assert machine.memory.read(0x1000000, len(wanted)) == wanted
        guest.type("bootefi selftest")
        guest.wait_until(lambda: "Press any key" in guest.text, "the end of its UEFI's own tests", TIMES)
        said = COLOUR.sub("", guest.text)
        passed = set(re.findall(r"Executing '([^']+)' succeeded", said))
        failed = set(re.findall(r"'([^']+)' failed", said))
        assert failed <= NO_NIC | TIMING, guest.report()
        assert {"block device", "memory", "real time clock", "start image exit", "variables"} <= passed
        assert {"ExitBootServices", "variables at runtime", "virtual address map"} <= passed
        guest.press(b" ")
        guest.wait_until(lambda: machine.resets == 1, "the reset", TIMES)
        guest.wait_until(lambda: guest.text.count("stop autoboot") == 2, "the second life", TIMES)


@pytest.mark.firmware
@pytest.mark.hyperv
def test_its_uefi_runs_a_script_in_the_shell(tmp_path: Path) -> None:
    """U-Boot finds EFI/BOOT on the virtio disk by itself; the shell copies a file there from the one on NVMe.

    A KVM that emulates each instruction takes a minute for it, a lab some seconds: it is firmware's, there.
    """
    text = b"read from NVMe, written to virtio"
    nvme = fat_disk(tmp_path / "nvme", {"from.txt": text})
    files = {
        "EFI/BOOT/BOOTIA32.EFI": artifact("HVKVM_EFI_SHELL").read_bytes(),
        "startup.nsh": SCRIPT.encode(),
    }
    virtio = fat_disk(tmp_path / "virtio", files)
    config = MachineConfig(
        firmware=artifact("HVKVM_GUEST_U_BOOT"),
        hv="none",
        memory=MEMORY,
        disks=(DiskSpec(str(nvme), bus="nvme"), DiskSpec(str(virtio), bus="virtio")),
        timeout=3 * TIMES,
    )
    with Machine(config) as machine:
        guest = LinuxGuest(machine)
        guest.start()
        console = Console(guest)
        console.stop_autoboot()
        console.run("nvme scan")
        console.run("setenv bootargs shell -delay 0")
        guest.type("run bootcmd_virtio0")
        guest.wait_until(lambda: machine.resets == 1, "the script's reset", 2 * TIMES)
        said = COLOUR.sub("", guest.text)
        assert "Found EFI removable media binary efi/boot/bootia32.efi" in said, guest.report()
        assert "UEFI Interactive Shell" in said, guest.report()
        script = said.split("script begins")[1].split("script ends")[0]
        assert "startup.nsh" in script, guest.report()
    assert file_on(virtio, "to.txt") == text
