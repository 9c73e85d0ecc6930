"""`hvkvm run` on real KVM with guests of a few bytes: endings, statuses, signals, the terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import termios
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from running_vm import command_line
from tiny_guests import DEADLINE, HANG, SPIN, TRIPLE_FAULT, out, out_string, run_arguments

from hvkvm.abi import board
from hvkvm.cli import run
from hvkvm.kvm.kind import probe
from hvkvm.machine import dump
from hvkvm.machine.machine import Machine

pytestmark = pytest.mark.kvm

Hvkvm = Callable[..., "subprocess.CompletedProcess[str]"]
Guest = Callable[[bytes], Path]


def test_output_and_debug_exit_status(hvkvm: Hvkvm, guest: Guest) -> None:
    result = hvkvm(*run_arguments(guest(out_string(b"hello\n") + out(board.DEBUG_EXIT_PORT, 3) + HANG)))
    assert (result.returncode, result.stdout, result.stderr) == (7, "hello\n", "")


@pytest.mark.parametrize("status", [0, 1, 42, 255])
def test_the_guest_commands_status_is_ours(hvkvm: Hvkvm, guest: Guest, status: int) -> None:
    result = hvkvm(*run_arguments(guest(out(board.GUEST_EXIT_PORT, status) + HANG)))
    assert (result.returncode, result.stderr) == (status, "")


def test_triple_fault_is_254_and_says_where(hvkvm: Hvkvm, guest: Guest) -> None:
    result = hvkvm(*run_arguments(guest(out_string(b"x") + TRIPLE_FAULT)))
    assert result.returncode == 254
    assert result.stdout == "x"
    *state, line = result.stderr.splitlines()
    if probe().forgets_triple_faults:
        assert (state, line.partition(" on ")[0]) == ([], "hvkvm: triple fault: vcpu0; where is not known:")
        return
    assert line.startswith("hvkvm: triple fault: vcpu0 at rip=0x10")
    assert state[0].startswith("vcpu0: ended; exits: ")
    assert any(" rip=0x10" in one for one in state)


def test_a_machine_that_cannot_be_described_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGQUIT asks a guest of weeks, and hvkvm was exchanged meanwhile: what is imported now does not fit."""

    def does_not_fit(_parts: object) -> str:
        raise ImportError("cannot import name 'x'")

    monkeypatch.setattr(dump, "describe", does_not_fit)
    said = run._describe(cast(Machine, SimpleNamespace(parts=None)))
    assert said.startswith("hvkvm: no description can be had: ImportError: cannot import name 'x' (")


@pytest.mark.parametrize("given", ["reboot=triple", "reboot=k quiet reboot=w,t,force"])
def test_a_triple_fault_that_was_asked_for_says_so(hvkvm: Hvkvm, guest: Guest, given: str) -> None:
    result = hvkvm(*run_arguments(guest(TRIPLE_FAULT), "--append", given))
    assert result.returncode == 254
    told = f"; {given.split()[-1]} has Linux reset so: leave it out, or use reboot=acpi\n"
    assert result.stderr.endswith(told)
    assert result.stderr.count("\n") == 1
    for other in ("reboot=acpi", "reboot=t reboot=k", "noreboot=t", "reboot=w"):
        assert hvkvm(*run_arguments(guest(TRIPLE_FAULT), "--append", other)).stderr.count(" has Linux") == 0


@pytest.mark.parametrize("code", [HANG, SPIN, out_string(b"last words\n") + SPIN])
def test_timeout_is_124_and_says_who_waits_for_what(hvkvm: Hvkvm, guest: Guest, code: bytes) -> None:
    result = hvkvm(*run_arguments(guest(code), "--timeout", "2"))
    assert result.returncode == 124
    assert "vcpu0: running guest" in result.stderr
    assert "rip=0x10" in result.stderr
    assert "the guest had not finished after 2 s" in result.stderr
    if b"last words" in code or result.stdout:
        assert result.stdout == "last words\n"
        assert "| last words" in result.stderr
    else:
        assert "no output yet" in result.stderr


@pytest.mark.parametrize("seconds", ["3000000", "1e300", "inf"])
def test_a_time_that_no_poll_takes_at_once_is_waited_for(hvkvm: Hvkvm, guest: Guest, seconds: str) -> None:
    end = out(board.GUEST_EXIT_PORT, 7) + HANG
    result = hvkvm(*run_arguments(guest(end), "--timeout", seconds))
    assert (result.returncode, result.stderr) == (7, "")


