"""The VMM is killed while its guest writes: what the guest was told is stable is on the disk afterwards.

HVKVM_SOAK=1 kills it two hundred times for each kind of image.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from random import Random
from time import monotonic, sleep

import pytest
from debian_guest import ON_REQUEST
from guest_artifacts import artifact
from running_vm import SECONDS, RunningVm, running_vm

from hvkvm.block.image import ImageOptions
from hvkvm.block.open_image import open_image
from hvkvm.block.vhdx.create import VhdxOptions, create_vhdx

pytestmark = [ON_REQUEST, pytest.mark.hyperv, pytest.mark.timeout(7 * 24 * 3600)]

MIB = 1 << 20
KILLS = 200 if os.environ.get("HVKVM_SOAK") else 1
PLACES = 16384
STEP = 257
"""Records lie all over the disk, so that a VHDX has to note new blocks."""

# The second loop keeps other writes in flight: the kill then meets a VHDX at work.
SCRIPT = f"""until [ -b /dev/sda ]; do usleep 10000; done
while :; do
	dd if=/dev/urandom of=/dev/sda bs=256k seek=$((256 + RANDOM % 256)) count=4 oflag=direct
done 2>/dev/null &
n=0
while :; do
	n=$((n + 1))
	place=$((n * {STEP} % {PLACES}))
	printf 'record %08d' $n | dd of=/dev/sda bs=4096 seek=$place conv=sync,notrunc,fsync 2>/dev/null
	echo "stable $n"
done
"""


@pytest.mark.parametrize("kind", ["raw", "vhdx"])
def test_what_was_flushed_survives_sigkill(tmp_path: Path, kind: str) -> None:
    chance = Random(kind)
    for number in range(KILLS):
        folder = tmp_path / str(number)
        folder.mkdir()
        image = folder / f"disk.{kind}"
        if kind == "vhdx":
            create_vhdx(image, VhdxOptions(192 * MIB, block_size=MIB))
        else:
            image.touch()
            os.truncate(image, 192 * MIB)
        stable = write_and_be_killed(folder, image, chance.randint(5, 60), chance.random() / 10)
        check(image, stable)
        image.unlink()


def write_and_be_killed(folder: Path, image: Path, records: int, pause: float) -> int:
    """The last record that the guest was told is stable, as far as we heard before we killed it."""
    options = (
        *("--kernel", artifact("HVKVM_GUEST_KERNEL"), "--modules-dir", artifact("HVKVM_GUEST_MODULES")),
        *("--busybox", artifact("HVKVM_GUEST_BUSYBOX"), "--vmbus", "on", "--append", "quiet"),
        *("--synic", os.environ.get("HVKVM_SYNIC") or "kernel", "--disk", image),
        *("--module", "hv_storvsc", "--module", "sd_mod", "-T", "--", "sh", "-c", SCRIPT),
    )
    with running_vm(folder, *options) as vm:
        end = monotonic() + SECONDS
        while told(vm) < records:
            assert vm.process.poll() is None, vm.report()
            assert monotonic() < end, vm.report()
            sleep(0.01)
        sleep(pause)  # anywhere within a record
        vm.process.kill()
        vm.finish()
        return told(vm)


def told(vm: RunningVm) -> int:
    found = re.findall(r"^stable (\d+)\n", vm.text, re.MULTILINE)
    return int(found[-1]) if found else 0


def check(path: Path, stable: int) -> None:
    assert 0 < stable < PLACES
    image = open_image(str(path), ImageOptions())  # replays the log of a VHDX
    try:
        block = memoryview(bytearray(4096))
        for number in range(1, stable + 1):
            image.readv(number * STEP % PLACES * 4096, [block])
            assert bytes(block[:15]) == b"record %08d" % number, f"record {number} of {stable} is lost"
    finally:
        image.close()
