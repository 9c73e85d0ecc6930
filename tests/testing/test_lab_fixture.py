"""The fixture `lab`: a command where KVM has Hyper-V, by whatever way this machine has to it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from hvkvm.testing import lab as module

Lab = Callable[..., "subprocess.CompletedProcess[str]"]
FOUND = "from hvkvm.testing.tiers import missing; print(missing('hyperv')); raise SystemExit(5)"


@pytest.mark.hyperv
def test_the_command_finds_hyperv(lab: Lab) -> None:
    done = lab(sys.executable, "-c", FOUND)
    assert (done.returncode, done.stdout) == (5, "None\n"), done


@pytest.fixture
def no_hyperv(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without it."""
    monkeypatch.setattr(module, "missing", lambda tier: "none here")
    monkeypatch.delenv("HVKVM_REQUIRE", raising=False)


def program(folder: Path, body: str) -> Path:
    path = folder / "a lab"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_a_lab_that_is_named_runs_it(
    lab: Lab, no_hyperv: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = program(tmp_path, 'echo "$@"; shift 3; echo err >&2; exec "$@"')
    monkeypatch.setenv("HVKVM_LAB", f"'{path}' --cpus 2")
    done = lab("sh", "-c", "echo ran; exit 3")
    assert (done.returncode, done.stderr) == (3, "err\n")
    assert done.stdout == "--cpus 2 -- sh -c echo ran; exit 3\nran\n"


def test_a_lab_is_named_from_where_the_session_began(
    lab: Lab, no_hyperv: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A test that had gone elsewhere found none."""
    program(tmp_path, 'shift; exec "$@"')
    monkeypatch.setattr(module, "START", tmp_path)
    monkeypatch.setenv("HVKVM_LAB", "'./a lab'")
    monkeypatch.chdir("/")
    assert lab("pwd").stdout == "/\n"


def test_without_one_the_test_is_skipped_or_fails(
    lab: Lab, no_hyperv: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HVKVM_LAB", raising=False)
    with pytest.raises(pytest.skip.Exception, match="none here; name a lab by HVKVM_LAB"):
        lab("true")
    monkeypatch.setenv("HVKVM_REQUIRE", "hyperv")
    with pytest.raises(pytest.fail.Exception, match="HVKVM_REQUIRE=hyperv, but"):
        lab("true")


def test_its_time_is_bounded_and_nothing_is_left(
    lab: Lab, no_hyperv: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = program(tmp_path, 'shift; exec "$@"')
    monkeypatch.setenv("HVKVM_LAB", f"'{path}'")
    with pytest.raises(subprocess.TimeoutExpired):
        lab("sleep", "1000", seconds=0.2)


KILLED = """
from hvkvm.testing import lab
lab.missing = lambda tier: "none here"
lab.run("true")
"""


def test_it_ends_with_tests_that_are_killed(tmp_path: Path) -> None:
    """A lab is told to end, so that it can end what it started."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    path = program(
        tmp_path, f"exec 3>'{fifo}'; trap 'echo told >&3; kill $!; exit' TERM; echo $$ >&3; sleep 1000 & wait"
    )
    environment = {**os.environ, "HVKVM_LAB": f"'{path}'", "HVKVM_REQUIRE": ""}
    with subprocess.Popen([sys.executable, "-c", KILLED], env=environment) as process:
        with fifo.open("rb", buffering=0) as alive:
            group = int(alive.readline())
            try:
                process.kill()
                assert select.select([alive], [], [], 30)[0], "the lab goes on"
                assert alive.readline() == b"told\n"
            finally:
                process.kill()
                with suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
