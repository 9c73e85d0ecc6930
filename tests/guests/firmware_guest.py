"""Guests that start in UEFI firmware, and FAT disks for them.

The nested lab's QEMU may abort where a guest writes CR8 while KVM waits to inject an interrupt, as UEFI
does at each of its ticks. Slow ticks make that rare: `apic_bus_ns`, which a real KVM does not need. Where it
happens all the same, the suite runs the test again in another lab. So it does, once, where firmware stands in
the lab (seen once in some dozen runs, its processor busy, the cause not found): what it did is printed then.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NoReturn

import pytest
from guest_artifacts import artifact
from linux_guest import SECONDS, LinuxGuest

from hvkvm.machine.config import MachineConfig
from hvkvm.machine.machine import Machine

FIRMWARES = {"stable": "HVKVM_GUEST_FIRMWARE", "newer": "HVKVM_NEWER_FIRMWARE"}
STANDS_SECONDS = 300.0
"""Firmware that prints nothing for so long stands: it is at its prompt after some 35 s in a lab on a slow
machine, and was seen to take ten times as long where two suites shared that machine."""
REPORT_SECONDS = 20
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


def file_on(disk: Path, name: str) -> bytes:
    """The content of a file on such a disk, which no guest has any more."""
    words = ["mcopy", "-i", str(disk), f"::/{name}", "-"]
    return subprocess.run(words, check=True, capture_output=True).stdout


def lab_tick() -> int:
    """What `apic_bus_ns` must be here."""
    return LAB_TICK if "HVKVM_IN_LAB" in os.environ else 0


def wait_until(happened: Callable[[], bool], seconds: float = SECONDS) -> None:
    """Poll for it, with a generous end."""
    end = monotonic() + seconds
    while not happened():
        assert monotonic() < end
        sleep(0.05)


class ConsoleProcess:
    """An `hvkvm` of its own, and what its guest's console says."""

    def __init__(self, arguments: Sequence[str], request: pytest.FixtureRequest) -> None:
        self._capture = request.config.pluginmanager.getplugin("capturemanager")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hvkvm", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._output = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        while data := os.read(self.process.stdout.fileno(), 65536):
            self._output += data

    @property
    def text(self) -> str:
        """The output so far."""
        return bytes(self._output).decode(errors="replace")

    def wait_for(self, marker: str) -> None:
        """Until `marker` was printed; AssertionError if the process ends before, or stands."""
        printed, last = 0, monotonic()
        while marker not in self.text and self.process.poll() is None:
            if len(self._output) > printed:
                printed, last = len(self._output), monotonic()
            elif monotonic() > last + STANDS_SECONDS:
                self._stands(f"no {marker!r}, and nothing else, for {STANDS_SECONDS} s")
            sleep(0.05)
        self._reader.join(0 if self.process.poll() is None else 60)
        assert marker in self.text, self.text[-4000:]

    def _stands(self, why: str) -> NoReturn:
        self.process.send_signal(signal.SIGQUIT)  # it says what its guest does, and goes on
        sleep(REPORT_SECONDS)
        report = f"{why}: {self.text[-20000:]}"
        if {"HVKVM_IN_LAB", "PYTEST_XDIST_WORKER"} <= os.environ.keys() and self._capture is not None:
            with self._capture.global_and_fixture_disabled():
                print(report, file=sys.stderr, flush=True)
            os._exit(1)  # this ends the lab, in this test
        raise AssertionError(report)


@contextmanager
def console_of(arguments: Sequence[str], request: pytest.FixtureRequest) -> Iterator[ConsoleProcess]:
    """Run `hvkvm` with `arguments`; it is gone afterwards."""
    vm = ConsoleProcess(arguments, request)
    try:
        yield vm
    finally:
        vm.process.kill()
        vm.process.wait()


@contextmanager
def firmware_guest(firmware: str = "newer", **config: Any) -> Iterator[LinuxGuest]:
    """A machine that starts in the firmware of a suite."""
    settings: dict[str, Any] = {
        "firmware": artifact(FIRMWARES[firmware]),
        "hv": "none",
        "timeout": SECONDS,
        "apic_bus_ns": lab_tick(),
    }
    with Machine(MachineConfig(**settings | config)) as machine:
        yield LinuxGuest(machine)
