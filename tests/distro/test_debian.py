"""A whole distribution lives on hv_storvsc: it boots from its disk, works its others hard, and loses nothing.

One boot of a systemd costs a minute and more in the lab, so what needs a distribution's programs is in one
test: fio's own verifier, file systems under load, and disks that come, go and grow by `hvkvm ctl disk`.
HVKVM_SOAK=1 works them for five minutes each, HVKVM_STRESS_SECONDS for as long as it says, and
HVKVM_STRESS_ONLY=xfs does nothing beside that load on that file system.
"""

from __future__ import annotations

import os
import re
import subprocess
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from zlib import compress

import pytest
from debian_guest import ON_REQUEST, copied_root, debian_guest, fsck, logged_in
from linux_guest import LinuxGuest
from linux_shell import Shell
from nbd_servers import qemu_nbd, serving
from running_vm import command_line

from hvkvm.block.vhdx.create import VhdxOptions, create_vhdx
from hvkvm.machine.disk_spec import DiskSpec

pytestmark = [ON_REQUEST, pytest.mark.hyperv, pytest.mark.timeout(7200)]

MIB = 1 << 20
SOAK = bool(os.environ.get("HVKVM_SOAK"))
STRESS_SECONDS = int(os.environ.get("HVKVM_STRESS_SECONDS", "300" if SOAK else "5"))
STRESS_ONLY = os.environ.get("HVKVM_STRESS_ONLY", "")
STRESS = Path(__file__).with_name("fs_stress.py")

FIO = f"""[global]
ioengine=libaio
direct=1
iodepth=32
bsrange=4k-64k
rw=randrw
rwmixread=30
verify=crc32c
verify_fatal=1
fsync=16
size={"8m" if SOAK else "2m"}
{"time_based=1" if SOAK else ""}
{f"runtime={STRESS_SECONDS}" if SOAK else ""}
[a]
offset=0
[b]
offset=8m
[c]
offset=16m
[d]
offset=24m
"""
"""Four jobs of depth 32, each with a range of its own, that flush; discards and zeroes go on beside them.

2 MiB a job: an emulated host that is busy took ten minutes for 8, and all of it is written and read again.
"""


class Asker:
    """`hvkvm ctl` on one machine."""

    def __init__(self, guest: LinuxGuest, socket: Path) -> None:
        self._guest = guest
        self._socket = socket

    def __call__(self, *words: object) -> str:
        """What it printed; the guest runs meanwhile."""
        line = command_line("ctl", "--vm", self._socket, *words)
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}: {done.stderr}\n{self._guest.report()}"
        return done.stdout.strip()


@pytest.fixture
def cleared() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_distribution_on_its_disk(tmp_path: Path, cleared: ExitStack) -> None:
    root = copied_root(tmp_path)
    raw, vhdx, served = tmp_path / "d.raw", tmp_path / "d.vhdx", tmp_path / "n.raw"
    for file in (raw, served):
        file.touch()
        os.truncate(file, 384 * MIB)
    create_vhdx(vhdx, VhdxOptions(384 * MIB))
    nbd = tmp_path / "nbd"
    cleared.enter_context(serving(qemu_nbd(served, nbd), nbd))
    disks = (DiskSpec(str(raw)), DiskSpec(str(vhdx)), DiskSpec(f"nbd:unix:{nbd}", controller=1))
    socket = tmp_path / "ctl"
    guest = cleared.enter_context(debian_guest(root, *disks, control=str(socket)))
    assert guest.machine.root_note.startswith(f'root file system: ext4 "hvkvm-root" on {root}, UUID=')
    shell = logged_in(guest)
    ask = Asker(guest, socket)

    boots_from_its_own_disk(shell)
    assert "hvkvm-root: clean" in guest.text  # its initramfs has checked it
    put(shell, STRESS.read_bytes(), "/tmp/fs_stress.py")
    put(shell, FIO.encode(), "/tmp/job")
    first, second = hosts(shell)
    names = [name_at(shell, host, lun) for host, lun in ((first, 1), (first, 2), (second, 0))]
    if not STRESS_ONLY:
        complies(shell, names[0])
        for name in names:
            verifies(shell, name)
    for name, system in zip(names, ("ext4", "xfs", "btrfs"), strict=True):
        if STRESS_ONLY in ("", system):
            survives_stress(shell, name, system)
    if not STRESS_ONLY:
        come_and_go(shell, ask, tmp_path, first)

    ask("shutdown", "--timeout", 300)
    assert guest.finish(1800).clean
    assert "hvkvm-root: " in fsck(root)


