"""U-Boot as firmware: a second one, with drivers of its own for PCI, NVMe and virtio; on any KVM."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from firmware_guest import fat_disk
from guest_artifacts import artifact
from linux_guest import LinuxGuest
from u_boot import TIMES, Console

from hvkvm.machine.config import MachineConfig
from hvkvm.machine.disk_spec import DiskSpec
from hvkvm.machine.machine import Machine

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(600)]

MEMORY = 256 << 20
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
NO_NIC = {"simple network protocol"}
TIMING = {"event services", "task priority levels", "watchdog timer"}
"""These count timer events, and a slow or busy host has them late."""


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
