"""Commands where KVM has in-kernel Hyper-V, for tests: on this machine, or in a nested lab.

HVKVM_LAB names the program that runs a command in a lab, as `scripts/lab` of hvkvm's
repository does: PROGRAM -- COMMAND. Any thread.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from hvkvm.testing.kernels import START
from hvkvm.testing.parent_death import signal_at_parents_death
from hvkvm.testing.tiers import missing, required_tiers

VARIABLE = "HVKVM_LAB"
SECONDS = 600.0


def prefix() -> list[str]:
    """What stands before a command so that it finds in-kernel Hyper-V. Skips where there is no way to it."""
    reason = missing("hyperv")
    if reason is None:
        return []
    named = shlex.split(os.environ.get(VARIABLE, ""))
    if named:
        if "/" in named[0]:  # else it is looked for on PATH
            named[0] = str(START / named[0])
        return [*named, "--"]
    said = f"needs hyperv: {reason}; name a lab by {VARIABLE}, such as scripts/lab of hvkvm's repository"
    if "hyperv" in required_tiers():
        pytest.fail(f"HVKVM_REQUIRE=hyperv, but {said}", pytrace=False)
    pytest.skip(said)


def run(*command: str, seconds: float = SECONDS, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command there: its status and what it printed. subprocess.TimeoutExpired after `seconds`.

    What it started ends with it. OSError for a lab that is not there.
    """
    words = [*prefix(), *command]
    with subprocess.Popen(
        words,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=signal_at_parents_death(signal.SIGTERM),  # noqa: PLW1509 (takes no lock)
    ) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(words, process.returncode, out, err)
