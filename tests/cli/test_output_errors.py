"""Outputs that take nothing: each says which file, why, and nothing else ends for it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from resource import RLIMIT_FSIZE, setrlimit
from typing import TextIO, cast
from unittest import mock

import kernel_images
import pytest
from running_vm import command_line
from tiny_guests import DEADLINE, HANG, SPIN, out, out_string, run_arguments

from hvkvm.abi import board
from hvkvm.cli.status import StatusLine
from hvkvm.cli.teller import Teller

Hvkvm = Callable[..., "subprocess.CompletedProcess[str]"]
Guest = Callable[[bytes], Path]

FULL = "No space left on device"
GOES_ON = f"hvkvm: cannot write to standard output: {FULL}; the guest goes on, and what it prints is lost\n"
LOST = f"hvkvm: {{}} bytes of the guest's output are lost: cannot write to standard output: {FULL}\n"


def ends_with(status: int, text: bytes = b"hello\n") -> bytes:
    return out_string(text) + out(board.GUEST_EXIT_PORT, status) + HANG


def shell(
    redirection: str, *arguments: object, before: Callable[[], object] | None = None
) -> subprocess.CompletedProcess[str]:
    """`hvkvm ARGUMENTS REDIRECTION`, with what is left of standard output and error."""
    words = ["sh", "-c", f'exec "$@" {redirection}', "sh", *command_line(*arguments)]
    return subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE, check=False,
        preexec_fn=before,
    )  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",), ("--version",), ("run", "--help"), ("ctl", "--help"), ("ctl", "kvp", "--help"),
        ("ctl", "list"), ("ctl", "list", "--json"), ("doctor", "--help"), ("trace", "--help"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_every_answer_that_cannot_be_written_is_74(arguments: tuple[str, ...]) -> None:
    result = shell(">/dev/full", *arguments)
    assert (result.returncode, result.stderr) == (74, f"hvkvm: cannot write to standard output: {FULL}\n")
    assert shell(">/dev/full 2>&1", *arguments).returncode == 74


@pytest.mark.kvm
@pytest.mark.parametrize(
    "arguments",
    [("doctor",), ("doctor", "--json"), ("features",), ("features", "--json"), ("features", "none")],
    ids=" ".join,
)
def test_and_so_are_those_that_ask_kvm(arguments: tuple[str, ...]) -> None:
    test_every_answer_that_cannot_be_written_is_74(arguments)


@pytest.mark.parametrize("arguments", [("rum",), ("run",), ("ctl", "explode"), ()], ids=" ".join)
def test_an_error_that_cannot_be_written_keeps_its_status(arguments: tuple[str, ...]) -> None:
    assert shell("2>/dev/full", *arguments).returncode == 2
    assert shell(">/dev/full 2>&1", *arguments).returncode == 2


@pytest.mark.parametrize("arguments", [("--help",), ("run", "--help"), ("ctl", "list")], ids=" ".join)
def test_a_reader_that_went_away_is_141_and_no_error(arguments: tuple[str, ...]) -> None:
    words = " ".join(map(str, command_line(*arguments)))
    reader, writer = os.pipe()
    os.close(reader)  # before anything is written
    result = subprocess.run(
        ["bash", "-c", f"{words}; echo $? >&2"],
        stdout=writer, stderr=subprocess.PIPE, text=True, timeout=DEADLINE, check=False,
    )  # fmt: skip
    os.close(writer)
    assert result.stderr == "141\n"


@pytest.mark.kvm
@pytest.mark.parametrize(("status", "ours"), [(0, 74), (3, 3)])
def test_a_guest_outlives_a_full_standard_output(guest: Guest, status: int, ours: int) -> None:
    result = shell(">/dev/full", *run_arguments(guest(ends_with(status))))
    assert (result.returncode, result.stderr) == (ours, GOES_ON + LOST.format(6))


def limited(size: int, redirection: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """As `shell`, under `ulimit -f` of `size` bytes."""
    return shell(redirection, *arguments, before=lambda: setrlimit(RLIMIT_FSIZE, (size, size)))


@pytest.mark.kvm
def test_a_limit_on_the_files_size_is_told_and_what_fits_is_there(guest: Guest, tmp_path: Path) -> None:
    """The limit leaves room for the guest's RAM, a file too, and the file is almost as long as it already."""
    path = tmp_path / "out"
    limit = 64 << 20
    with path.open("wb") as file:
        file.truncate(limit - 1000)
    result = limited(limit, f">>{path}", *run_arguments(guest(ends_with(0, b"x" * 3000))))
    assert result.returncode == 74, result
    with path.open("rb") as file:
        file.seek(limit - 1000)
        assert file.read() == b"x" * 1000
    assert "cannot write to standard output: File too large; the guest goes on" in result.stderr
    assert "hvkvm: 2000 bytes of the guest's output are lost" in result.stderr


@pytest.mark.kvm
def test_a_limit_below_the_guests_ram_is_named(guest: Guest) -> None:
    result = limited(8 << 20, "", *run_arguments(guest(ends_with(0))))
    assert result.returncode == 2
    assert result.stderr.startswith("hvkvm: --memory 16M: the limit on the size of files (ulimit -f)")
    assert result.stderr.count("\n") == 1


