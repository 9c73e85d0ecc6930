"""What the host does not allow is raised where it can be, and else said in one line with the remedy."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_guests import HANG, out, run_arguments

from hvkvm.abi import board

pytestmark = pytest.mark.kvm

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Guest = Callable[[bytes], Path]


def files(soft: int, hard: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def kernel(guest: Guest) -> Path:
    """Exits with 3."""
    return guest(out(board.GUEST_EXIT_PORT, 3) + HANG)


def test_a_soft_limit_of_open_files_is_raised(hvkvm: Run, kernel: Path) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    hard = 4096 if most == resource.RLIM_INFINITY else min(4096, most)
    done = hvkvm(*run_arguments(kernel, "--cpus", 40), preexec_fn=files(48, hard))
    assert (done.returncode, done.stderr) == (3, "")


def test_a_hard_limit_that_is_too_low_is_named_with_the_remedy(hvkvm: Run, kernel: Path) -> None:
    done = hvkvm(*run_arguments(kernel, "--cpus", 254), preexec_fn=files(200, 200))
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("hvkvm: --cpus 254: needs ")
    assert "this process may have 200 (`ulimit -Hn`); raise that limit, or choose fewer" in line


def test_memory_that_the_host_refuses_is_one_line(hvkvm: Run, kernel: Path) -> None:
    def little() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))

    done = hvkvm(*run_arguments(kernel), "--memory", "4G", preexec_fn=little)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("hvkvm: --memory 4096M: the host refuses it (mmap of ")
    assert line.endswith(" bytes: Cannot allocate memory); ask for less")
