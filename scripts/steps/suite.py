"""The whole test suite: which tests run where, in how many workers at once, and what came of it.

    1 anywhere, 2 any KVM       here, where /dev/kvm can be used
    3 KVM with Hyper-V          here if this KVM has it, else in nested labs side by side
      firmware                  likewise, in labs of a newer kernel

Each part is one pytest session whose workers (pytest-xdist) draw from one list: here one
more than there are processors, since many tests wait; for the third tier as many, each a
Python in a lab of its own. The firmware part is small, so it runs beside the first one,
in one lab and a process of its own. Called by `scripts/test`; arguments go to pytest.

HVKVM_TEST_PART=NAME runs one part, by the beginning of its name. HVKVM_TEST_WORKERS=N
sets the workers, and has the parts run one after the other. One thread, but for the one
that shows what a part beside another prints.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

from hvkvm.boot import cache
from steps.artifacts import newer_suite
from steps.lab_host import has_hyperv

PROJECT = Path(__file__).resolve().parents[2]
PYTHON = str(PROJECT / ".venv/bin/python")
NO_TESTS = 5
INTERRUPTED = 130
MOST_WORKERS = 8
# A lab has 4 GiB, of which it was seen to touch 0.5 at its start and 1.4 with Linux guests in it.
LAB_BYTES = 3 << 30
# No test waits for a guest that does nothing; the longest pause in one is some seconds.
STALL_SECONDS = 90
# These end what hangs past all other limits, so they are several times what a slow, busy machine takes.
DEADLINES = {"here": 5400, "lab": 10800}
# Emulated processors are slow, so tests get more time each there.
TEST_SECONDS = {"here": 300, "lab": 900}
# Without it pytest takes the folder that holds both its tests and whatever file an option names: a cache
# somewhere else, or the temporary folder, and then finds no settings, and in a clone below that no tests.
_ROOT = ("--rootdir", str(PROJECT), "-c", str(PROJECT / "pyproject.toml"))
# A person drives these, so there is one worker and the terminal is its own.
_BY_HAND = {"--pdb", "--trace", "-s", "--capture=no"}


class Part(NamedTuple):
    """Some tiers: `marks` choose their tests, `tiers` may not be skipped, `place` is here or lab."""

    name: str
    marks: str
    tiers: tuple[str, ...]
    place: str
    lab_options: tuple[str, ...] = ()


def parts(usable: bool, hyperv: bool) -> list[Part]:
    """What is run, in order. `usable`: whether /dev/kvm is; `hyperv`: whether it has Hyper-V of its own."""
    place = "here" if hyperv else "lab"
    kernel = ("--kernel", newer_suite())
    firmware = Part("firmware (UEFI guests)", "firmware", ("hyperv",), place, kernel)
    if usable:
        return [
            Part("tiers 1 and 2 (anywhere, any KVM)", "not hyperv", ("kvm",), "here"),
            Part("tier 3 (KVM with Hyper-V)", "hyperv and not firmware", ("hyperv",), place),
            firmware,
        ]
    return [
        Part("tier 1 (anywhere)", "not kvm and not hyperv", (), "here"),
        Part(
            "tiers 2 and 3 (any KVM, KVM with Hyper-V)",
            "(kvm or hyperv) and not firmware",
            ("kvm", "hyperv"),
            place,
        ),
        firmware,
    ]


def workers(place: str, processors: int, memory: int) -> int:
    """How many workers a part gets: labs one a processor, and no more than `memory` bytes hold."""
    asked = os.environ.get("HVKVM_TEST_WORKERS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    most = min(processors, MOST_WORKERS)
    return most + 1 if place == "here" else max(1, min(most, memory // LAB_BYTES))


def available_memory() -> int:
    """Bytes that programs can still take."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def command(part: Part, count: int, arguments: list[str]) -> list[str]:
    """The pytest session that runs `part` in `count` workers."""
    pytest = [PYTHON, "-m", "pytest"]
    chosen = ["-m", part.marks, "-o", f"timeout={TEST_SECONDS[part.place]}"]
    lab = [str(PROJECT / "scripts/lab"), *part.lab_options, "--timeout", "0"]
    if _BY_HAND & set(arguments):
        return [*([*lab, "--"] if part.place == "lab" else []), *pytest, *chosen, *arguments]
    python = shlex.quote(PYTHON)
    if part.place == "lab":
        python = shlex.join([*lab, "--stall", str(STALL_SECONDS), "--", PYTHON])
    durations = cache.root() / "durations" / f"{part.place}.json"
    return [
        *pytest,
        *_ROOT,
        *("-p", "steps.suite_plugin", "--part", part.name.partition(" (")[0]),
        *("--part-deadline", str(deadline(part)), "--part-durations", str(durations)),
        *(["--part-again"] if part.place == "lab" else []),
        *("--tx", f"{count}*popen//python={python}", "--dist", "load", "--maxschedchunk", "1"),
        *("--max-worker-restart", "6", "-o", "console_output_style=classic"),
        *chosen,
        *arguments,
    ]


