"""No environment variable, locale, closed stream or byte of an argument brings a traceback, with any verb."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_guests import DEADLINE, HANG, out, out_string, run_arguments

from hvkvm.abi import board

Guest = Callable[[bytes], Path]

BYTES = os.fsdecode(b"\xff\xfe\xe4")
"""What is no UTF-8, as Python has it."""

# What the interpreter itself refuses before hvkvm begins (PYTHONIOENCODING=nonsense) is not here.
ENVIRONMENTS: dict[str, dict[str, str | None]] = {
    "as it is": {},
    "COLUMNS=abc": {"COLUMNS": "abc", "LINES": "abc"},
    "COLUMNS=": {"COLUMNS": "", "LINES": ""},
    "COLUMNS=0": {"COLUMNS": "0"},
    "COLUMNS=-5": {"COLUMNS": "-5"},
    "COLUMNS=3": {"COLUMNS": "3"},
    "COLUMNS=1e3": {"COLUMNS": "1e3"},
    "COLUMNS, 5000 digits": {"COLUMNS": "9" * 5000},
    "COLUMNS, other digits": {"COLUMNS": "\u0663\u0662"},
    "COLUMNS, bytes": {"COLUMNS": BYTES},
    "LANG=C": {"LANG": "C", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    "LC_ALL=POSIX": {"LC_ALL": "POSIX"},
    "LC_ALL unknown": {"LC_ALL": "xx_YY.nonsense", "LANG": "xx_YY"},
    "LC_ALL latin-1": {"LC_ALL": "de_DE.ISO-8859-1"},
    "LC_ALL, bytes": {"LC_ALL": BYTES},
    "ascii streams": {"PYTHONIOENCODING": "ascii"},
    "strict ascii streams": {"PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0"},
    "utf-16 streams": {"PYTHONIOENCODING": "utf-16"},
    "TERM unknown": {"TERM": "nonsense"},
    "TERM unset": {"TERM": None, "NO_COLOR": None},
    "TMPDIR missing": {"TMPDIR": "/dev/null/none", "TEMP": "/dev/null/none", "TMP": "/dev/null/none"},
    "HOME unset": {"HOME": None},
    "HOME missing": {"HOME": "/dev/null/none", "XDG_CACHE_HOME": "/dev/null/none"},
    "HOME empty": {"HOME": "", "HVKVM_CACHE": "/dev/null/x"},
    "runtime folder missing": {"XDG_RUNTIME_DIR": "/dev/null/none"},
    "runtime folder relative": {"XDG_RUNTIME_DIR": "x/../y"},
    "runtime folder no folder": {"XDG_RUNTIME_DIR": "/dev/null"},
    "runtime folder, bytes": {"XDG_RUNTIME_DIR": f"/dev/null/{BYTES}"},
    "runtime folder too long": {"XDG_RUNTIME_DIR": "/" + "x" * 5000},
    "control folder no folder": {"HVKVM_CONTROL_DIR": "/dev/null"},
    "control folder, bytes": {"HVKVM_CONTROL_DIR": f"/dev/null/{BYTES}"},
    "PATH unset": {"PATH": None},
    "PATH odd": {"PATH": f"::{BYTES}:/dev/null"},
    "time zone odd": {"TZ": "Nowhere/At_All"},
    "no name, no shell": {"USER": None, "LOGNAME": None, "SHELL": None},
}

SENTENCES: list[list[str]] = [
    [],
    ["--help"],
    ["--version"],
    ["rum"],
    [BYTES],
    ["run"],
    ["run", "--help"],
    ["run", "--kernel", f"/dev/null/none/{BYTES}"],
    ["run", BYTES],
    ["run", "--kernel", "/dev/null", "--append", BYTES, "--name", BYTES],
    ["run", "--config", BYTES],
    ["run", "--kernel", "/dev/null", "--cpus", BYTES],
    ["ctl"],
    ["ctl", "--help"],
    ["ctl", "list"],
    ["ctl", "list", "--json"],
    ["ctl", "info", "--vm", BYTES],
    ["ctl", "info", "--vm", f"/tmp/{BYTES}"],
    ["ctl", "info", "--vm", "/tmp/" + "x" * 200],
    ["ctl", "keys", BYTES],
    ["ctl", "kvp", "get", BYTES],
    ["ctl", BYTES],
    ["features", BYTES],
    ["features", "--help"],
    ["doctor", BYTES],
    ["doctor", "--help"],
    ["doctor", "--kvm", f"/dev/null/none/{BYTES}"],
    ["doctor", "--kvm", f"/dev/null/none/{BYTES}", "--json"],
    ["features", "--kvm", BYTES],
    ["trace", "--help"],
    ["trace", "--", f"/dev/null/none/{BYTES}"],
    ["trace", "--pid", BYTES],
    ["trace", "--filter", BYTES, "--", "true"],
    ["trace", "--output", f"/dev/null/none/{BYTES}", "--", "true"],
    # These find their files in `verb_files`.
    ["warm"],
    ["warm", "--help"],
    ["warm", BYTES],
    ["warm", "--kernel", "kernel", "-o", f"{BYTES}/x"],
    ["warm", "--kernel", BYTES, "-o", "x"],
    ["top"],
    ["top", "--help"],
    ["top", "--vm", BYTES],
    ["top", "--interval", BYTES],
    ["matrix"],
    ["matrix", "--help"],
    ["matrix", BYTES],
    ["matrix", "matrix.toml", "--list"],
    ["matrix", "matrix.toml", "--junit", f"{BYTES}/x"],
    ["disk"],
    ["disk", "--help"],
    ["disk", BYTES],
    ["disk", "info", BYTES],
    ["disk", "info", "disk.vhdx", "--json"],
    ["disk", "create", f"{BYTES}/x", "1M"],
    ["disk", "create", "x", BYTES],
    ["disk", "convert", BYTES, BYTES],
    ["disk", "check", "disk.vhdx"],
    ["disk", "compact", "disk.raw"],
    ["explain"],
    ["explain", BYTES],
    ["explain", "recording"],
    ["explain", "0e00"],
    ["explain", "--wireshark"],
    ["explain", "--protocol", BYTES, "00"],
    ["replay"],
    ["replay", BYTES],
    ["replay", "recording"],
    ["conform", "--help"],
    ["conform", BYTES],
    ["conform", "--vmm", BYTES],
    ["conform", "--vmm", f"{BYTES} {{kernel}}"],
    ["conform", "--format", BYTES],
    ["man"],
    ["man", BYTES],
    ["man", "disk"],
    ["completion"],
    ["completion", BYTES],
    ["completion", "zsh"],
]

# One process takes all sentences: what differs is the environment it was started in.
MANY = """
import os, sys, traceback
from hvkvm.cli import main
report = os.fdopen(int(sys.argv[1]), "wb", buffering=0)
for line in sys.argv[2:]:
    words = line.split("\\n") if line else []
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        report.write(os.fsencode(repr(words)) + b"\\n" + traceback.format_exc().encode(errors="replace"))
        continue
    if status not in (0, 2, 69, 77):
        report.write(f"{words!r}: status {status}\\n".encode(errors="replace"))
