"""The Firmware Test Suite in a Linux guest: tables as a kernel has them, SMBIOS, MTRRs, PCI, its log.

It may fail in what docs/firmware.md explains, and in nothing else. It lives in the initramfs, with libraries
of its own suite.
"""

from __future__ import annotations

import os
from pathlib import Path

import fwts_runs
import pytest
from linux_guest import linux_guest
from linux_shell import SHELL, Shell

from hvkvm.machine.disk_spec import DiskSpec

pytestmark = [pytest.mark.hyperv, pytest.mark.timeout(900)]

OTHERS = "klog oops mtrr ebda dmicheck crs apicedge msr nx virt maxreadreq pciirq bios32 aspm"
SUMMARY = (
    r"""sed -n '/Test Failure Summary/,$p' /tmp/said.log | awk -F'|' 'NF < 7 || $2 $3 $4 $5 ~ /[0-9]/'"""
)
"""Its failures and its table, without the tests that were skipped: each character is an exit."""


def said_by(shell: Shell, tests: str) -> fwts_runs.Said:
    """Run `tests`. AssertionError where it fails in what is not known; else the summary is printed."""
    shell.check("rm -f /tmp/said.log")
    shell.run(f"fwts -q -w 200 --results-no-separators -r /tmp/said {tests}")
    text = shell.check(SUMMARY)
    said = fwts_runs.read(text)
    assert not said.unknown(), text
    print(text)
    return said


# Its suite moves on, and a library of another name there is no fault of ours.
@pytest.mark.skipif(not os.environ.get("HVKVM_FWTS"), reason="needs fwts: scripts/artifacts fetch fwts")
def test_fwts_fails_in_what_is_documented_only(tmp_path: Path) -> None:
    disks = [tmp_path / "nvme", tmp_path / "virtio"]
    for disk in disks:
        disk.touch()
        os.truncate(disk, 8 << 20)
    with linux_guest(
        SHELL,
        kernel="newer",
        modules=("hv_vmbus", "msr", "virtio_pci", "virtio_blk"),
        files=fwts_runs.Files.found().in_guest(),
        disks=tuple(DiskSpec(str(disk), bus=disk.name) for disk in disks),
        memory=512 << 20,
    ) as guest:
        guest.start()
        shell = Shell(guest).ready()
        acpi = said_by(shell, "--acpitests")
        assert {"fadt", "madt", "method", "checksum", "rsdp", "xsdt", "waet", "spcr"} <= acpi.ran
        assert acpi.passed > 90
        others = said_by(shell, OTHERS)
        assert {"klog", "mtrr", "dmicheck", "crs", "msr"} <= others.ran
        assert others.passed > 50
        shell.send("poweroff -f")
        assert guest.finish().clean
