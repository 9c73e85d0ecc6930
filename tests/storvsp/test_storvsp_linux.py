"""A stock Linux guest on hv_storvsc: disks of every kind, a DVD, sub-channels, units that come and go."""

from __future__ import annotations

import os
import re
from hashlib import md5
from pathlib import Path
from random import Random
from typing import Any

import pytest
from linux_guest import SECONDS, LinuxGuest, linux_guest
from linux_programs import ahead, program
from linux_shell import SHELL, Shell
from nbd_servers import qemu_nbd, serving

from hvkvm.block.image import ImageOptions
from hvkvm.block.open_image import open_image
from hvkvm.block.vhdx.create import VhdxOptions, create_vhdx
from hvkvm.cli import ctl_disk
from hvkvm.cli.ctl_client import Vm
from hvkvm.machine.disk_spec import CdromSpec, DiskSpec

pytestmark = [pytest.mark.hyperv, pytest.mark.timeout(1800)]
ahead("verify")

MIB = 1 << 20
VERIFY_MILLISECONDS = 60_000 if os.environ.get("HVKVM_SOAK") else 1500
MODULES = ("hv_vmbus", "hv_utils", "hv_storvsc", "sd_mod", "sr_mod")
EXPECTED = re.compile(
    r"Power-on or device reset occurred|SRSO|Speculative|RETBleed|Spectre|MDS|TAA|MMIO|unpatched|nocrs"
    r"|supports timestamps until|cmd 0x35 status: scsi 0x0 srb 0x20|timing out command, waited 0s"
    r"|tsc|TSC|clocksource|report a bug|mitigation|loading out-of-tree|VM-SMC|capacity change"
    r"|interrupt took"
)
"""Warnings that none of our disks is behind, what any new disk says, Linux's last flush of a removed one."""


def random_file(path: Path, size: int, seed: int = 1) -> bytes:
    data = Random(seed).randbytes(size)
    path.write_bytes(data)
    return data


def digest(data: bytes) -> str:
    return md5(data, usedforsecurity=False).hexdigest()


def name_of(shell: Shell, host: int, lun: int) -> str:
    """The block device of a LUN, once the guest has it."""
    folder = f"/sys/bus/scsi/devices/{host}:0:0:{lun}/block"
    return shell.check(f"until ls {folder} 2>/dev/null | grep .; do sleep 0.1; done").split()[-1]


def hosts(shell: Shell) -> tuple[int, int]:
    """Linux's numbers of both controllers, of which either may be 0: it probes both at once."""
    found = shell.check("until ls -d /sys/bus/scsi/devices/*:0:0:7 2>/dev/null; do sleep 0.1; done")
    first = int(found.split()[-1].rpartition("/")[2].partition(":")[0])
    return first, 1 - first


def verify(shell: Shell, name: str) -> None:
    """Four jobs of depth 32 find what they wrote, while parts are flushed, discarded and zeroed."""
    told = shell.check(f"/verify /dev/{name} 4 32 {MIB} {VERIFY_MILLISECONDS}")
    found = re.findall(r"^verify: job \d: (\d+) writes (\d+) reads (\d+) flushes", told, re.MULTILINE)
    assert len(found) == 4, told
    assert all(int(writes) for writes, _reads, _flushes in found), told


def use_file_system(shell: Shell, device: str) -> None:
    """Make one, fill it, find it again after a mount, and throw it away."""
    # Blocks of a page, or each of the tables' blocks has its page read first, one after the other.
    shell.check(f"mke2fs -b 4096 /dev/{device} >/dev/null")
    shell.check(f"mkdir -p /m; mount -t ext4 /dev/{device} /m")
    shell.check("dd if=/dev/urandom of=/m/data bs=64k count=64 conv=fsync 2>/dev/null")
    shell.check("for n in $(seq 40); do cp /init /m/f$n; done; sync")
    before = shell.check("md5sum /m/data").split()[0]
    shell.check(f"umount /m; echo 3 > /proc/sys/vm/drop_caches; mount -t ext4 /dev/{device} /m")
    assert shell.check("md5sum /m/data").split()[0] == before
    shell.check("cmp /init /m/f40; umount /m")