report.write(b"end\\n")
"""


def environment(changes: dict[str, str | None]) -> dict[str, str]:
    found = {**os.environ, "HVKVM_CONTROL_DIR": "/dev/null/none", **changes}
    if "XDG_RUNTIME_DIR" in changes:
        del found["HVKVM_CONTROL_DIR"]
    return {name: value for name, value in found.items() if value is not None}


def unhappy(
    changes: dict[str, str | None],
    sentences: list[list[str]],
    redirection: str = "",
    folder: Path | None = None,
) -> str:
    """What went wrong with any of `sentences`, which are said in `folder`."""
    reader, writer = os.pipe()
    lines = ["\n".join(words) for words in sentences]
    command = [sys.executable, "-c", MANY, str(writer), *lines]
    with os.fdopen(reader, "rb") as report:
        result = subprocess.run(
            ["/bin/sh", "-c", f'exec "$@" {redirection}', "sh", *command],
            stdin=subprocess.DEVNULL, capture_output=True, pass_fds=(writer,), timeout=DEADLINE, check=False,
            env=environment(changes), cwd=folder,
        )  # fmt: skip
        os.close(writer)
        said = report.read().decode(errors="replace")
    assert said.endswith("end\n"), (said, result)
    assert b"Traceback" not in result.stderr, result.stderr.decode(errors="replace")
    assert b"Exception ignored" not in result.stderr, result.stderr.decode(errors="replace")
    assert result.returncode == 0, result
    return said.removesuffix("end\n")


@pytest.mark.parametrize("changes", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_no_environment_brings_a_traceback(changes: dict[str, str | None], verb_files: Path) -> None:
    sentences = SENTENCES
    if "XDG_RUNTIME_DIR" in changes:  # then VMs that are not this test's may be found
        others = (["ctl", "keys"], ["ctl", "kvp"], ["top"])
        sentences = [words for words in SENTENCES if words[:2] not in others]
    assert unhappy(changes, sentences, folder=verb_files) == ""


REDIRECTIONS = ["<&-", ">&-", "2>&-", "<&- >&-", "<&- 2>&-", ">&- 2>&-", "<&- >&- 2>&-", "</dev/full"]


@pytest.mark.parametrize("redirection", REDIRECTIONS)
def test_no_closed_stream_brings_a_traceback(redirection: str, verb_files: Path) -> None:
    assert unhappy({}, SENTENCES, redirection, verb_files) == ""


# What a run reads beyond its arguments: folders, programs, and how its streams encode.
OF_A_RUN = [
    name for name in ENVIRONMENTS if not name.startswith(("COLUMNS", "TERM", "TMPDIR", "time", "no "))
]


@pytest.mark.kvm
@pytest.mark.parametrize("changes", [ENVIRONMENTS[name] for name in OF_A_RUN], ids=OF_A_RUN)
def test_a_guest_runs_in_every_environment(guest: Guest, changes: dict[str, str | None]) -> None:
    kernel = guest(out_string(b"hello \xff\n") + out(board.GUEST_EXIT_PORT, 0) + HANG)
    words = [*map(str, run_arguments(kernel, "--control", "auto")), "--append", BYTES]
    assert unhappy(changes, [[*words, "--json"], ["features"]]) == ""


@pytest.mark.kvm
@pytest.mark.parametrize("redirection", REDIRECTIONS)
def test_a_guest_runs_with_every_stream_closed(guest: Guest, redirection: str) -> None:
    kernel = guest(out_string(b"hello\n") + out(board.GUEST_EXIT_PORT, 0) + HANG)
    assert unhappy({}, [[*map(str, run_arguments(kernel))], ["doctor", "--json"]], redirection) == ""
