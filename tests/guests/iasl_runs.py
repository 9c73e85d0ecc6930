"""iasl (package acpica-tools) on our ACPI tables: a complaint fails the test, unless it is listed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

KNOWN = {
    # Of iasl 20260408. Hyper-V's own VMBS has no _SRS: there is nothing to set, and Windows knows it so.
    "(Device has a _DIS, missing a _SRS, required)": "Device (VMBS)",
}
"""A complaint's end, and the line of the source that it is about."""


CANNOT = 'Field name "Precise Baud rate" needed'
"""iasl of 2026 knows SPCR in its revision 4 alone: it cannot compile what it shows of ours, of revision 2."""


def shows_resources(source: str) -> bool:
    """Whether the disassembler knew resource templates: iasl 20260408 shows its own as bytes, too."""
    return "ResourceTemplate" in source


def iasl(folder: Path, *arguments: str) -> str:
    """What it printed; "" where it cannot do this, for a reason that is known."""
    tool = shutil.which("iasl")
    if tool is None:
        pytest.skip("iasl is not installed (package acpica-tools)")
    done = subprocess.run([tool, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    if done.returncode and CANNOT in output:
        return ""
    assert done.returncode == 0, output
    before, known_ones = "", 0
    for line in output.splitlines():
        if re.search(r"\b(Error|Warning|Remark|Incorrect|Invalid)\b", line):
            known_ones += 1
            about = next((about for known, about in KNOWN.items() if line.endswith(known)), None)
            assert about is not None, output
            assert before.endswith(about), output
        before = line
    if "Compilation" in output:
        assert f"0 Errors, {known_ones} Warnings, 0 Remarks" in output, output
    return output
