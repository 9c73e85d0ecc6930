"""A warm guest beside one that is booted: time to a command's output, memory of many copies, time of a save.

Called by `scripts/bench`. Processes are `hvkvm run` as a user starts it. The save is timed in this one,
and so are guests of the pytest plugin, one after the other: what a test waits for when Python has started.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import monotonic

from steps import artifacts
from steps.bench_table import Row
from steps.distribution import StepError

COPIES = 20
FILLED = 128
"""MiB of the guest's RAM that are written before it is saved."""
SECONDS = 300
READY = b"ready\n"
BOOTED = "booted"
INSIDE = ("copied inside", "booted inside")
"""One more guest of a process that runs."""
MIB = 1 << 20


def hvkvm(*words: object) -> list[str]:
    """The command line of `hvkvm WORDS`."""
    return [sys.executable, "-m", "hvkvm", *map(str, words)]


def boot_words(suite: str | None) -> list[object]:
    """What `hvkvm run` and `hvkvm warm` boot."""
    kernel, busybox = artifacts.path("guest-kernel", suite), artifacts.path("busybox")
    return ["--kernel", kernel, "--busybox", busybox, "--append", "quiet", "--quiet", "--timeout", SECONDS]


def start(words: list[str]) -> subprocess.Popen[bytes]:
    """A run whose command says that it is ready, and then waits for its standard input."""
    line = [*words, "--", "sh", "-c", "echo ready; read line; exit 0"]
    return subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def until_ready(process: subprocess.Popen[bytes]) -> None:
    """Wait for the command's first output. StepError if there is none."""
    assert process.stdout is not None
    if process.stdout.readline() != READY:
        raise StepError("the guest's command said nothing")


def end(process: subprocess.Popen[bytes]) -> None:
    """Have the command end, and the run with it."""
    process.communicate(b"\n", timeout=SECONDS)


def seconds_to_output(words: list[str]) -> float:
    """From the start of the process to the first output of its command."""
    began = monotonic()
    process = start(words)
    try:
        until_ready(process)
        return monotonic() - began
    finally:
        end(process)


def seconds_in_process(*, warm: bool, suite: str | None) -> float:
    """What a test with a guest of its own waits for its command's first output."""
    from hvkvm.testing.kernels import kernel_at
    from hvkvm.testing.linux import LinuxGuest

    kernel = kernel_at(artifacts.path("guest-kernel", suite))
    script = "echo ready; sleep 1000"
    began = monotonic()
    guest = LinuxGuest(("sh", "-c", script), kernel=kernel, vmbus=False, warm=warm, seconds=SECONDS)
    try:
        guest.start()
        guest.wait_for_stdout(READY.decode())
        return monotonic() - began
    finally:
        guest.close()


def kilobytes(lines: Iterable[str], file: str) -> tuple[int, int]:
    """Of /proc/PID/smaps: the proportional set size, and what the process wrote of its map of `file`."""
    inside = False
    pss = written = 0
    for line in lines:
        words = line.split()
        if not words[0].endswith(":"):
            inside = line.rstrip("\n").endswith(file)
        elif words[0] == "Pss:":
            pss += int(words[1])
        elif words[0] == "Anonymous:" and inside:  # copied when it was written to
            written += int(words[1])
    return pss, written


def memory_of(count: int, words: list[str], file: Path) -> tuple[float, float]:
    """`count` copies at a time: MiB of each by proportional set size, and MiB of RAM that each wrote."""
    with ExitStack() as stack:
        copies = []
        for _ in range(count):
            copies.append(start(words))
            stack.callback(end, copies[-1])
        for copy in copies:
            until_ready(copy)
        found = []
        for copy in copies:
            with open(f"/proc/{copy.pid}/smaps") as lines:
                found.append(kilobytes(lines, str(file)))
    pss, written = (sum(column) / count / 1024 for column in zip(*found, strict=True))
    return pss, written


def seconds_a_gib(warm: Path, folder: Path) -> float:
    """How long a save takes for a GiB that is not zero."""
    import hvkvm as library

    script = f"yes | head -c {FILLED * MIB} >/dev/shm/filled; echo filled; sleep {SECONDS}"
    config = library.MachineConfig(kernel=warm, warm=warm, command=("sh", "-c", script), timeout=SECONDS)
    said = bytearray()
    with library.Machine(config) as machine:
        machine.board.attach_sink(said.extend)
        machine.start()
        limit = monotonic() + SECONDS
        while b"filled" not in said:
            if machine.wait(0.2) is not None or monotonic() > limit:
                raise StepError(f"the guest was not filled: {bytes(said[-300:])!r}")
        began = monotonic()
        machine.save(folder / "saved", end=True)
        took = monotonic() - began
    return took / ((folder / "saved").stat().st_blocks * 512 / (1 << 30))


def rows(runs: int, tell: Callable[[str], None], *, suite: str | None = None) -> list[Row]:
    """All of it; `runs` of each time, alternating."""
    with tempfile.TemporaryDirectory(prefix="hvkvm-bench-") as name:
        folder = Path(name)
        warm = folder / "warm"
        boot = boot_words(suite)
        subprocess.run(hvkvm("warm", *boot, "-o", warm), check=True)
        copy = hvkvm("run", "--from", warm, "--quiet", "--timeout", SECONDS)
        lines = {"copied": copy, BOOTED: hvkvm("run", *boot)}
        taken: dict[str, list[float]] = {kind: [] for kind in (*lines, *INSIDE)}
        for run in range(runs):
            for kind, line in lines.items():
                taken[kind].append(seconds_to_output(line))
                tell(f"bench: warm {run + 1}/{runs} {kind}: {taken[kind][-1] * 1000:.0f} ms to its output")
        seconds_in_process(warm=True, suite=suite)  # boots what is copied, and imports
        for run in range(runs):
            for kind in INSIDE:
                taken[kind].append(seconds_in_process(warm=kind == "copied inside", suite=suite))
                tell(f"bench: warm {run + 1}/{runs} {kind}: {taken[kind][-1] * 1000:.0f} ms to its output")
        one, wrote = memory_of(1, copy, warm)
        tell(f"bench: warm: one copy has {one:.1f} MiB, {wrote:.1f} MiB of it RAM that it wrote")
        each, written = memory_of(COPIES, copy, warm)
        tell(f"bench: warm: of {COPIES} copies each has {each:.1f} MiB, {written:.1f} MiB of it RAM written")
        save = seconds_a_gib(warm, folder)
        tell(f"bench: warm: {save:.2f} s a GiB saved, on {os.cpu_count()} CPU(s)")
    middle = {kind: median(values) * 1000 for kind, values in taken.items()}
    further = f"memory (PSS) of each of {COPIES} copies of a warm guest"
    return [
        Row("process start to the command's output", "ms", middle["copied"], middle[BOOTED], "less", BOOTED),
        Row(
            "a further guest of a test, to its output",
            "ms",
            *(middle[kind] for kind in INSIDE),
            "less",
            BOOTED,
        ),
        Row("memory (PSS) of one copy of a warm guest", "MiB", one, None, peer_name=""),
        Row(further, "MiB", each, None, peer_name=""),
        Row(f"{further}, less RAM that it wrote", "MiB", each - written, None, peer_name=""),
        Row("save, for each GiB that is not zero", "s", save, None, peer_name=""),
    ]
