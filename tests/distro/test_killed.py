"""The VMM is killed while its Linux writes: what the guest was told is stable is on the disks afterwards.

A stock Linux is booted once and saved where it is about to write. Each round goes on from there, in a VMM of
its own with three disks on hv_storvsc (raw, VHDX, and a VHDX on a parent), which are written at a time: in
batches of writes, with FUA or a flush, with the next batch in flight meanwhile, and with discards. The VMM is
killed by SIGKILL at some moment of that. Most rounds go on with the disks as the last one left them, the log
of a VHDX still to be replayed, by the next VMM or by a reader in between.

HVKVM_DISK_KILLS=N says how often; 200 times in a soak. `tests/pci` has the same with NVMe, on any KVM.
"""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import forked_vmm
import pytest
from debian_guest import ON_REQUEST
from killed_disks import KINDS, KilledDisks
from linux_guest import linux_guest
from linux_programs import ahead, program
from vmm_killer import vmm_killer

from hvkvm.machine.disk_spec import DiskSpec

pytestmark = [ON_REQUEST, pytest.mark.hyperv, pytest.mark.timeout(7 * 24 * 3600)]
ahead("stable")

KILLS = int(os.environ.get("HVKVM_DISK_KILLS", "200" if os.environ.get("HVKVM_SOAK") else "5"))
MOST_BATCHES = 30

SCRIPT = """
dmesg -n 1
disk() { echo /dev/$(ls /sys/bus/scsi/devices/0:0:0:$1/block); }
for lun in 0 1 2; do until [ -b "$(disk $lun 2>/dev/null)" ]; do usleep 100000; done; done
exec /stable $(disk 0) $(disk 1) $(disk 2)
"""


def test_what_was_flushed_survives_sigkill(tmp_path: Path) -> None:
    disks = KilledDisks(tmp_path)
    saved = tmp_path / "vm"
    with linux_guest(
        SCRIPT,
        modules=("hv_vmbus", "hv_storvsc", "sd_mod"),
        files={"/stable": program("stable")},
        disks=tuple(DiskSpec(str(file)) for file in disks.files.values()),
    ) as guest:
        guest.start()
        guest.wait_for("ready")
        guest.machine.save(saved, end=True)
        assert guest.finish().detail.startswith("saved")
    chance = Random(os.environ.get("HVKVM_SEED", "1"))
    told = [0] * len(KINDS)
    with vmm_killer(forked_vmm.__file__, len(KINDS), KILLS) as killer:
        for number in range(1, KILLS + 1):
            if not chance.randrange(3):
                disks.renew()
            stable = killer.kill_one(f"{saved}\t{number}", chance, MOST_BATCHES)
            for lun, kind in enumerate(KINDS):
                disks.check(kind, number * len(KINDS) + lun, stable[lun], chance)
            told = [sum(pair) for pair in zip(told, stable, strict=True)]
            print(f"kill {number}: batches that were told to be stable {stable}, in all {told}", flush=True)
    assert all(told), told
