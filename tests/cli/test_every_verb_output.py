"""Every verb's answer on a standard output that takes nothing, or that nobody reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tiny_guests import DEADLINE

FULL = "hvkvm: cannot write to standard output: No space left on device\n"

ANSWERS: list[list[str]] = [
    ["warm", "--help"],
    ["top", "--help"],
    ["matrix", "--help"],
    ["matrix", "matrix.toml", "--list"],
    ["disk", "--help"],
    ["disk", "info", "--help"],
    ["disk", "info", "disk.raw"],
    ["disk", "info", "disk.raw", "--json"],
    ["disk", "check", "disk.raw"],
    ["disk", "check", "disk.vhdx"],
    ["disk", "compact", "disk.raw"],
    ["explain", "--help"],
    ["explain", "recording"],
    ["explain", "0e000000000000000300050000000000"],
    ["explain", "--wireshark"],
    ["replay", "--help"],
    ["replay", "recording"],
    ["replay", "recording", "--json"],
    ["conform", "--help"],
    ["conform", "--vmm", "sh -c 'echo; echo R 0 1; echo END' {kernel}"],
    ["doctor", "--help"],
    ["features", "--help"],
    ["man"],
    ["man", "run"],
    ["completion", "bash"],
]

# What they name is in `verb_files`. One process takes all of them, each with a standard output of its own:
# /dev/full, or a pipe without a reader.
EACH = """
import json, os, sys
from hvkvm.cli import main
full, found = sys.argv[1] == "full", []
for words in json.loads(sys.argv[2]):
    if full:
        output = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, output = os.pipe()
        os.close(reader)
    told = os.memfd_create("told")
    os.dup2(output, 1)
    os.dup2(told, 2)
    os.close(output)
    try:
        status = main(words)
    except BaseException as error:
        status = repr(error)
    size = os.fstat(told).st_size
    found.append([words, status, os.pread(told, size, 0).decode()])
    os.close(told)
with open(sys.argv[3], "w") as file:
    json.dump(found, file)
os._exit(0)
"""


def each(folder: Path, output: str) -> list[list[object]]:
    """The words, status and standard error of each of ANSWERS."""
    report = folder / f"report-{output}"
    words = [sys.executable, "-c", EACH, output, json.dumps(ANSWERS), str(report)]
    # Python asks at its start whether its standard output can seek: a pipe cannot.
    subprocess.run(words, cwd=folder, stdout=subprocess.PIPE, timeout=DEADLINE, check=True)
    found: list[list[object]] = json.loads(report.read_text())
    return found


def test_every_answer_that_cannot_be_written_is_74(verb_files: Path) -> None:
    assert each(verb_files, "full") == [[words, 74, FULL] for words in ANSWERS]


def test_every_answer_that_nobody_reads_is_141_and_silent(verb_files: Path) -> None:
    assert each(verb_files, "pipe") == [[words, 141, ""] for words in ANSWERS]
