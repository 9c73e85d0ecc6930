"""A root file system on hv_storvsc with no initrd of its own: our init mounts it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from debian_guest import ON_REQUEST, copied_root, fsck
from guest_artifacts import artifact
from linux_guest import LinuxGuest
from linux_shell import SHELL, Shell

from hvkvm.machine.config import MachineConfig
from hvkvm.machine.disk_spec import DiskSpec
from hvkvm.machine.machine import Machine

pytestmark = [ON_REQUEST, pytest.mark.hyperv, pytest.mark.user_synic, pytest.mark.timeout(1800)]


def test_root_is_mounted_and_written_to_on_the_user_synic(tmp_path: Path) -> None:
    root = copied_root(tmp_path)
    config = MachineConfig(
        kernel=artifact("HVKVM_GUEST_KERNEL"),
        modules_dir=artifact("HVKVM_GUEST_MODULES"),
        busybox=artifact("HVKVM_GUEST_BUSYBOX"),
        append="quiet rw init=/bin/bash",
        synic="user",
        vmbus="on",
        disks=(DiskSpec(str(root)),),
    )
    with Machine(config) as machine:
        guest = LinuxGuest(machine)
        guest.start()
        guest.wait_until(lambda: "root@" in guest.text or "bash-" in guest.text, "bash's prompt")
        guest.type(SHELL)
        shell = Shell(guest).ready()
        shell.check("mount -t proc proc /proc")
        assert shell.check("grep ' / ' /proc/mounts | grep -v rootfs").split()[:4:2] == ["/dev/sda", "ext4"]
        shell.check("seq 100000 >/root/numbers && sync && md5sum /root/numbers")
        shell.check("mount -o remount,ro /dev/sda /")  # by fstab it would look for a label, without udev
        shell.send("poweroff -f")
        assert guest.finish().clean
    fsck(root)
    seen = subprocess.run(
        ["debugfs", "-R", "cat /root/numbers", root], capture_output=True, text=True, check=True
    ).stdout
    assert seen.split() == [str(number) for number in range(1, 100001)]
