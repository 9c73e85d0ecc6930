"""`hvkvm doctor --ci`, and the action for GitHub that runs it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from hvkvm.cli import main as hvkvm_main
from hvkvm.cli.doctor_check import Check
from hvkvm.cli.doctor_ci import main, summary, tiers, workflow_commands
from hvkvm.errors import ConfigError, OutputError

ACTION = Path(__file__).parents[2] / ".github/actions/setup-hvkvm/action.yml"
GOOD = [Check("PASS", "/dev/kvm", "usable"), Check("PASS", "KVM_CAP_HYPERV_SYNIC2", "there")]
BARE = [
    Check("PASS", "/dev/kvm", "usable"),
    Check("WARN", "KVM_CAP_HYPERV_SYNIC2", "100%\nabsent", "scripts/lab"),
]
NONE = [Check("FAIL", "/dev/kvm", "no such file", "load kvm", 69)]

Hvkvm = Callable[..., "subprocess.CompletedProcess[str]"]


def test_tiers_follow_from_the_report() -> None:
    assert [tiers(report) for report in (GOOD, BARE, NONE)] == [
        ["anywhere", "kvm", "hyperv"],
        ["anywhere", "kvm"],
        ["anywhere"],
    ]


def test_annotations_are_one_line_each() -> None:
    assert workflow_commands(GOOD) == []
    warning = "::warning title=hvkvm doctor, KVM_CAP_HYPERV_SYNIC2::100%25%0Aabsent; scripts/lab"
    assert workflow_commands(BARE) == [warning]
    assert workflow_commands(NONE)[0].startswith("::error title=hvkvm doctor, /dev/kvm::")
    assert "| WARN | KVM_CAP_HYPERV_SYNIC2 |" in summary(BARE, tiers(BARE))


@pytest.mark.parametrize(
    ("report", "required", "status"),
    [(GOOD, "kvm,hyperv", 0), (BARE, "kvm", 0), (BARE, "kvm,hyperv", 77), (NONE, "", 69), (NONE, "kvm", 69)],
)
def test_a_required_tier_that_cannot_run_fails(
    tmp_path: Path, report: list[Check], required: str, status: int
) -> None:
    files = {key: str(tmp_path / key) for key in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT")}
    assert main(report, "text", {"HVKVM_REQUIRE": required, **files}) == status
    assert (tmp_path / "GITHUB_OUTPUT").read_text() == f"tiers={','.join(tiers(report))}\n"
    assert "### hvkvm doctor" in (tmp_path / "GITHUB_STEP_SUMMARY").read_text()


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(ConfigError, match="no such tier"):
        main(GOOD, "text", {"HVKVM_REQUIRE": "kmv"})
    with pytest.raises(OutputError, match="cannot write to /no"):
        main(GOOD, "text", {"GITHUB_OUTPUT": "/no/such/folder"})


@pytest.mark.timeout(60)
def test_nothing_is_appended_unless_all_of_it_can_be(tmp_path: Path) -> None:
    """And a pipe that nobody reads is not waited for."""
    pipe, written = tmp_path / "pipe", tmp_path / "summary"
    os.mkfifo(pipe)
    written.write_text("before\n")
    for key, other in (("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY"), ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT")):
        with pytest.raises(OutputError, match=f"cannot write to {pipe}: nobody reads this pipe"):
            main(GOOD, "text", {key: str(pipe), other: str(written)})
        assert written.read_text() == "before\n"
    with pytest.raises(OutputError, match="cannot write to /dev/full: No space left on device"):
        main(GOOD, "text", {"GITHUB_OUTPUT": "/dev/full", "GITHUB_STEP_SUMMARY": str(written)})
    assert written.read_text() == "before\n"
    assert main(GOOD, "text", {"GITHUB_OUTPUT": str(written)}) == 0
    assert written.read_text() == "before\ntiers=anywhere,kvm,hyperv\n"


@pytest.mark.parametrize("flag", ["--json", "--windows"])
def test_it_has_no_report_as_json_and_none_of_windows(hvkvm: Hvkvm, flag: str) -> None:
    result = hvkvm("doctor", "--ci", flag)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"hvkvm: {flag}: --ci ")
    assert result.stderr.count("\n") == 1


def test_a_path_that_is_no_text_is_told_to_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary"))
    monkeypatch.delenv("HVKVM_REQUIRE", raising=False)
    assert hvkvm_main(["doctor", "--ci", "--kvm", os.fsdecode(b"/no/k\xff")]) == 69
    assert "| FAIL | /no/k\\udcff | " in (tmp_path / "summary").read_text()


def steps() -> dict[str, str]:
    """The action's shell steps by their names."""
    found = {}
    for block in re.split(r"^    - name: ", ACTION.read_text(), flags=re.MULTILINE)[1:]:
        name, _, rest = block.partition("\n")
        _, run, script = rest.partition("      run: |\n")
        if run:
            found[name] = "".join(
                line[8:] + "\n" for line in script.splitlines() if line.startswith("        ")
            )
    return found


@pytest.mark.kvm
def test_the_actions_steps_are_shell_that_runs(tmp_path: Path) -> None:
    """Each is read by bash; the doctor's is run, as a runner would."""
    found = steps()
    assert list(found) == [
        "Let everybody use KVM",
        "Install what guests need",
        "Install hvkvm",
        "Say what can run",
    ]
    for script in found.values():
        assert subprocess.run(["bash", "-n", "-c", script], check=False).returncode == 0
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", "-s", "bash", "-"], input=script.encode(), check=True)
    folder = tmp_path / "bin"
    folder.mkdir()
    script_of_ours = folder / "hvkvm"
    import sys

    script_of_ours.write_text(f'#!/bin/sh\nexec {sys.executable} -m hvkvm "$@"\n')
    script_of_ours.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "GITHUB_ACTIONS": "true",
        "GITHUB_OUTPUT": str(tmp_path / "output"),
        "HVKVM_REQUIRE": "kvm",
    }
    command = ["bash", "-e", "-c", found["Say what can run"]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    assert "tiers: anywhere, kvm" in done.stdout
    assert (tmp_path / "output").read_text().startswith("tiers=anywhere,kvm")
