"""A whole distribution as a guest: `scripts/root-disk`'s, on hv_storvsc, logged in on its console."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from guest_artifacts import artifact
from linux_guest import SECONDS, LinuxGuest
from linux_shell import SHELL, Shell

from hvkvm.machine.config import MachineConfig
from hvkvm.machine.disk_spec import DiskSpec
from hvkvm.machine.machine import Machine

ON_REQUEST = pytest.mark.skipif(
    not (os.environ.get("HVKVM_DISTRO") or os.environ.get("HVKVM_SOAK")),
    reason="HVKVM_DISTRO=1 boots whole distributions, HVKVM_SOAK=1 works them for long",
)
"""Each of these tests takes minutes in the lab: one to six on two processors that had other work."""
MASKED = " ".join(
    f"systemd.mask={unit}"
    for unit in (
        *("systemd-networkd.service", "systemd-networkd.socket", "systemd-binfmt.service"),
        *("dev-hugepages.mount", "dev-mqueue.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount"),
    )
)
"""What no test of a disk needs, and takes an emulated host a minute."""
BOOT_SECONDS = 1800.0
"""Some twenty on a quiet machine with KVM of its own; emulated and busy it took ten minutes."""


def copied_root(folder: Path) -> Path:
    """A root disk that may be written to; its holes stay holes."""
    target = folder / "root.raw"
    subprocess.run(["cp", "--sparse=always", artifact("HVKVM_ROOT_DISK"), target], check=True)
    return target


@contextmanager
def debian_guest(root: Path, *more_disks: DiskSpec, **config: Any) -> Iterator[LinuxGuest]:
    """The machine, with `root` as its first disk; nobody says that it is the root."""
    settings: dict[str, Any] = {
        "kernel": artifact("HVKVM_ROOT_KERNEL"),
        "initrd": artifact("HVKVM_ROOT_INITRD"),
        "append": f"quiet systemd.show_status=0 {MASKED}",
        "memory": 1 << 30,
        "synic": os.environ.get("HVKVM_SYNIC") or "kernel",
        "vmbus": "on",
        "disks": (DiskSpec(str(root)), *more_disks),
        "timeout": 3 * BOOT_SECONDS,
    }
    with Machine(MachineConfig(**settings | config)) as machine:
        yield LinuxGuest(machine)


def logged_in(guest: LinuxGuest) -> Shell:
    """Boot to the login prompt, and be root."""
    guest.start()
    guest.wait_until(lambda: "login: " in guest.text, "the login prompt", BOOT_SECONDS)
    guest.type("root")
    guest.wait_until(lambda: "root@hvkvm" in guest.text.split("login: ")[-1], "root's prompt", SECONDS)
    guest.type(SHELL)
    shell = Shell(guest).ready()
    shell.check("export PAGER=cat SYSTEMD_PAGER=cat SYSTEMD_COLORS=0")  # it is a terminal to them
    return shell


def fsck(image: Path) -> str:
    """What e2fsck says of a file system that nobody has mounted; AssertionError unless it is clean."""
    done = subprocess.run(["e2fsck", "-fn", image], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout
