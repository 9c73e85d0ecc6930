"""What helps with a Linux guest that hangs, tried on one that does not: SysRq by two ways, and an NMI."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from guest_artifacts import artifact
from running_vm import running_vm

pytestmark = [pytest.mark.hyperv, pytest.mark.timeout(1800)]

SYNIC = os.environ.get("HVKVM_SYNIC") or "kernel"
SCRIPT = """
until grep -q 'AT Translated Set 2 keyboard' /proc/bus/input/devices; do sleep 0.1; done
echo 1 >/proc/sys/kernel/sysrq
echo 1 >/proc/sys/kernel/unknown_nmi_panic
echo guest-ready
sleep 1000
"""


def test_sysrq_by_break_and_by_key_and_an_nmi(tmp_path: Path) -> None:
    options: list[object] = ["--kernel", artifact("HVKVM_GUEST_KERNEL"), "--vmbus", "on", "--synic", SYNIC]
    options += [
        "--busybox",
        artifact("HVKVM_GUEST_BUSYBOX"),
        "--modules-dir",
        artifact("HVKVM_GUEST_MODULES"),
    ]
    options += ["--module", "hv_vmbus", "--module", "hyperv_keyboard", "--append", "quiet", "--cpus", "2"]
    # Without hv-crash only the console tells of the panic.
    options += ["--hv", "host-model,-crash", "--timeout", "1500", "--console", "--", "sh", "-c", SCRIPT]
    with running_vm(tmp_path, *options) as vm:
        vm.wait_for("guest-ready")
        assert vm.ctl("break", "h") == "break sent\n"
        vm.wait_for("sysrq: HELP", errors=True)
        assert vm.ctl("keys", "--press", "alt-sysrq-h") == "6 key events sent\n"
        vm.wait_for("sysrq: HELP", count=2, errors=True)
        assert vm.ctl("nmi") == "NMI sent to 2 vCPUs\n"
        assert vm.finish() == 255, vm.report()
        assert "Kernel panic - not syncing: NMI" in vm.error_text