def deadline(part: Part) -> int:
    """Seconds after which a part is ended."""
    asked = os.environ.get("HVKVM_TIER3_SECONDS", "")
    return int(asked) if part.place == "lab" and asked.isdigit() else DEADLINES[part.place]


Collected = tuple[int, list[str], str]


def collected(marks: str, arguments: list[str]) -> Collected:
    """Ask pytest, here: its status, the tests by name, and what it printed.

    It leaves the byte code that labs then need not make: compiling costs many seconds there.
    """
    with tempfile.NamedTemporaryFile("r", prefix="hvkvm-tests-") as names:
        line = [PYTHON, "-m", "pytest", *_ROOT, "-p", "steps.suite_plugin", "--part-list", names.name]
        line += ["--collect-only", "-q", "-p", "no:cacheprovider", "-m", marks, *arguments]
        done = subprocess.run(
            line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        return done.returncode, names.read().splitlines(), done.stdout


def environment() -> dict[str, str]:
    """This process's, and where pytest finds the suite's plugin.

    Byte code is kept though the caller may not want any: without it every worker, and every test that
    starts pytest, rewrites the assertions of all files anew, 13 s of a processor where 3 are enough.
    """
    path = os.pathsep.join(filter(None, [str(PROJECT / "scripts"), os.environ.get("PYTHONPATH")]))
    settings = dict(os.environ, PYTHONPATH=path)
    settings.pop("PYTHONDONTWRITEBYTECODE", None)
    return settings


def run(part: Part, arguments: list[str], ahead: Collected | None = None) -> int:
    """Run one part; pytest's status, with 5 for no test where `arguments` chose none.

    `ahead` is what `collected` says of it, where that is known.
    """
    started = time.monotonic()
    tiers, chosen, count = (
        part.tiers,
        arguments,
        workers(part.place, len(os.sched_getaffinity(0)), available_memory()),
    )
    if part.place == "lab" or arguments:
        status, found, text = ahead or collected(part.marks, arguments)
        if status not in (0, NO_TESTS):
            print(text, flush=True)
            return status
        if status == NO_TESTS and arguments:
            return NO_TESTS
        count = max(1, min(count, len(found)))
        # A lab takes a while to collect, so it need not look at files that have nothing for it.
        chosen = arguments or sorted({test.partition("::")[0] for test in found})
    if arguments:
        # What the arguments leave out cannot be asked for.
        tiers = tuple(tier for tier in tiers if collected(f"({part.marks}) and {tier}", arguments)[1])
    status = attend(command(part, count, chosen), environment() | {"HVKVM_REQUIRE": ",".join(tiers)})
    print(f"== {part.name}: {time.monotonic() - started:.0f} s with {count} at once", flush=True)
    return status


class Terminated(KeyboardInterrupt):
    """SIGTERM, which only this process got."""


def _terminate(*_: object) -> None:
    raise Terminated


def attend(line: list[str], settings: dict[str, str]) -> int:
    """Run a session to its end, its own tidying up after Ctrl-C or SIGTERM included."""
    interrupted = False
    with subprocess.Popen(line, env=settings) as process:
        while True:
            try:
                status = process.wait()
                break
            except Terminated:
                interrupted = True
                process.send_signal(signal.SIGINT)  # else it, and its labs, would go on without us
            except KeyboardInterrupt:
                interrupted = True  # the session heard of it too
    if interrupted:
        raise KeyboardInterrupt
    return status


class Beside:
    """A part in a process and a lab of its own, while another one runs. Its lines come with its name."""

    def __init__(self, part: Part) -> None:
        self.part = part
        settings = environment() | {"HVKVM_TEST_PART": part.name, "HVKVM_TEST_WORKERS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "steps.suite"],
            env=settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._thread = threading.Thread(target=self._show, daemon=True)
        self._thread.start()

    def _show(self) -> None:
        name = self.part.name.partition(" (")[0]
        assert self._process.stdout is not None
        for line in self._process.stdout:
            print(f"{name}| {line}", end="", flush=True)

    def wait(self) -> int:
        """Its status, once it has ended."""
        status = self._process.wait()
        self._thread.join()
        return status

    def interrupt(self) -> None:
        """End it as Ctrl-C does, tidying up included. Idempotent."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        self.wait()


def beside(found: list[Part], arguments: list[str], processors: int) -> Beside | None:
    """Take the last part off `found` and start it, where it would leave processors idle if it ran alone."""
    asked = os.environ.get("HVKVM_TEST_PART") or os.environ.get("HVKVM_TEST_WORKERS")
    if asked or arguments or processors < 2 or len(found) < 2 or found[-1].place != "lab":
        return None
    return Beside(found.pop())


def run_all(
    found: list[Part], arguments: list[str], other: Beside | None
) -> tuple[list[str], list[str], list[str]]:
    """The names of the parts that passed, that failed, and that had no test of those chosen."""
    passed: list[str] = []
    failed: list[str] = []
    empty: list[str] = []
    # In front of the first part's workers, not beside them: they find the byte code that this leaves, and a
    # later part can start at once.
    later = [part for part in found[1:] if part.place == "lab" and not arguments]
    ahead = {part: collected(part.marks, arguments) for part in later}
    for number, part in enumerate(found):
        print(f"== {part.name}", flush=True)
        status = run(part, arguments, ahead.get(part))
        if status == NO_TESTS and arguments:
            empty.append(part.name)
        else:
            (failed if status else passed).append(part.name)
        if other is not None and number == 0:
            # The next part has labs on every processor.
            (failed if other.wait() else passed).append(other.part.name)
    return passed, failed, empty


def main(arguments: list[str]) -> int:
    """Run every part; 0 when all passed, that is, and something ran."""
    usable = os.access("/dev/kvm", os.R_OK | os.W_OK)
    if not usable:
        print("== /dev/kvm cannot be used here: tier 2 runs in the lab", flush=True)
    only = os.environ.get("HVKVM_TEST_PART", "")
    chosen = [part for part in parts(usable, has_hyperv()) if part.name.startswith(only)]
    if not chosen:
        print(f"== FAILED: no part has a name that begins with HVKVM_TEST_PART={only}")
        return 1
    other = beside(chosen, arguments, len(os.sched_getaffinity(0)))
    try:
        passed, failed, empty = run_all(chosen, arguments, other)
    finally:
        if other is not None:
            other.interrupt()
    if not passed and not failed:
        failed, empty = empty, []
    if empty:
        print(f"== no test chosen: {', '.join(empty)}")
    print(f"== passed: {', '.join(passed)}")
    if failed:
        print(f"== FAILED: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("== FAILED: interrupted", flush=True)
        sys.exit(INTERRUPTED)