def test_reset_reboots_in_place(hvkvm: Hvkvm, guest: Guest) -> None:
    # The first life marks a byte of RAM, which a reset leaves alone; the second finds it and exits.
    mark = 0x200000
    code = (
        out_string(b"a")
        + b"\x80\x3d" + mark.to_bytes(4, "little") + b"\x01"  # cmp byte [mark], 1
        + b"\x74\x10"  # je past the reset
        + b"\xc6\x05" + mark.to_bytes(4, "little") + b"\x01"  # mov byte [mark], 1
        + out(board.RESET_PORT, board.RESET_VALUE) + SPIN
        + out(board.DEBUG_EXIT_PORT, 0) + HANG
    )  # fmt: skip
    result = hvkvm(*run_arguments(guest(code), "--json", "--timeout", "30"))
    record = json.loads(result.stderr.splitlines()[-1])
    assert (result.returncode, result.stdout) == (1, "aa"), result
    assert (record["ending"], record["resets"]) == ("debug exit", 1)


def test_no_reboot_ends_at_the_reset(hvkvm: Hvkvm, guest: Guest) -> None:
    code = out(board.RESET_PORT, board.RESET_VALUE) + SPIN
    result = hvkvm(*run_arguments(guest(code), "--no-reboot", "--json"))
    assert result.returncode == 0
    assert json.loads(result.stderr.splitlines()[-1])["ending"] == "reset"


def test_json_is_all_that_is_said_of_a_machine_without_enlightenments(hvkvm: Hvkvm, guest: Guest) -> None:
    """Which it is where KVM has no Hyper-V of its own."""
    code = out(board.DEBUG_EXIT_PORT, 0) + HANG
    words = ("run", "--kernel", guest(code), "--memory", "64M", "--synic", "kernel", "--timeout", "30")
    result = hvkvm(*words, "--json")
    assert json.loads(result.stderr)["ending"] == "debug exit"


PANIC = b"Kernel panic - not syncing: VFS: no root"


def test_a_linux_panic_on_the_console_is_255(hvkvm: Hvkvm, guest: Guest) -> None:
    text = PANIC + b"\r\n---[ end " + PANIC + b" ]---\r\n"
    result = hvkvm(*run_arguments(guest(out_string(text) + out(board.RESET_PORT, board.RESET_VALUE) + SPIN)))
    assert result.returncode == 255
    assert result.stderr == "hvkvm: guest panic: Kernel panic - not syncing: VFS: no root\n"


RESET = out(board.RESET_PORT, board.RESET_VALUE) + SPIN


@pytest.mark.parametrize(
    ("text", "end", "status"),
    [(PANIC, RESET, 0), (PANIC + b"\r\n42 tests passed\r\n", RESET, 0), (PANIC + b"\r\n", SPIN, 124)],
    ids=["then a reset", "then more and a reset", "then nothing"],
)
def test_a_guest_that_quotes_a_panic_has_none(
    hvkvm: Hvkvm, guest: Guest, text: bytes, end: bytes, status: int
) -> None:
    result = hvkvm(*run_arguments(guest(out_string(text) + end), "--no-reboot", "--timeout", "2", "--json"))
    ending = json.loads(result.stderr.splitlines()[-1])["ending"]
    assert (result.returncode, ending) == (status, "timeout" if status else "reset")


def test_power_off_by_acpi(hvkvm: Hvkvm, guest: Guest) -> None:
    value = board.PM1_CNT_SLP_EN | board.S5_SLP_TYP << board.PM1_CNT_SLP_TYP_SHIFT
    port = board.PM1A_CNT_PORT.to_bytes(2, "little")
    code = b"\x66\xb8" + value.to_bytes(2, "little") + b"\x66\xba" + port + b"\x66\xef" + HANG  # out dx, ax
    result = hvkvm(*run_arguments(guest(code)))
    assert (result.returncode, result.stderr) == (0, "")