def no_complaints(shell: Shell) -> None:
    """Nothing of level warning or worse in the kernel's log that disks are behind."""
    lines = [
        line
        for line in shell.check("dmesg -r | grep -v '^<[5-7]>' || true").splitlines()
        if re.search(r"scsi|storvsc|\bsd|\bsr|blk|I/O error|vmbus|ext4|WARNING|BUG", line, re.IGNORECASE)
        and not EXPECTED.search(line)
    ]
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize(("synic", "kernel", "cpus"), [("kernel", "stable", 4), ("user", "newer", 2)])
def test_disks_of_every_kind(tmp_path: Path, synic: str, kernel: str, cpus: int) -> None:
    raw, vhdx, other, iso = (tmp_path / name for name in ("d.raw", "d.vhdx", "n.raw", "cd.iso"))
    random_file(raw, 48 * MIB)
    create_vhdx(vhdx, VhdxOptions(64 * MIB))
    random_file(other, 32 * MIB, 2)
    medium = random_file(iso, 3 * MIB, 3)
    small = [tmp_path / f"small{number}.raw" for number in range(4)]
    for number, file in enumerate(small):
        file.write_bytes(bytes([number + 1]) * MIB)
    socket = tmp_path / "nbd"
    with serving(qemu_nbd(other, socket), socket):
        disks = (
            DiskSpec(str(raw), serial="first"),
            DiskSpec(str(vhdx)),
            DiskSpec(f"nbd:unix:{socket}", lun=7),
            DiskSpec(str(iso), "raw", readonly=True, controller=1),
            *(DiskSpec(str(file), controller=1) for file in small),
        )
        settings: dict[str, Any] = {"disks": disks, "cdroms": (CdromSpec(str(iso)),), "cpus": cpus}
        settings["files"] = {"/verify": program("verify")}
        settings["control"] = str(tmp_path / "ctl")
        with linux_guest(SHELL, kernel=kernel, synic=synic, modules=MODULES, **settings) as guest:
            guest.start()
            shell = Shell(guest).ready()
            shell.check("dmesg -n 1")
            first, second = hosts(shell)
            names = [name_of(shell, first, lun) for lun in (0, 1, 7)]
            read_only = name_of(shell, second, 0)
            assert shell.check(f"md5sum /dev/{names[0]}").split()[0] == digest(raw.read_bytes())
            assert shell.check(f"md5sum /dev/{names[2]}").split()[0] == digest(other.read_bytes())
            assert shell.check(f"md5sum /dev/{read_only}").split()[0] == digest(medium)
            assert shell.check(f"cat /sys/block/{read_only}/ro").strip() == "1"
            assert shell.check("md5sum /dev/sr0").split()[0] == digest(medium)
            for number in range(len(small)):
                name = name_of(shell, second, 1 + number)
                assert shell.check(f"tail -c 2 /dev/{name} | od -An -tx1").split() == [f"0{number + 1}"] * 2
            for name in names:
                verify(shell, name)
                use_file_system(shell, name)
            see_sub_channels(guest, shell, names[0], cpus)
            come_and_go(guest, shell, tmp_path, first)
            no_complaints(shell)
            change_medium(shell, tmp_path)
            shell.send("exit 0")
            assert guest.finish().clean
    assert raw.read_bytes()[1080:1082] == b"\x53\xef", "the file system's magic is not in the raw file"
    image = open_image(str(vhdx), ImageOptions(read_only=True))
    head = memoryview(bytearray(4096))
    image.readv(0, [head])
    assert bytes(head[1080:1082]) == b"\x53\xef"
    image.close()


def see_sub_channels(guest: LinuxGuest, shell: Shell, name: str, cpus: int) -> None:
    """Linux has asked for one a CPU beside the first, and its requests come by all of them."""
    device = guest.bus.devices["scsi0"].device
    guest.wait_until(lambda: device.inspect()["channels"] == cpus, "sub-channels to be opened")
    before = dict(device.inspect()["requests"])
    for cpu in range(cpus):
        shell.check(
            f"taskset -c {cpu} dd if=/dev/{name} of=/dev/null bs=4k count=64 iflag=direct 2>/dev/null"
        )
    after = device.inspect()["requests"]
    assert all(after[index] > before[index] for index in range(cpus)), (before, after)


def come_and_go(guest: LinuxGuest, shell: Shell, folder: Path, host: int) -> None:
    """A disk is added, grows, and is taken away while the guest looks."""
    disks = guest.machine.disks
    assert disks is not None
    file = folder / "added.raw"
    data = random_file(file, 8 * MIB, 4)
    spec = DiskSpec(str(file))
    added = guest.call(lambda: disks.attach(spec, disks.open(spec)))
    name = name_of(shell, host, added.lun)
    assert shell.check(f"md5sum /dev/{name}").split()[0] == digest(data)
    results: list[Any] = []
    assert added.disk is not None
    guest.call(added.disk.resize, 16 * MIB, results.append)
    guest.wait_until(lambda: results, "the resize")
    guest.call(disks.controller(0).rescan)
    shell.check(f"until [ $(cat /sys/block/{name}/size) = 32768 ]; do sleep 0.1; done")
    gone: list[Any] = []
    guest.call(disks.remove, added.name, gone.append)
    shell.check(f"until [ ! -e /sys/block/{name} ]; do sleep 0.1; done")
    guest.wait_until(lambda: gone, "the image to be closed")
    assert gone[0].status.name == "OK"


def change_medium(shell: Shell, folder: Path) -> None:
    """The guest sees its medium go, as by the drive's button, and reads the next: `hvkvm ctl disk`."""
    iso = folder / "next.iso"
    data = random_file(iso, MIB, 6)

    def ask(what: str, *words: str) -> Any:
        vm = Vm(folder / "ctl")
        try:
            return vm.ask("disk", SECONDS, **ctl_disk.request(what, list(words), cdrom=False, force=False))
        finally:
            vm.close()

    ask("eject", "cdrom0")
    shell.check("until ! head -c 2048 /dev/sr0 >/dev/null 2>&1; do sleep 0.1; done")
    ask("insert", "cdrom0", str(iso))
    shell.check(f"until md5sum /dev/sr0 2>/dev/null | grep {digest(data)}; do sleep 0.1; done")
    assert shell.check("cat /sys/block/sr0/size").strip() == str(MIB // 512)
