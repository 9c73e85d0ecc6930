"""`hvkvm doctor --ci`: what a CI job can run here, said in the ways that a CI job hears.

Prints the report and the tiers of tests that can run. On GitHub's runners each FAIL and WARN
is an annotation, the report goes to the job's summary, and `tiers` is an output. A tier
that HVKVM_REQUIRE names and that cannot run is a failure.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from hvkvm import given_file
from hvkvm.cli.output import cannot_write, show
from hvkvm.errors import CapabilityMissing, ConfigError, OutputError

if TYPE_CHECKING:
    from hvkvm.cli.doctor_check import Check

TIERS = ("anywhere", "kvm", "hyperv")
WRITE_SECONDS = 10.0
"""How long the reader of a pipe may take for what is written to it."""
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
    required = [name for name in environment.get("HVKVM_REQUIRE", "").replace(" ", "").split(",") if name]
    if unknown := [name for name in required if name not in TIERS]:
        raise ConfigError(f"HVKVM_REQUIRE={unknown[0]}: no such tier; choose {', '.join(TIERS[1:])}")
    runs = tiers(report)
    show(text)
    show(f"tiers: {', '.join(runs)}")
    if environment.get("GITHUB_ACTIONS") == "true":
        for line in workflow_commands(report):
            show(line)
    _append(
        (environment.get("GITHUB_STEP_SUMMARY"), summary(report, runs)),
        (environment.get("GITHUB_OUTPUT"), f"tiers={','.join(runs)}\n"),
    )
    failed = next((check.status for check in report if check.verdict == "FAIL"), 0)
    if missing := [name for name in required if name not in runs]:
        show(f"HVKVM_REQUIRE: {', '.join(missing)} cannot run here")
        return failed or CapabilityMissing.exit_status
    return failed


def _append(*wanted: tuple[str | None, str]) -> None:
    """Append each text to its file, if it has one, once all of them are open. OutputError."""
    with ExitStack() as stack:
        opened = []
        for path, text in wanted:
            if path:
                fd = _open(path)
                stack.callback(os.close, fd)
                # A path in the report may be no text.
                opened.append((path, fd, text.encode("utf-8", "backslashreplace")))
        for path, fd, data in opened:
            try:
                given_file.write_in_time(fd, data, WRITE_SECONDS)
            except OSError as error:
                raise OutputError(cannot_write(path, error)) from None


def _open(path: str) -> int:
    """An fd that does not block. OutputError, also for a pipe without its reader: it would be waited for."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ENXIO:
            error.strerror = "nobody reads this pipe"
        raise OutputError(cannot_write(path, error)) from None
    try:
        os.write(fd, b"")  # /dev/full says at once that it takes nothing
    except OSError as error:
        os.close(fd)
        raise OutputError(cannot_write(path, error)) from None
    return fd