class Running:
    """A started command, with its output as it comes."""

    def __init__(self, *arguments: object, terminal: int | None = None) -> None:
        stdin = subprocess.DEVNULL if terminal is None else terminal
        output = subprocess.PIPE if terminal is None else terminal
        self.process = subprocess.Popen(
            command_line(*arguments),
            stdin=stdin, stdout=output, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def wait_for_output(self, fd: int, text: bytes) -> bytes:
        seen = b""
        end = time.monotonic() + DEADLINE
        while text not in seen:
            assert time.monotonic() < end, seen
            if select.select([fd], [], [], 0.2)[0]:
                seen += os.read(fd, 4096)
        return seen

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, errors.decode()


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_signals_end_the_run(guest: Guest, number: signal.Signals, status: int) -> None:
    running = Running(*run_arguments(guest(out_string(b"up\n") + SPIN)))
    assert running.process.stdout is not None
    running.wait_for_output(running.process.stdout.fileno(), b"up\n")
    running.process.send_signal(number)
    code, errors = running.end()
    assert (code, errors) == (status, f"hvkvm: quit: {number.name}\n")


def test_a_run_under_nohup_outlives_its_terminal(guest: Guest) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        running = Running(*run_arguments(guest(out_string(b"up\n") + SPIN)))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert running.process.stdout is not None
    running.wait_for_output(running.process.stdout.fileno(), b"up\n")
    running.process.send_signal(signal.SIGHUP)
    running.process.send_signal(signal.SIGTERM)
    assert running.end() == (143, "hvkvm: quit: SIGTERM\n")


def test_sigquit_dumps_and_goes_on(guest: Guest) -> None:
    running = Running(*run_arguments(guest(out_string(b"up\n") + SPIN), "--cpus", "2"))
    assert running.process.stdout is not None
    running.wait_for_output(running.process.stdout.fileno(), b"up\n")
    assert running.process.stderr is not None
    seen = b""
    for _ in range(3):
        running.process.send_signal(signal.SIGQUIT)
        seen += running.wait_for_output(running.process.stderr.fileno(), b"| up")
        assert running.process.poll() is None
    running.process.send_signal(signal.SIGTERM)
    code, last = running.end()
    errors = seen.decode() + last
    assert code == 143, errors
    assert "vcpu0: running guest" in errors
    assert "vcpu1: " in errors
    assert "uninitialized" in errors
    assert "| up" in errors


@pytest.mark.parametrize("keys", [b"\x03", b"\x01x"], ids=["ctrl-c", "ctrl-a x"])
def test_keys_end_a_guest_that_does_not_listen_and_restore_the_terminal(guest: Guest, keys: bytes) -> None:
    leader, follower = pty.openpty()
    try:
        before = termios.tcgetattr(follower)
        running = Running(*run_arguments(guest(out_string(b"up\n") + SPIN), "--quiet"), terminal=follower)
        running.wait_for_output(leader, b"up")
        os.write(leader, keys)
        code, errors = running.end()
        assert code == 130, errors
        assert termios.tcgetattr(follower) == before
    finally:
        os.close(leader)
        os.close(follower)


def test_ctrl_a_d_dumps_and_the_guest_goes_on(guest: Guest) -> None:
    leader, follower = pty.openpty()
    try:
        running = Running(*run_arguments(guest(out_string(b"up\n") + SPIN), "--quiet"), terminal=follower)
        running.wait_for_output(leader, b"up")
        os.write(leader, b"\x01d")
        assert running.process.stderr is not None
        running.wait_for_output(running.process.stderr.fileno(), b"vcpu0: running guest")
        assert running.process.poll() is None
        os.write(leader, b"\x01x")
        assert running.end()[0] == 130
    finally:
        os.close(leader)
        os.close(follower)


def test_a_reader_that_goes_away_ends_the_run(guest: Guest) -> None:
    code = out_string(b"y\n" * 50)
    again = b"\xe9" + (-len(code) - 5).to_bytes(4, "little", signed=True)
    running = Running(*run_arguments(guest(code + again)))
    assert running.process.stdout is not None
    running.wait_for_output(running.process.stdout.fileno(), b"y\n")
    running.process.stdout.close()
    code = running.process.wait(DEADLINE)
    assert code == 141


def test_closed_standard_fds_are_not_taken_by_the_vms_own(guest: Guest) -> None:
    kernel = guest(out_string(b"into nothing\n") + out(board.GUEST_EXIT_PORT, 5) + HANG)
    words = command_line(*run_arguments(kernel))
    result = subprocess.run(
        ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words], timeout=DEADLINE, check=False
    )
    assert result.returncode == 5


def test_nothing_is_said_twice_or_lost_when_much_is_printed(hvkvm: Hvkvm, guest: Guest) -> None:
    text = bytes(65 + index % 26 for index in range(4000)) + b"\n"
    result = hvkvm(*run_arguments(guest(out_string(text) + out(board.GUEST_EXIT_PORT, 0) + HANG)))
    assert result.stdout == text.decode()
