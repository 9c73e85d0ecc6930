"""`hvkvm run -- command` on real KVM: streams, signals, a terminal, with guests that are a few bytes of code.

The guests take the place of a kernel and of an init that found no vsock: they print on the
serial ports as `abi.guest_command` says.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import shlex
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kernel_images import pvh
from running_vm import command_line
from tiny_guests import DEADLINE, SPIN, TRIPLE_FAULT, out

from hvkvm.abi import board
from hvkvm.boot import guest_exit

pytestmark = pytest.mark.kvm

CONSOLE, STREAMS, ERRORS, CONTROL = (port for port, _irq in board.COM_PORTS)
Start = Callable[..., "Running"]


def say(port: int, text: bytes) -> bytes:
    """Machine code that prints `text` on a serial port."""
    return b"\x66\xba" + port.to_bytes(2, "little") + b"".join(bytes([0xB0, byte, 0xEE]) for byte in text)


def copy_line(source: int, target: int) -> bytes:
    """Machine code that reads a serial port up to a newline and prints that on another."""
    return (
        b"\x66\xba" + (source + 5).to_bytes(2, "little") + b"\xec\xa8\x01\x74\xf7"  # until LSR says data
        + b"\x66\xba" + source.to_bytes(2, "little") + b"\xec"
        + b"\x66\xba" + target.to_bytes(2, "little") + b"\xee"
        + b"\x3c\x0a\x75\xe9"  # until it is a newline
    )  # fmt: skip


def end(status: int) -> bytes:
    return out(board.GUEST_EXIT_PORT, status) + SPIN


READY = say(CONTROL, b"ready\n")


class Running:
    """A started `hvkvm run`."""

    def __init__(self, words: list[str], **options: object) -> None:
        settings: dict[str, object] = {
            "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
            "start_new_session": True, "env": {**os.environ, "NO_COLOR": "1"},
        }  # fmt: skip
        self.process: subprocess.Popen[bytes] = subprocess.Popen(words, **settings | options)  # type: ignore[call-overload]

    def read_until(self, fd: int, text: bytes) -> bytes:
        seen = b""
        limit = time.monotonic() + DEADLINE
        while text not in seen:
            assert time.monotonic() < limit, seen
            assert select.select([fd], [], [], DEADLINE)[0], seen
            piece = os.read(fd, 4096)
            assert piece, seen
            seen += piece
        return seen

    def wait_for_output(self, text: bytes) -> bytes:
        assert self.process.stdout is not None
        return self.read_until(self.process.stdout.fileno(), text)

    def end(self) -> tuple[int, bytes, bytes]:
        output, errors = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, output or b"", errors or b""


@pytest.fixture
def words(tmp_path: Path) -> Callable[..., list[str]]:
    """words(code, *options): the command line that boots it to run a command."""

    def make(code: bytes, *options: object) -> list[str]:
        kernel, busybox = tmp_path / "kernel", tmp_path / "busybox"
        kernel.write_bytes(pvh(code, bits=32))
        busybox.write_bytes(guest_exit.program())
        common = ("--kernel", kernel, "--busybox", busybox, "--memory", "16M", "--hv", "none", "--quiet")
        return command_line("run", *common, *options, "--", "some", "command")

    return make


@pytest.fixture
def start(words: Callable[..., list[str]]) -> Iterator[Start]:
    started: list[Running] = []

    def run(code: bytes, *options: object, **process: object) -> Running:
        started.append(Running(words(code, *options), **process))
        return started[-1]

    yield run
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
            each.process.communicate()


NOISE = say(CONSOLE, b"kernel noise\r\n")


def test_output_and_errors_come_out_apart_and_exact(start: Start) -> None:
    data, errors = bytes(range(256)), b"\r\n\0error without an end"
    code = NOISE + READY + say(STREAMS, data) + say(ERRORS, errors) + NOISE + end(7)
    assert start(code).end() == (7, data, errors)


def test_a_shells_substitution_gets_the_bytes(words: Callable[..., list[str]]) -> None:
    line = shlex.join(words(NOISE + READY + say(STREAMS, b"6.1.0\n") + say(ERRORS, b"no") + end(0)))
    result = subprocess.run(
        ["sh", "-c", f"x=$({line} 2>/dev/null) && printf %s \"[$x]\""],
        stdin=subprocess.DEVNULL, capture_output=True, timeout=DEADLINE, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (0, b"[6.1.0]"), result


def test_the_console_is_shown_on_request(start: Start) -> None:
    code = NOISE + READY + say(STREAMS, b"output") + end(0)
    assert start(code, "--console").end() == (0, b"output", b"kernel noise\r\n")


def test_the_console_is_shown_when_the_guest_fails(start: Start) -> None:
    status, output, errors = start(NOISE + READY + say(STREAMS, b"half") + TRIPLE_FAULT).end()
    assert (status, output) == (254, b"half")
    assert errors.startswith(b"hvkvm: the guest's console, at its end:\n  | kernel noise\n"), errors
    assert b"hvkvm: triple fault: " in errors


def test_what_we_say_behind_a_commands_errors_is_a_line_of_its_own(start: Start) -> None:
    status, _output, errors = start(READY + say(ERRORS, b"no end") + end(3), "--json").end()
    assert status == 3
    assert errors.splitlines()[0] == b"no end"
    assert json.loads(errors.splitlines()[1])["status"] == 3


def test_a_timeout_shows_it_too(start: Start) -> None:
    status, _output, errors = start(NOISE + SPIN, "--timeout", "3").end()
    assert status == 124
    assert errors.count(b"| kernel noise") == 1


def test_input_comes_to_its_end(start: Start, tmp_path: Path) -> None:
    """The guest asks, gets a piece and then the end of it."""
    (tmp_path / "in").write_bytes(b"a line\n")
    ask = say(CONTROL, b"input\n") + copy_line(STREAMS, ERRORS)
    code = READY + ask + copy_line(STREAMS, STREAMS) + ask + end(0)
    with (tmp_path / "in").open("rb") as file:
        assert start(code, stdin=file).end() == (0, b"a line\n", b"7\n0\n")


@pytest.mark.parametrize("redirections", ["<&-", "<&- >&- 2>&-", "</dev/null"])
def test_a_command_that_does_not_read_is_not_disturbed(
    words: Callable[..., list[str]], redirections: str
) -> None:
    line = shlex.join(words(READY + say(STREAMS, b"x") + end(5)))
    result = subprocess.run(["sh", "-c", f"{line} {redirections}"], timeout=DEADLINE, check=False)
    assert result.returncode == 5


def test_input_that_never_ends_is_left_alone(start: Start) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"never read")
    assert start(READY + end(6), stdin=reading).end()[0] == 6
    assert os.read(reading, 100) == b"never read", "nobody had asked for it"
    os.close(reading)
    os.close(writing)


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_are_the_commands(start: Start, number: signal.Signals) -> None:
    code = READY + say(STREAMS, b"up\n") + copy_line(CONTROL, STREAMS) + end(5)
    running = start(code)
    running.wait_for_output(b"up\n")
    running.process.send_signal(number)
    assert running.end() == (5, f"signal {number.name[3:]}\n".encode(), b"")


@pytest.mark.parametrize("number", SIGNALS)
def test_before_the_command_runs_they_end_the_run(start: Start, number: signal.Signals) -> None:
    running = start(say(CONSOLE, b"booting\r\n") + SPIN, "--console")
    assert running.process.stderr is not None
    running.read_until(running.process.stderr.fileno(), b"booting")
    running.process.send_signal(number)
    status, _output, errors = running.end()
    assert (status, errors.strip()) == (128 + number, f"hvkvm: quit: {number.name}".encode())


def test_the_second_interrupt_ends_the_run(start: Start) -> None:
    answer = copy_line(CONTROL, STREAMS) + say(CONTROL, b"signaled\n")
    running = start(READY + say(STREAMS, b"up\n") + answer + SPIN)
    running.wait_for_output(b"up\n")
    running.process.send_signal(signal.SIGINT)
    running.wait_for_output(b"signal INT\n")
    running.process.send_signal(signal.SIGINT)
    assert running.end()[0] == 130


def test_a_guest_that_does_not_answer_a_signal_is_ended(start: Start) -> None:
    running = start(READY + say(STREAMS, b"up\n") + SPIN)
    running.wait_for_output(b"up\n")
    running.process.send_signal(signal.SIGTERM)
    status, _output, errors = running.end()
    assert (status, errors) == (143, b"hvkvm: quit: SIGTERM, which the guest did not pass on\n")


def test_a_guest_is_told_that_nobody_reads_any_more(start: Start) -> None:
    code = READY + say(STREAMS, b"up\n") + say(STREAMS, b"y" * 3) + copy_line(CONTROL, ERRORS) + end(3)
    reading, writing = os.pipe()
    running = start(code, stdout=writing)
    os.close(reading)
    os.close(writing)
    status, _output, errors = running.end()
    assert (status, errors) == (3, b"close out\n")


class Terminal:
    """A terminal of some size and `hvkvm run` on it."""

    def __init__(self, rows: int, columns: int) -> None:
        self.leader, self.follower = pty.openpty()
        self.resize(rows, columns)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.follower, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def close(self) -> None:
        os.close(self.leader)
        os.close(self.follower)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    made = Terminal(31, 101)
    yield made
    made.close()


def test_on_a_terminal_the_command_has_one_of_the_same_size(start: Start, terminal: Terminal) -> None:
    ask = say(CONTROL, b"size\n") + copy_line(CONTROL, STREAMS)
    code = NOISE + ask + READY + copy_line(CONTROL, STREAMS) + copy_line(STREAMS, STREAMS) + end(4)
    before = termios.tcgetattr(terminal.follower)
    running = start(code, stdin=terminal.follower, stdout=terminal.follower)
    assert running.read_until(terminal.leader, b"\n") == b"size 31 101\r\n"
    assert not termios.tcgetattr(terminal.follower)[3] & termios.ECHO
    terminal.resize(40, 90)
    running.process.send_signal(signal.SIGWINCH)
    assert running.read_until(terminal.leader, b"\n") == b"size 40 90\r\n"
    os.write(terminal.leader, b"keys\x04\n")
    assert running.read_until(terminal.leader, b"\n") == b"keys\x04\r\n"
    status, _output, errors = running.end()
    assert (status, errors) == (4, b"")
    assert termios.tcgetattr(terminal.follower) == before


@pytest.mark.parametrize(
    ("options", "output_is_terminal", "asked"),
    [((), False, False), (("-T",), True, False), (("-t",), False, True)],
    ids=["output elsewhere", "-T", "-t"],
)
def test_who_gets_a_terminal(
    start: Start, terminal: Terminal, options: tuple[str, ...], output_is_terminal: bool, asked: bool
) -> None:
    """A guest with streams gets no answer to its question for a size, one with a terminal does."""
    code = READY + say(CONTROL, b"size\n") + say(STREAMS, b"up\n")
    code += copy_line(CONTROL, STREAMS) + copy_line(STREAMS, STREAMS) + end(0)  # it never ends: no more comes
    reading, writing = os.pipe()
    output = terminal.follower if output_is_terminal else writing
    running = start(code, *options, stdin=terminal.follower, stdout=output)
    os.close(writing)
    fd = terminal.leader if output_is_terminal else reading
    running.read_until(fd, b"up")
    raw = not termios.tcgetattr(terminal.follower)[3] & termios.ICANON
    assert raw is asked
    running.process.kill()
    os.close(reading)


@pytest.mark.parametrize("flag", ["-t", "-T"])
def test_they_are_about_a_command(tmp_path: Path, flag: str) -> None:
    (tmp_path / "kernel").write_bytes(pvh())
    line = command_line("run", "--kernel", tmp_path / "kernel", flag)
    result = subprocess.run(
        line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert (result.returncode, result.stderr.startswith(f"hvkvm: {flag}: ")) == (2, True), result
