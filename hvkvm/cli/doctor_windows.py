"""`hvkvm doctor --windows`: what a Windows guest would need of this machine and of hvkvm, as a checklist.

It says what is there, not that Windows runs: nobody has booted one (docs/windows.md). FAIL is what Windows
cannot start without.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from hvkvm.abi.kvm import KVM_CAP_READONLY_MEM
from hvkvm.cli.doctor_check import KERNEL_REMEDY, Check, carrier
from hvkvm.errors import BootError, CapabilityMissing, KvmUnavailable
from hvkvm.hyperv.enlightenments import WINDOWS
from hvkvm.hyperv.features import parse_features, resolve
from hvkvm.hyperv.usermode.features import choose
from hvkvm.kvm.kind import probe
from hvkvm.kvm.system import Kvm

LEAST_MEMORY = 2 << 30


def checks(path: str) -> Iterator[Check]:
    """Every check, the host's first."""
    try:
        kvm = Kvm(path)
    except KvmUnavailable as error:
        reason, _, remedy = str(error).rpartition("; ")
        yield Check("FAIL", path, reason, remedy, KvmUnavailable.exit_status)
        return
    with kvm:
        yield Check("PASS", path, "usable")
        yield carrier(probe())
        yield from _hyperv(kvm)
        yield _firmware(kvm)
    yield _memory()
    yield Check("PASS", "boot disk", "NVMe (--disk), which firmware and Windows both have a driver for")
    yield Check("PASS", "console", "COM1: Emergency Management Services and SAC, where the image has them on")
    yield Check("PASS", "display", "ramfb, with --hv windows; hvkvm ctl screenshot FILE.png shows it")
    yield Check("PASS", "timers", "Hyper-V's and the PM timer; a High Precision Event Timer with --hpet on")
    yield Check(
        "WARN",
        "keyboard",
        "on the VMBus only (--vmbus on, hvkvm ctl keys): firmware reads COM1, and there is no pointer",
        "install elsewhere, turn EMS on there (bcdedit /ems on), and bring the image",
    )
    yield Check(
        "WARN",
        "TPM 2.0, Secure Boot",
        "neither is there; Windows 11's set-up asks for both",
        "use a Windows Server image, or one that is installed already",
    )
    yield Check("WARN", "tried", "no Windows was booted with hvkvm so far", "see docs/windows.md, and report")


def _hyperv(kvm: Kvm) -> Iterator[Check]:
    choice = choose(kvm, "auto")
    try:
        features = resolve(parse_features("windows"), choice.host)
    except CapabilityMissing as error:
        yield Check("FAIL", "--hv windows", str(error), KERNEL_REMEDY, CapabilityMissing.exit_status)
        return
    where = "by KVM" if choice.synic == "kernel" else "in user space"
    missing = [name for name in WINDOWS if name not in features.names]
    if missing:
        names = ", ".join(f"hv-{name}" for name in missing)
        yield Check("WARN", "--hv windows", f"SynIC {where}, without {names}", KERNEL_REMEDY)
    else:
        yield Check("PASS", "--hv windows", f"all {len(WINDOWS)} of it, SynIC {where}")


def _firmware(kvm: Kvm) -> Check:
    from hvkvm.boot.firmware import find

    if not kvm.check_extension(KVM_CAP_READONLY_MEM):
        what = "KVM_CAP_READONLY_MEM is missing: no ROM for firmware"
        return Check("FAIL", "UEFI", what, "use a newer kernel's KVM", CapabilityMissing.exit_status)
    try:
        return Check(
            "PASS", "UEFI", f"{find('auto')}; give --firmware-vars FILE, where Windows keeps its boot entry"
        )
    except BootError:
        what = "no firmware on this host"
        remedy = "apt install ovmf, or give --firmware FILE"
        return Check("FAIL", "UEFI", what, remedy, CapabilityMissing.exit_status)


def _memory() -> Check:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    detail = f"{free >> 20} MiB free here; Windows Server wants --memory 2G at least"
    return Check("PASS" if free >= LEAST_MEMORY else "WARN", "memory", detail)
