"""A whole distribution is logged in to over ssh, with a key made for it, through passt."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from debian_guest import BOOT_SECONDS, ON_REQUEST
from guest_artifacts import artifact

PROJECT = Path(__file__).parents[2]
pytestmark = [
    ON_REQUEST,
    pytest.mark.hyperv,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(shutil.which("passt") is None, reason="no passt; make setup installs it"),
    pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no openssh-client"),
]


def test_root_logs_in_over_ssh_and_the_guest_is_powered_off(tmp_path: Path) -> None:
    steps = PROJECT / "scripts/steps"
    settings = os.environ | {"HVKVM_CACHE": str(tmp_path)}
    key = subprocess.run([steps / "ssh_key.sh"], env=settings, stdout=subprocess.PIPE, text=True, check=True)
    command = "echo $(id -un) on $(systemd-detect-virt): $(ip -4 -o addr); exit 5"
    words = [steps / "debian_net.sh", "ssh", key.stdout.strip(), command]
    words += [Path(sys.executable).parent / "hvkvm", "run", "--memory", "1G", "--vmbus", "on"]
    words += ["--kernel", artifact("HVKVM_ROOT_KERNEL"), "--initrd", artifact("HVKVM_ROOT_INITRD")]
    words += ["--disk", f"{artifact('HVKVM_ROOT_DISK')},snapshot=on"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=2 * BOOT_SECONDS, check=False)
    assert done.returncode == 5, done.stderr
    assert done.stdout.startswith("root on microsoft: "), done.stdout
    assert "inet 10.0.2.15/24" in done.stdout