def hosts(shell: Shell) -> tuple[int, int]:
    """Linux's numbers of both controllers, of which either may be 0: only the first has a LUN 2."""
    found = shell.check("until ls -d /sys/bus/scsi/devices/*:0:0:2 2>/dev/null; do sleep 0.2; done")
    first = int(found.split()[-1].rpartition("/")[2].partition(":")[0])
    return first, 1 - first


def name_at(shell: Shell, host: int, lun: int) -> str:
    """The block device of a unit, once the guest has it."""
    folder = f"/sys/bus/scsi/devices/{host}:0:0:{lun}/block"
    return shell.check(f"until ls {folder} 2>/dev/null | grep .; do sleep 0.2; done").split()[-1]


UNPACK = (
    "import sys, zlib, base64 as b; sys.stdout.buffer.write(zlib.decompress(b.b64decode(sys.stdin.read())))"
)


def put(shell: Shell, data: bytes, path: str) -> None:
    """A small file, typed into the guest's console."""
    text = b64encode(compress(data, 9)).decode()
    shell.check(f"rm -f {path}.64")
    for at in range(0, len(text), 512):  # a terminal's line holds 4095
        shell.check(f"echo {text[at : at + 512]} >>{path}.64")
    shell.check(f"python3 -c '{UNPACK}' <{path}.64 >{path}")


def boots_from_its_own_disk(shell: Shell) -> None:
    source, kind = shell.check("findmnt -no SOURCE,FSTYPE /").split()
    assert source.startswith("/dev/sd")  # which one it is depends on which controller Linux found first
    assert kind == "ext4"
    assert "hv_storvsc" in shell.check("lsmod")
    assert shell.check("systemctl --failed --no-legend --plain").strip() == ""


SG_COMMANDS = """sg_turs
sg_inq
sg_inq --descriptors
sg_vpd --all
sg_vpd --page=sv
sg_vpd --page=sn
sg_vpd --page=di
sg_vpd --page=bl
sg_vpd --page=bdc
sg_vpd --page=lbpv
sg_readcap
sg_readcap --long
sg_modes --all
sg_modes --all --six
sg_luns
sg_requests
sg_requests --desc
sg_verify --lba=0 --count=8
sg_sync
sg_start --start
sg_senddiag --test
sg_write_same --lba=64 --num=8
sg_write_same --10 --lba=64 --num=8
sg_write_same --16 --unmap --lba=128 --num=64
sg_write_same --16 --ndob --lba=128 --num=64
sg_unmap --force --lba=2048 --num=2048
sg_get_lba_status --lba=0
sg_seek
sdparm --inquiry --all
sdparm --command=capacity
sdparm --command=ready""".splitlines()
NOT_HERE = ("sg_opcodes", "sg_get_lba_status --lba=0")
"""Commands that no disk has to have: answered as not supported (9), or by an invalid field (5)."""
COMPLAINTS = re.compile(
    r"malformed|too short|truncated|invalid|unexpected|mismatch|corrupt|bad ", re.IGNORECASE
)