@pytest.mark.kvm
def test_nothing_at_all_can_be_written_and_the_guest_runs_its_course(guest: Guest) -> None:
    assert shell(">/dev/full 2>&1", *run_arguments(guest(ends_with(3)))).returncode == 3
    assert shell(">/dev/full 2>&1", *run_arguments(guest(ends_with(0)))).returncode == 74
    spin = run_arguments(guest(out_string(b"x") + SPIN), "--timeout", "1")
    assert shell(">/dev/full 2>&1", *spin).returncode == 124


@pytest.mark.kvm
def test_a_record_that_cannot_be_written_is_74(guest: Guest) -> None:
    result = shell("2>/dev/full", *run_arguments(guest(ends_with(0)), "--json"))
    assert (result.returncode, result.stdout) == (74, "hello\n")
    assert shell("2>/dev/full", *run_arguments(guest(ends_with(0)))).returncode == 0
    result = shell(">/dev/full", *run_arguments(guest(ends_with(0)), "--json"))
    assert result.returncode == 74
    record = json.loads(result.stderr.splitlines()[-1])
    assert (record["ending"], record["status"]) == ("command exited", 0)


@pytest.mark.kvm
@pytest.mark.parametrize("more", [(), ("--json",), ("--summary",)], ids=["", "json", "summary"])
def test_a_trace_that_cannot_be_written_ends_nothing(guest: Guest, more: tuple[str, ...]) -> None:
    pytest.importorskip("ptrace")
    command = command_line(*run_arguments(guest(ends_with(0))))
    result = shell("", "trace", *more, "--output", "/dev/full", "--", *command)
    assert (result.returncode, result.stdout) == (74, "hello\n")
    told = f"hvkvm: cannot write to --output /dev/full: {FULL}; the command goes on, lines are lost\n"
    assert result.stderr.startswith(told)
    assert result.stderr.endswith("lines of the trace are lost\n")
    assert shell("2>/dev/full", "trace", *more, "--", *command).returncode == 74


@pytest.mark.kvm
@pytest.mark.parametrize("name", ["run.svg", "run.json"])
def test_a_picture_that_cannot_be_written_is_one_line_and_74(guest: Guest, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.symlink_to("/dev/full")
    told = f"hvkvm: {path}: {FULL}; there is no picture\n"
    for more in ((), ("--quiet",)):
        result = shell("", *run_arguments(guest(ends_with(0)), "--timeline", path, *more))
        assert (result.returncode, result.stdout, result.stderr) == (74, "hello\n", told)
    assert shell("", *run_arguments(guest(ends_with(3)), "--timeline", path)).returncode == 3


@pytest.mark.kvm
def test_a_recording_that_cannot_be_written_is_one_line_and_74(guest: Guest, tmp_path: Path) -> None:
    path = tmp_path / "recording"
    path.symlink_to("/dev/full")
    words = ("run", "--kernel", guest(ends_with(0)), "--memory", "16M", "--vmbus", "on", "--synic", "user")
    result = shell("", *words, "--record", path)
    assert result.returncode == 74
    assert result.stderr.count(f"hvkvm: {path}: {FULL}; the recording ends here\n") == 1


@pytest.mark.kvm
def test_a_warm_guest_is_saved_though_its_recording_is_lost(tmp_path: Path) -> None:
    """74, and the file is whole: a copy goes on from it."""
    kernel, busybox, path, file = (tmp_path / name for name in ("kernel", "busybox", "recording", "warm"))
    waits = out_string(b"warm serial\n", board.COM_PORTS[3][0])
    kernel.write_bytes(kernel_images.bzimage(bytes(kernel_images.ENTRY_64) + waits + HANG))
    busybox.write_bytes(kernel_images.vmlinux())  # a static program, which nobody runs
    path.symlink_to("/dev/full")
    words = ("--kernel", kernel, "--busybox", busybox, "--memory", "64M", "--vmbus", "on", "--synic", "user")
    for more in ((), ("--quiet",)):
        result = shell("", "warm", *words, "--record", path, *more, "-o", file)
        assert (result.returncode, result.stdout) == (74, ""), result.stderr
        assert result.stderr.count(f"hvkvm: {path}: {FULL}; the recording ends here\n") == 1
        assert (f"{file}: a warm guest, " in result.stderr) == (not more)
        copy = shell("", "run", "--from", file, "--timeout", "1", "--quiet", "--", "true")
        assert copy.returncode == 124, copy.stderr
        file.unlink()


@pytest.mark.kvm
def test_a_picture_for_a_pipe_that_nobody_reads_is_refused_at_once(guest: Guest, tmp_path: Path) -> None:
    path = tmp_path / "run.svg"
    os.mkfifo(path)
    result = shell("", *run_arguments(guest(ends_with(0)), "--timeline", path))
    said = f"hvkvm: --timeline {path}: nobody reads this pipe; start its reader first\n"
    assert (result.returncode, result.stderr) == (2, said)


class HungUp:
    """A terminal that was one when the run began."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> None:
        raise OSError(errno.EIO, "Input/output error")


def test_the_status_line_ends_with_its_terminal_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is drawn on the I/O loop, where an exception ends the machine."""
    monkeypatch.setenv("TERM", "xterm")
    timers: list[object] = []
    machine = mock.Mock()
    machine.exit_counts.return_value = {}
    machine.platform.io.call_later = lambda *timer: timers.append(timer)
    teller = Teller(cast(TextIO, HungUp()), quiet=False)
    status = StatusLine(machine, teller, enabled=True)
    status.start()
    status._draw()
    teller.flush()
    assert not teller.close()
    status._draw()
    assert len(timers) == 2
    status.clear()
