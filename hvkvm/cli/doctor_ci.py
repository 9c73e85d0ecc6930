"""`hvkvm doctor --ci`: what a CI job can run here, said in the ways that a CI job hears.

Prints the report and the tiers of tests that can run. On GitHub's runners each FAIL and WARN
is an annotation, the report goes to the job's summary, and `tiers` is an output. A tier
that HVKVM_REQUIRE names and that cannot run is a failure.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hvkvm.errors import CapabilityMissing, ConfigError, OutputError

if TYPE_CHECKING:
    from hvkvm.cli.doctor_check import Check

TIERS = ("anywhere", "kvm", "hyperv")
_COMMANDS = {"FAIL": "error", "WARN": "warning"}


def tiers(report: Sequence[Check]) -> list[str]:
    """Which tiers of tests this machine can run."""
    found = ["anywhere"]
    if not any(check.verdict == "FAIL" for check in report):
        found.append("kvm")
        if any(check.name == "KVM_CAP_HYPERV_SYNIC2" and check.verdict == "PASS" for check in report):
            found.append("hyperv")
    return found


def workflow_commands(report: Sequence[Check]) -> list[str]:
    """Workflow commands of GitHub's, one for each line that is not well."""
    lines = []
    for check in report:
        if check.verdict in _COMMANDS:
            text = f"{check.detail}; {check.remedy}" if check.remedy else check.detail
            escaped = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
            lines.append(f"::{_COMMANDS[check.verdict]} title=hvkvm doctor, {check.name}::{escaped}")
    return lines


def summary(report: Sequence[Check], runs: Sequence[str]) -> str:
    """The report as Markdown."""
    rows = "".join(f"| {check.verdict} | {check.name} | {check.detail} |\n" for check in report)
    head = f"### hvkvm doctor\n\nTiers of tests here: {', '.join(runs)}\n\n"
    return f"{head}| | | |\n| --- | --- | --- |\n{rows}\n"


def main(report: Sequence[Check], text: str, environment: Mapping[str, str] = os.environ) -> int:
    """Say all of it; the exit status. ConfigError for an unknown tier in HVKVM_REQUIRE."""
    from hvkvm.cli.output import show

    required = [name for name in environment.get("HVKVM_REQUIRE", "").replace(" ", "").split(",") if name]
    if unknown := [name for name in required if name not in TIERS]:
        raise ConfigError(f"HVKVM_REQUIRE={unknown[0]}: no such tier; choose {', '.join(TIERS[1:])}")
    runs = tiers(report)
    show(text)
    show(f"tiers: {', '.join(runs)}")
    if environment.get("GITHUB_ACTIONS") == "true":
        for line in workflow_commands(report):
            show(line)
    _append(environment.get("GITHUB_STEP_SUMMARY"), summary(report, runs))
    _append(environment.get("GITHUB_OUTPUT"), f"tiers={','.join(runs)}\n")
    failed = next((check.status for check in report if check.verdict == "FAIL"), 0)
    if missing := [name for name in required if name not in runs]:
        show(f"HVKVM_REQUIRE: {', '.join(missing)} cannot run here")
        return failed or CapabilityMissing.exit_status
    return failed


def _append(path: str | None, text: str) -> None:
    if not path:
        return
    try:
        # A path in the report may be no text, and a job's locale may be C.
        with Path(path).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as error:
        raise OutputError(f"cannot write to {path}: {error.strerror}") from None
