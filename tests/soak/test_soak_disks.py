"""Long runs of the disks (`make soak`, HVKVM_SOAK=1): the suite's own tests, with what takes long.

Each is a run of pytest with the variable that makes it long; HVKVM_SOAK_SCALE shortens all of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(
        not os.environ.get("HVKVM_SOAK"), reason="a long run: set HVKVM_SOAK=1 or use make soak"
    ),
    pytest.mark.timeout(0),
]

SCALE = float(os.environ.get("HVKVM_SOAK_SCALE", "1"))
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("tests", "lengths"),
    [
        (
            "tests/block/test_vhdx_damage.py::test_mutated_files_are_one_error_and_stay_as_they_are",
            {"HVKVM_VHDX_MUTATIONS": 34_000},
        ),
        ("tests/block/test_vhdx_crash.py", {"HVKVM_CRASH_SEEDS": 40, "HVKVM_CRASH_STEPS": 40}),
        ("tests/block/test_raw_crash.py", {"HVKVM_CRASH_SEEDS": 20, "HVKVM_CRASH_REQUESTS": 2000}),
        ("tests/block/test_disk_killed.py", {"HVKVM_DISK_KILLS": 200}),
        ("tests/pci/test_killed_on_kvm.py", {"HVKVM_DISK_KILLS": 200}),
        ("tests/block/test_disk_patterns.py", {"HVKVM_PATTERN_REQUESTS": 200_000}),
        ("tests/scsi/test_scsi_hostile.py::test_a_storm_of_commands", {"HVKVM_SCSI_COMMANDS": 10_000_000}),
        ("tests/storvsp/test_storvsp_hostile.py::test_a_storm", {"HVKVM_STORVSP_STEPS": 1_500_000}),
        ("tests/storvsp/test_storvsp_saved.py", {"HVKVM_SAVED_SEEDS": 1000}),
        ("tests/pci/test_storms.py", {"HVKVM_PCI_STEPS": 2_000_000}),
    ],
    ids=["damage", "crash", "raw", "killed", "killed-vmm", "patterns", "scsi", "storvsp", "saved", "pci"],
)
def test_long(tests: str, lengths: dict[str, int]) -> None:
    environment = os.environ | {name: str(max(1, round(n * SCALE))) for name, n in lengths.items()}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-o", "timeout=0", tests]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
