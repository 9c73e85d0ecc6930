"""Guests that start in UEFI firmware, and FAT disks for them.

The nested lab's QEMU may abort where a guest writes CR8 while KVM waits to inject an interrupt, as UEFI
does at each of its ticks. Slow ticks make that rare: `apic_bus_ns`, which a real KVM does not need. Where it
happens all the same, the suite runs the test again in another lab.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from guest_artifacts import artifact
from linux_guest import SECONDS, LinuxGuest

from hvkvm.machine.config import MachineConfig
from hvkvm.machine.machine import Machine

FIRMWARES = {"stable": "HVKVM_GUEST_FIRMWARE", "newer": "HVKVM_NEWER_FIRMWARE"}
LAB_TICK = 100
"""Nanoseconds of a local APIC timer's tick in the lab."""


def fat_disk(path: Path, files: Mapping[str, bytes], megabytes: int = 16) -> Path:
    """A FAT file system at `path` with `files` in it, by their paths."""
    mtools = {name: shutil.which(name) for name in ("mformat", "mcopy", "mmd")}
    assert all(mtools.values()), "mtools is not installed; scripts/setup installs it"
    sectors = str(megabytes << 11)
    subprocess.run(
        ["mformat", "-C", "-i", str(path), "-T", sectors, "-h", "64", "-s", "32", "::"], check=True
    )
    folders: set[str] = set()
    for name, content in files.items():
        parents = [str(one) for one in Path(name).parents if str(one) != "."]
        for folder in reversed(parents):
            if folder not in folders:
                subprocess.run(["mmd", "-i", str(path), f"::/{folder}"], check=True)
                folders.add(folder)
        subprocess.run(["mcopy", "-i", str(path), "-", f"::/{name}"], input=content, check=True)
    return path


@contextmanager
def firmware_guest(firmware: str = "newer", **config: Any) -> Iterator[LinuxGuest]:
    """A machine that starts in the firmware of a suite."""
    settings: dict[str, Any] = {
        "firmware": artifact(FIRMWARES[firmware]),
        "hv": "none",
        "timeout": SECONDS,
        "apic_bus_ns": LAB_TICK if "HVKVM_IN_LAB" in os.environ else 0,
    }
    with Machine(MachineConfig(**settings | config)) as machine:
        yield LinuxGuest(machine)