def complies(shell: Shell, name: str) -> None:
    """What sg3_utils and sdparm ask of a disk they get, whole and in form."""
    for command in SG_COMMANDS:
        done = shell.run(f"{command} /dev/{name} 2>&1")
        if command in NOT_HERE:
            assert done.status in (0, 5, 9), (command, done)
        else:
            assert done.status == 0, (command, done)
            assert not COMPLAINTS.search(done.output), (command, done)
    assert shell.run(f"sg_opcodes /dev/{name} 2>&1").status in (5, 9)
    # Linux's hv_storvsc makes a success without data of every MODE SENSE that fails, and so whoever asks for
    # a page that is not there, or for saved values, meets an answer without a header.
    absent = shell.check(f"sg_raw -r 252 /dev/{name} 5a 00 02 00 00 00 00 00 fc 00 2>&1 || true")
    masked = "No data received" in absent
    assert masked or "Illegal Request" in absent
    assert shell.run(f"sdparm --all /dev/{name} 2>&1").status in ((97, 99) if masked else (0,))


def verifies(shell: Shell, name: str) -> None:
    """fio writes patterns and finds them, while a part of the disk is discarded and zeroed over and over."""
    shell.check(
        f"rm -f /tmp/done /tmp/ended; ( (while [ ! -e /tmp/done ]; do blkdiscard -o 64M -l 16M /dev/{name};"
        f" blkdiscard -z -o 96M -l 1M /dev/{name}; sleep 0.1; done; touch /tmp/ended) &)"
    )
    fio = f"fio --eta=never --filename=/dev/{name} /tmp/job --output=/tmp/fio.log"
    shell.check(f"{fio} || {{ cat /tmp/fio.log; false; }}", STRESS_SECONDS + 1800)
    shell.check("touch /tmp/done; until [ -e /tmp/ended ]; do sleep 0.2; done")
    assert shell.check("grep -c 'err= 0' /tmp/fio.log").strip() == "4"


def survives_stress(shell: Shell, name: str, system: str) -> None:
    """Files changed at random are as they must be, after a mount anew and by its own checker."""
    shell.check(f"mkfs.{system} -q {'-F' if system == 'ext4' else '-f'} /dev/{name} && mkdir -p /m")
    shell.check(f"mount -o discard /dev/{name} /m")
    shell.check(f"python3 /tmp/fs_stress.py /m {STRESS_SECONDS} {system}", STRESS_SECONDS + 1200)
    shell.check(f"umount /m; mount /dev/{name} /m; python3 /tmp/fs_stress.py /m check; umount /m")
    checker = {"ext4": "e2fsck -fn", "xfs": "xfs_repair -n", "btrfs": "btrfs check --readonly"}[system]
    shell.check(f"{checker} /dev/{name}")


def come_and_go(shell: Shell, ask: Asker, folder: Path, host: int) -> None:
    added, iso = folder / "added.raw", folder / "x.iso"
    added.write_bytes(b"\1" * (8 * MIB))
    iso.write_bytes(b"\2" * MIB)
    assert ask("disk", "add", f"{added},lun=9") == "disk4: controller 0, LUN 9"
    name = name_at(shell, host, 9)
    assert shell.check(f"head -c 4 /dev/{name} | od -An -tx1").split() == ["01"] * 4
    ask("disk", "resize", "disk4", "16M")
    shell.check(f"until [ $(cat /sys/block/{name}/size) = 32768 ]; do sleep 0.2; done")
    assert "is gone" in ask("disk", "remove", "disk4")
    shell.check(f"until [ ! -e /sys/block/{name} ]; do sleep 0.2; done")
    assert ask("disk", "add", "--cdrom", "none,lun=10") == "cdrom0: controller 0, LUN 10"
    drive = name_at(shell, host, 10)
    ask("disk", "insert", "cdrom0", iso)
    read = f"dd if=/dev/{drive} bs=4 count=1 2>/dev/null | od -An -tx1"
    assert shell.check(f"until {read} | grep 02; do sleep 0.2; done").split()[-4:] == ["02"] * 4
    assert ask("disk", "eject", "--force", "cdrom0") == "cdrom0 is empty"
    shell.check(
        f"until ! dd if=/dev/{drive} of=/dev/null bs=2048 count=1 iflag=direct 2>/dev/null; do :; done"
    )
    stats = ask("disk", "stats", "disk1")
    assert "write" in stats
