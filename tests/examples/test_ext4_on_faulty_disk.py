"""A worked example: what hv_storvsc and ext4 make of BUSY, sense codes, a slow disk, and one that goes away.

One boot. The file system is made here, so the test knows at which sectors its files are.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.hyperv, pytest.mark.timeout(900)]

SLOW_SECONDS = 3
FAULTS = """
[[fault]]           # BUSY: the guest sends the write again
do = "busy"
op = "write"
times = 3
[[fault]]           # a sense code: this file cannot be read, the others can
do = "error"
op = "read"
lba = "{bad}"
sense = "medium-error"
[[fault]]           # an answer that is late
do = "delay"
op = "read"
lba = "{slow}"
seconds = {seconds}
[[fault]]           # in the middle of a write the whole controller goes
do = "rescind"
op = "write"
lba = "{last}"
"""
SCRIPT = """
    until [ -b /dev/sda ]; do sleep 0.1; done
    mount -t ext4 -o errors=remount-ro /dev/sda /mnt || exit 1
    echo kept >/mnt/new; sync; echo synced $?
    cat /mnt/bad >/dev/null 2>&1; echo bad $?
    begin=$(date +%s); cat /mnt/slow >/dev/null; echo slow $? $(($(date +%s) - begin))
    cat /mnt/good >/dev/null; echo good $?
    # The controller goes while this write is under way. Nobody may answer it: then Linux waits for ever, and
    # so would whoever waits for the end of dd's output.
    dd if=/dev/zero of=/mnt/last bs=4096 count=1 conv=notrunc,fsync </dev/null >/dev/null 2>&1 &
    until dmesg | grep -q "Aborting journal"; do sleep 0.2; done
    echo aborted
    dd if=/dev/zero of=/mnt/after bs=4096 count=1 conv=fsync 2>/dev/null; echo after $?
    dmesg
    echo that is all
"""


def made(folder: Path) -> tuple[bytes, dict[str, str]]:
    """An ext4 image, and the sectors of each of its files."""
    root = folder / "root"
    root.mkdir()
    files = {name: name.encode().ljust(8, b".") * 512 for name in ("bad", "slow", "good", "last")}
    for name, content in files.items():
        (root / name).write_bytes(content)
    image = folder / "ext4.raw"
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", root, image, "16M"],
        check=True,
        capture_output=True,
    )
    data = image.read_bytes()
    sectors = {name: data.index(content) // 512 for name, content in files.items()}
    return data, {name: f"{first}-{first + 7}" for name, first in sectors.items()}


@pytest.mark.skipif(shutil.which("mke2fs") is None, reason="needs mke2fs (the e2fsprogs package)")
def test_ext4_meets_faults(linux_guest: Callable[..., Any], disk: Callable[..., Any], tmp_path: Path) -> None:
    data, sectors = made(tmp_path)
    faulty = disk("16M", content=data, faults=FAULTS.format(**sectors, seconds=SLOW_SECONDS))
    guest = linux_guest("sh", "-c", SCRIPT, disks=[faulty], modules=["ext4"])
    guest.start()
    # Its end is not waited for: it would write back what it cannot any more.
    said = guest.wait_for_stdout("that is all\n").splitlines()
    guest.close()
    assert said[:2] == ["synced 0", "bad 1"], said
    assert said[2].startswith("slow 0 ")
    assert int(said[2].split()[-1]) >= SLOW_SECONDS - 1
    assert said[3:5] == ["good 0", "aborted"]
    assert said[5] == "after 1"  # an error at once: others do not wait
    assert "medium error" in "\n".join(said[6:]).lower()  # the sense code, in Linux's words
    # What was synced before is on the disk, once the journal is replayed.
    checked = subprocess.run(["e2fsck", "-fp", faulty.file], capture_output=True, text=True, check=False)
    assert checked.returncode in (0, 1), checked
    kept = subprocess.run(["debugfs", "-R", "cat /new", faulty.file], capture_output=True, check=True)
    assert kept.stdout == b"kept\n"
