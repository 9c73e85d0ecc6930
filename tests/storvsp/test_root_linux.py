"""A Linux that lives on hv_storvsc, on a root that nobody named: it starts anew and goes, and loses
nothing.

The root is a busybox on an ext4 that is made here in a second; `tests/distro` has a whole distribution.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from debian_guest import fsck
from guest_artifacts import artifact
from linux_guest import LinuxGuest
from linux_shell import SHELL, Shell
from running_vm import command_line

from hvkvm.machine.config import MachineConfig
from hvkvm.machine.disk_spec import DiskSpec
from hvkvm.machine.machine import Machine

pytestmark = [pytest.mark.hyperv, pytest.mark.timeout(1800)]

MIB = 1 << 20
APPLETS = "sh mount umount cat dd echo grep md5sum mkdir od sleep stty sync true"
ADMIN = "init poweroff reboot"
FILES = {
    "etc/inittab": "::sysinit:/bin/sh /etc/begin\n::once:/bin/sh /etc/shell\n::shutdown:/bin/umount -a -r\n",
    "etc/begin": "mount -t proc proc /proc; mount -o remount,rw /; echo up >>/boots\n",
    "etc/shell": f"{SHELL}\n",
}


def root_disk(folder: Path) -> Path:
    """An ext4 of 24 MiB with a busybox in it."""
    tree, disk = folder / "tree", folder / "root.raw"
    for name in ("bin", "sbin", "etc", "dev", "proc", "sys", "mnt", "tmp"):
        (tree / name).mkdir(parents=True)
    (tree / "bin/busybox").write_bytes(artifact("HVKVM_GUEST_BUSYBOX").read_bytes())
    (tree / "bin/busybox").chmod(0o755)
    for place, names in (("bin", APPLETS), ("sbin", ADMIN)):
        for name in names.split():
            (tree / place / name).symlink_to("/bin/busybox")
    for path, text in FILES.items():
        (tree / path).write_text(text)
    made = ["mke2fs", "-q", "-t", "ext4", "-L", "small-root", "-d", tree, disk, "24M"]
    subprocess.run(made, check=True, stdin=subprocess.DEVNULL)
    return disk


def machine_of(disk: Path, socket: Path, synic: str) -> Machine:
    config = MachineConfig(
        kernel=artifact("HVKVM_GUEST_KERNEL"),
        modules_dir=artifact("HVKVM_GUEST_MODULES"),
        busybox=artifact("HVKVM_GUEST_BUSYBOX"),
        modules=("hv_utils",),
        append="quiet",
        synic=synic,
        vmbus="on",
        disks=(DiskSpec(str(disk)),),
        control=str(socket),
        timeout=1500.0,
    )
    return Machine(config)


@pytest.mark.parametrize("synic", ["kernel", "user"])
def test_root_is_found_survives_a_reset_and_is_clean_after_a_shutdown(tmp_path: Path, synic: str) -> None:
    disk, socket = root_disk(tmp_path), tmp_path / "ctl"
    with machine_of(disk, socket, synic) as machine:
        assert machine.root_note.startswith(f'root file system: ext4 "small-root" on {disk}, UUID=')
        guest = LinuxGuest(machine)
        guest.start()
        shell = Shell(guest).ready()
        assert shell.check("grep ' / ' /proc/mounts | grep -v rootfs").split()[:3] == [
            "/dev/sda",
            "/",
            "ext4",
        ]
        sums = write_and_reset(shell)
        shell.ready()
        assert shell.check("cat /boots").split() == ["up", "up"]
        assert shell.check("md5sum /kept*").split()[::2] == sums
        shell.check("echo the last word >/last")  # which nobody flushes: that is the shutdown's work
        asked = command_line("ctl", "--vm", socket, "shutdown", "--timeout", 300)
        said = subprocess.run(asked, capture_output=True, text=True, check=False)
        assert said.returncode == 0, f"{said.stderr}\n{guest.report()}"
        assert guest.finish().clean
    fsck(disk)
    kept = subprocess.run(
        ["debugfs", "-R", "cat /last", disk], capture_output=True, text=True, check=True
    ).stdout
    assert kept == "the last word\n"


def write_and_reset(shell: Shell) -> list[str]:
    """Flush files, and have the machine reset while more is being written; what they are."""
    for number in range(4):
        shell.check(f"dd if=/dev/urandom of=/kept{number} bs=64k count=8 conv=fsync 2>/dev/null")
    sums = shell.check("md5sum /kept*").split()[::2]
    assert len(set(sums)) == 4
    shell.check(
        "while :; do dd if=/dev/urandom of=/rest bs=64k count=32 conv=fsync; done >/dev/null 2>&1 &"
        " until [ -s /rest ]; do :; done"
    )
    shell.send("reboot -f")
    return sums
