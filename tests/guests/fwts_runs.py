"""The Firmware Test Suite (fwts, of Debian's sid) in tests: its files, what it said, what it may fail in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from guest_artifacts import artifact

KNOWN = (
    ("method", r"\\_SB_\.VMOD\.VMBS\._CID returned a string 'VMBUS'"),
    ("method", r"\\_SB_\.VGID\._CID returned a string 'VM_GEN_COUNTER'"),
    ("madt", r"LAPIC has no matching processor UID \d+"),
    ("madt", r"LAPICNMI has no matching processor UID 255"),
    ("ebda", r"EBDA region mapped at 0x0 but not reserved"),
    ("mtrr", r"Fixed MTRRs enabled flag is clear"),
    ("mtrr", r"Memory range .* \(0000:00:.*\) has incorrect attribute Write-Back"),
    ("klog", r"\[Firmware Bug\]: TSC doesn't count with P0 frequency"),  # an AMD host's KVM, not the board
)
"""(test, what its failure says): docs/firmware.md has the reason of each."""


class Files(NamedTuple):
    """Where its files lie in this machine's cache."""

    tree: Path
    program: Path
    data: Path
    libraries: Path
    loader: Path

    @classmethod
    def found(cls) -> Files:
        """Those of the artifact. It brings all libraries of its suite, which is not this machine's."""
        program = artifact("HVKVM_FWTS")
        tree = program.parents[2]
        libraries = tree / "usr/lib/x86_64-linux-gnu"
        return cls(tree, program, tree / "usr/share/fwts", libraries, libraries / "ld-linux-x86-64.so.2")

    def command(self) -> list[str]:
        """fwts on this machine."""
        paths = f"{self.libraries}:{self.libraries / 'fwts'}"
        return [str(self.loader), "--library-path", paths, str(self.program), "-j", str(self.data)]

    def in_guest(self) -> dict[str, Path]:
        """What an initramfs needs for `fwts` there."""
        files = {"/usr/bin/fwts": self.program, "/lib64/ld-linux-x86-64.so.2": self.loader}
        for folder in (self.libraries, self.libraries / "fwts"):
            for path in folder.glob("lib*.so.[0-9]"):
                files[f"/{path.relative_to(self.tree)}"] = path.resolve()
        return files | {f"/usr/share/fwts/{path.name}": path for path in self.data.iterdir()}


class Said(NamedTuple):
    """The end of fwts's log: which tests ran, how many checks passed, and what failed."""

    ran: set[str]
    passed: int
    failures: list[tuple[str, str]]

    def unknown(self) -> list[tuple[str, str]]:
        """The failures that KNOWN does not have."""
        return [
            (test, message)
            for test, message in self.failures
            if not any(test == known and re.search(pattern, message) for known, pattern in KNOWN)
        ]


def read(log: str) -> Said:
    """What a log says from "Test Failure Summary" on. AssertionError for one that has no end."""
    _, found, summary = log.partition("Test Failure Summary")
    assert found, log[-4000:]
    rows = re.findall(r"^(\w+) *\|([^|]*)\|([^|]*)\|([^|]*)\|([^|]*)\|.*$", summary, re.MULTILINE)
    ran = {name: numbers for name, *numbers in rows if name != "Test" and any(map(str.strip, numbers))}
    assert ran, summary
    failures = re.findall(r"^ (\w+): (.+)$", summary, re.MULTILINE)
    assert len(failures) == sum(int(numbers[1].strip() or 0) for numbers in ran.values()), summary
    return Said(set(ran), sum(int(numbers[0].strip() or 0) for numbers in ran.values()), failures)
