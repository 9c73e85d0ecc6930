"""What Linux makes of disks that fail on purpose; and of eight disks on two controllers with four CPUs."""

from __future__ import annotations

from hashlib import md5
from pathlib import Path
from random import Random

import pytest
from debian_guest import ON_REQUEST
from linux_guest import linux_guest
from linux_shell import SHELL, Shell

from hvkvm.devices.scsi.faulty import FaultyDisk
from hvkvm.machine.disk_spec import DiskSpec

pytestmark = [ON_REQUEST, pytest.mark.hyperv, pytest.mark.timeout(1800)]

MIB = 1 << 20
SECTOR = 512
MODULES = ("hv_vmbus", "hv_utils", "hv_storvsc", "sd_mod")
FAULTS = """
[[fault]]
do = "error"
op = "read"
lba = "2048-2055"
[[fault]]
do = "busy"
op = "write"
lba = "3000"
times = 3
[[fault]]
do = "delay"
op = "read"
lba = "4000"
seconds = 0.5
[[fault]]
do = "torn"
lba = "5000"
good = true
[[fault]]
do = "error"
op = "write"
lba = "5500"
sense = "no-space"
"""


def test_linux_and_disks_that_fail(tmp_path: Path) -> None:
    data = Random(1).randbytes(4 * MIB)
    (tmp_path / "faults.toml").write_text(FAULTS)
    specs = []
    for number in range(8):
        file = tmp_path / f"{number}.raw"
        file.write_bytes(data)
        faults = tmp_path / "faults.toml" if number == 7 else None
        specs.append(DiskSpec(str(file), controller=number // 4, faults=faults))
    with linux_guest(SHELL, modules=MODULES, cpus=4, disks=tuple(specs)) as guest:
        guest.start()
        shell = Shell(guest).ready()
        shell.check("dmesg -n 1")
        names = [name_of(shell, number // 4, number % 4) for number in range(8)]
        reads_all_at_once(shell, names[:7], md5(data, usedforsecurity=False).hexdigest())
        fails_as_told(shell, names[7], data)
        unit = guest.machine.parts.disk_shelf.disks.attached["disk7"].unit  # type: ignore[union-attr]
        assert isinstance(unit, FaultyDisk)
        rules = guest.call(unit.plan.inspect)["rules"]
        assert isinstance(rules, list)
        assert all(rule["faults"] for rule in rules[:5]), rules
        shell.send("exit 0")
        assert guest.finish().clean
    torn = (tmp_path / "7.raw").read_bytes()[5000 * SECTOR : 5008 * SECTOR]
    assert torn == bytes(SECTOR) + data[5001 * SECTOR : 5008 * SECTOR]


def name_of(shell: Shell, host: int, lun: int) -> str:
    folder = f"/sys/bus/scsi/devices/{host}:0:0:{lun}/block"
    return shell.check(f"until ls {folder} 2>/dev/null | grep .; do sleep 0.1; done").split()[-1]


def reads_all_at_once(shell: Shell, names: list[str], wanted: str) -> None:
    jobs = " ".join(
        f"taskset -c {number % 4} md5sum /dev/{name} >/tmp/{name} &" for number, name in enumerate(names)
    )
    shell.check(f"{jobs} wait")
    for name in names:
        assert shell.check(f"cat /tmp/{name}").split()[0] == wanted


def sectors(name: str, lba: int, *, write: bool = False) -> str:
    """Eight sectors, past the page cache."""
    if write:
        return f"dd if=/dev/zero of=/dev/{name} bs=4096 seek={lba * SECTOR} count=1 oflag=direct,seek_bytes"
    return f"dd if=/dev/{name} bs=4096 skip={lba * SECTOR} count=1 iflag=direct,skip_bytes"


def fails_as_told(shell: Shell, name: str, data: bytes) -> None:
    failed = shell.run(f"{sectors(name, 2048)} 2>&1 >/dev/null")
    assert failed.status != 0
    assert "No data available" in failed.output  # what Linux makes of a medium error
    shell.check("dmesg | grep 'Medium Error'")
    good = shell.check(f"{sectors(name, 2056)} 2>/dev/null | md5sum").split()[0]
    assert good == md5(data[2056 * SECTOR : 2064 * SECTOR], usedforsecurity=False).hexdigest()
    # Linux sends a command again that was answered BUSY, and waits for one that takes its time.
    shell.check(f"{sectors(name, 3000, write=True)} 2>/dev/null")
    shell.check(f"{sectors(name, 4000)} 2>/dev/null >/dev/null")
    shell.check(f"{sectors(name, 5000, write=True)} 2>/dev/null")
    full = shell.run(f"{sectors(name, 5500, write=True)} 2>&1 >/dev/null")
    assert full.status != 0
    assert "No space left" in full.output or "Remote I/O" in full.output or "I/O error" in full.output
