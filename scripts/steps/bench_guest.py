"""The benchmark guest: assembled for one operation, and what it says while it runs.

Called by `scripts/bench` and its test. The image is a multiboot ELF32 that
shares the test guests' runtime; see bench_guests/bench.s for its lines.
"""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from hvkvm.boot import cache
from steps.distribution import StepError

PROJECT = Path(__file__).resolve().parent.parent.parent
SOURCE = PROJECT / "scripts/bench_guests/bench.s"
RUNTIME = PROJECT / "tests/guests"
SHARED = PROJECT / "hvkvm/testing/guest_parts.inc"
_RUNTIME_SOURCES = ("boot.s", "interrupts.s", "serial.s", "synic.s")
_INCLUDED = ("abi.inc", "macros.inc", "link.ld")

OPERATIONS = {"port": 0, "message": 1, "event": 2, "ipi": 3, "hypercall": 4}
BATCHES = 5
_REFERENCE_HZ = 10_000_000
DONE = "bench: done"
PREFIX = "bench: "


class Batch(NamedTuple):
    """One batch: operations done, TSC ticks, 100 ns ticks (0: no such clock), refused requests."""

    operations: int
    tsc: int
    reference: int
    refused: int

    def nanoseconds(self, tsc_hz: float) -> float:
        """Time of one operation, by the guest's reference clock, else by its TSC."""
        if not self.operations:
            return 0.0
        seconds = self.reference / _REFERENCE_HZ if self.reference else self.tsc / tsc_hz
        return seconds * 1e9 / self.operations


def parse(lines: Iterable[str]) -> list[Batch]:
    """The batches in the guest's console lines. StepError when it says that it cannot measure."""
    batches = []
    for line in lines:
        if not line.startswith(PREFIX) or line.startswith(DONE):
            continue
        words = line.removeprefix(PREFIX).split()
        try:
            batches.append(Batch(*(int(word, 16) for word in words)))
        except (ValueError, TypeError):
            raise StepError(f"the benchmark guest cannot measure: {line.removeprefix(PREFIX)}") from None
    return batches


def image(operation: str, count: int, batches: int = BATCHES) -> Path:
    """The guest for `operation`, `count` times a batch; assembled now if its sources changed. StepError."""
    symbols = {"OPERATION": OPERATIONS[operation], "COUNT": count, "BATCHES": batches}
    digest = hashlib.sha256(repr(symbols).encode() + SOURCE.read_bytes() + SHARED.read_bytes())
    for name in _RUNTIME_SOURCES + _INCLUDED:
        digest.update((RUNTIME / name).read_bytes())
    path = cache.root() / "guests" / f"bench-{operation}-{digest.hexdigest()[:16]}.elf"
    if not cache.holds(path):
        cache.publish(path, [_build(symbols)])
    return path


def _build(symbols: dict[str, int]) -> bytes:
    defined = [word for name, value in symbols.items() for word in ("--defsym", f"{name}={value}")]
    with tempfile.TemporaryDirectory(prefix="hvkvm-bench-") as folder:
        work = Path(folder)
        objects = []
        for source in (*(RUNTIME / name for name in _RUNTIME_SOURCES), SOURCE):
            objects.append(str(work / f"{source.stem}.o"))
            folders = ("-I", str(RUNTIME), "-I", str(SHARED.parent))
            _run("as", "--64", *folders, *defined, "-o", objects[-1], str(source))
        _run(
            *("ld", "-m", "elf_x86_64", "-n", "--build-id=none", "-T", str(RUNTIME / "link.ld")),
            *("-o", str(work / "image64"), *objects),
        )
        # Multiboot loaders take 32-bit ELF only, whatever the code in it.
        _run("objcopy", "-O", "elf32-i386", str(work / "image64"), str(work / "image"))
        return (work / "image").read_bytes()


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise StepError(f"{command[0]}: not found; install the binutils package") from None
    if done.returncode:
        raise StepError(f"{' '.join(command)}\n{done.stderr.strip()}")
