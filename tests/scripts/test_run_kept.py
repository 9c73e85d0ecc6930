"""scripts/steps/run_kept.py, behind `make run`: first a guest with a disk is booted, then it is copied."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from guest_artifacts import artifact

RUN_KEPT = Path(__file__).resolve().parents[2] / "scripts/steps/run_kept.py"
SECONDS = 600
SAID = "this line stands on the disk"


@pytest.mark.hyperv
@pytest.mark.timeout(900)
def test_the_second_time_takes_a_copy_and_the_disk_is_there(tmp_path: Path) -> None:
    content, disk = tmp_path / "content", tmp_path / "disk.raw"
    content.mkdir()
    (content / "README").write_text(f"{SAID}\n")
    subprocess.run(["mkfs.ext4", "-q", "-d", content, disk, "16M"], check=True)
    before = disk.read_bytes()
    boot = ["--kernel", artifact("HVKVM_GUEST_KERNEL"), "--busybox", artifact("HVKVM_GUEST_BUSYBOX")]
    boot += ["--modules-dir", artifact("HVKVM_GUEST_MODULES"), "--append", "quiet", "--vmbus", "on"]
    boot += ["--disk", f"{disk},snapshot=on", "--module", "hv_storvsc", "--module", "sd_mod"]
    wait = "until mount /dev/sda /mnt 2>/dev/null; do usleep 10000; done"
    script = f"{wait}; cat /mnt/README; rm /mnt/README; exit 3"
    line = [sys.executable, RUN_KEPT, *boot, "--", "-T", "--", "sh", "-c", script]
    settings = os.environ | {"HVKVM_CACHE": str(tmp_path / "cache")}
    told = []
    for _ in range(2):
        done = subprocess.run(
            [*map(str, line)],
            input="",
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env=settings,
            check=False,
        )
        assert (done.returncode, done.stdout) == (3, f"{SAID}\n"), done
        told.append([text for text in done.stderr.splitlines() if text.startswith("run: ")])
    assert "booting a guest, which is kept" in told[0][0]
    (file,) = (tmp_path / "cache" / "warm").iterdir()
    assert f"kept in {file}" in told[0][1]
    assert len(told[1]) == 1
    assert told[1][0].startswith("run: in a copy of the guest that was booted ")
    assert str(file) in told[1][0]
    assert disk.read_bytes() == before, "snapshot=on: nothing of what a copy writes is kept"


def test_a_cache_that_takes_no_guest_is_a_line(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"some")
    line = [sys.executable, RUN_KEPT, "--kernel", kernel, "--", "--", "true"]
    settings = os.environ | {"HVKVM_CACHE": str(kernel)}
    done = subprocess.run(
        [*map(str, line)], capture_output=True, text=True, env=settings, check=False, timeout=SECONDS
    )
    assert done.returncode == 2, done
    assert done.stderr.splitlines()[1:] == [
        f"run: {kernel}/warm: Not a directory; HVKVM_WARM=off boots a guest and keeps none"
    ]
