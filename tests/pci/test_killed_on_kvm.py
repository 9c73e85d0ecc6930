"""The VMM is killed while its guest writes to NVMe by exits of its own: what was flushed is there.

As `tests/distro/test_killed.py`, with a guest of a few instructions in place of a Linux: on any KVM.
HVKVM_DISK_KILLS=N says how often for each kind of image; 200 times in a soak.
"""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import nvme_writer
import pytest
from killed_disks import KINDS, KilledDisks
from vmm_killer import vmm_killer

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(0 if os.environ.get("HVKVM_SOAK") else 600)]

KILLS = int(os.environ.get("HVKVM_DISK_KILLS", "200" if os.environ.get("HVKVM_SOAK") else "4"))
MOST_BATCHES = 40


def test_what_was_flushed_survives_sigkill(tmp_path: Path) -> None:
    chance = Random(os.environ.get("HVKVM_SEED", "1"))
    told = dict.fromkeys(KINDS, 0)
    with vmm_killer(nvme_writer.__file__, 1, len(KINDS) * KILLS) as killer:
        for kind in KINDS:
            folder = tmp_path / kind
            folder.mkdir()
            disks = KilledDisks(folder, (kind,))
            for seed in range(1, KILLS + 1):
                if not chance.randrange(3):
                    disks.renew()
                (stable,) = killer.kill_one(f"{disks.files[kind]}\t{seed}", chance, MOST_BATCHES)
                disks.check(kind, seed, stable, chance)
                told[kind] += stable
            print(f"{KILLS} kills, {kind}: {told[kind]} batches were told to be stable", flush=True)
    assert all(told.values()), told
