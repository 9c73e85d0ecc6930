"""What pciutils, nvme-cli and fio say of PCI, NVMe and virtio-blk, in a Debian whose init is a shell."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from debian_guest import ON_REQUEST, copied_root
from guest_artifacts import artifact
from linux_guest import LinuxGuest
from linux_shell import SHELL, Shell

from hvkvm.machine.config import MachineConfig
from hvkvm.machine.disk_spec import DiskSpec
from hvkvm.machine.machine import Machine

pytestmark = [ON_REQUEST, pytest.mark.hyperv, pytest.mark.timeout(3600)]

MIB = 1 << 20
SIZE = 32 * MIB
FIO = (
    "fio --name=v --filename={} --direct=1 --ioengine=libaio --iodepth=32 --rw=randwrite --bsrange=4k-128k"
    " --size=24m --verify=crc32c --do_verify=1 --verify_fatal=1 --fsync=32 --minimal"
)


def in_slot(shell: Shell, slot: str, pattern: str) -> str:
    """The block device of a function, once Linux has it."""
    folder = f"/sys/bus/pci/devices/0000:00:{slot}"
    found = shell.check(f"until ls -d {folder}/{pattern} 2>/dev/null; do sleep 0.2; done")
    return "/dev/" + found.split()[-1].rpartition("/")[2]


def test_tools_have_nothing_to_complain_of(tmp_path: Path) -> None:
    root, disks = copied_root(tmp_path), [tmp_path / "nvme", tmp_path / "virtio"]
    for disk in disks:
        disk.touch()
        os.truncate(disk, SIZE)
    config = MachineConfig(
        kernel=artifact("HVKVM_GUEST_KERNEL"),
        modules_dir=artifact("HVKVM_GUEST_MODULES"),
        busybox=artifact("HVKVM_GUEST_BUSYBOX"),
        append="quiet rw init=/bin/bash",
        memory=1 << 30,
        vmbus="on",
        hpet="on",
        disks=(
            DiskSpec(str(root)),
            DiskSpec(str(disks[0]), bus="nvme"),
            DiskSpec(str(disks[1]), bus="virtio"),
        ),
    )
    with Machine(config) as machine:
        guest = LinuxGuest(machine)
        guest.start()
        guest.wait_until(lambda: "root@" in guest.text or "bash-" in guest.text, "bash's prompt")
        guest.type(SHELL)
        shell = Shell(guest).ready()
        shell.check(
            "mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev 2>/dev/null; :"
        )
        shell.check("modprobe -a nvme virtio_pci virtio_blk")
        nvme = in_slot(shell, "02.0", "nvme/nvme*/nvme*n1")
        virtio = in_slot(shell, "03.0", "virtio*/block/vd*")

        lists_functions(shell)
        reads_and_tests(shell, nvme)
        for name in (nvme, virtio):
            assert shell.check(FIO.format(name), 1800).split(";")[4] == "0", "its error field"
        assert not shell.run("dmesg | grep -iE '(nvme|virtio|vda|pci).*(error|timeout|fail|bogus)'").output
        shell.check("sync; mount -o remount,ro /; :")
        shell.send("poweroff -f")
        assert guest.finish().clean


def lists_functions(shell: Shell) -> None:
    """Every function with its capabilities, and no register that pciutils cannot make sense of."""
    listed = shell.check("lspci -vvv 2>&1")
    for words in ("440FX", "PIIX3", "PIIX4", "NVM Express", "Virtio 1.0 block device"):
        assert words in listed, listed
    nvme = listed[listed.index("00:02.0") : listed.index("00:03.0")]
    assert "MSI-X: Enable+ Count=33" in nvme, nvme
    assert "MSI: Enable- Count=1/32 Maskable+ 64bit+" in nvme, nvme
    listed = listed.replace("VirtIO: <unknown>", "")  # the window into the BAR, which is new to pciutils 3.9
    for complaint in (
        "!!!",
        "<access denied>",
        "Unknown header",
        "chain broken",
        "chain looped",
        "<unknown>",
    ):
        assert complaint not in listed, listed


def reads_and_tests(shell: Shell, name: str) -> None:
    """Logs and identification as nvme-cli decodes them, and the controller's short test of itself."""
    controller = name.removesuffix("n1")
    for command in (
        f"nvme id-ctrl {controller}",
        f"nvme id-ns {name}",
        f"nvme smart-log {controller}",
        f"nvme error-log {controller}",
        f"nvme fw-log {controller}",
        f"nvme get-feature {controller} -f 7 -H",
        f"nvme list-ns {controller}",
        f"nvme flush {name}",
        f"nvme device-self-test {controller} -n 1 -s 1",
    ):
        shell.check(f"{command} 2>&1")
    log = f"nvme self-test-log {controller} 2>&1"
    ended = f"{log} | grep -A1 'Result.0' | grep -E 'Operation Result +: 0( |$)'"
    shell.check(f"until {ended}; do sleep 0.5; {log} | head -9; done", 600)
