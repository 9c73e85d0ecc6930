"""`hvkvm run` under a shell with job control: it has the terminal while, and only while, it is in front."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from running_vm import command_line
from tiny_guests import DEADLINE, out_string, run_arguments

pytestmark = pytest.mark.kvm

Guest = Callable[[bytes], Path]

# Answers each key in the other case: what a terminal echoes by itself is none of these.
ECHO = bytes.fromhex("66bafd03 ec a801 74f7 66baf803 ec 3420 ee ebed")


class Shell:
    """An interactive bash on a terminal of its own."""

    def __init__(self) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            environment = {**os.environ, "PS1": "ready> ", "HISTFILE": ""}
            os.execvpe("bash", ["bash", "--norc", "--noprofile", "--noediting", "-i"], environment)
        self.seen = ""
        self._at = 0
        self.expect(r"ready> $")

    def send(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def expect(self, pattern: str) -> re.Match[str]:
        """Wait until `pattern` stands behind what was expected last."""
        end = time.monotonic() + DEADLINE
        while (found := re.compile(pattern).search(self.seen, self._at)) is None:
            assert time.monotonic() < end, (pattern, self.seen[self._at :], self.seen)
            if select.select([self.fd], [], [], 0.2)[0]:
                self.seen += os.read(self.fd, 4096).decode(errors="replace")
        self._at = found.end()
        return found

    def run(self, command: str, pattern: str) -> re.Match[str]:
        """Type a command; the terminal's echo of it is passed over."""
        self.send(command + "\n")
        self.expect(re.escape(command) + r"\r\n")
        return self.expect(pattern)

    @property
    def raw(self) -> bool:
        return not termios.tcgetattr(self.fd)[3] & (termios.ISIG | termios.ICANON | termios.ECHO)

    def wait_until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < end, self.seen
            time.sleep(0.02)

    def close(self) -> None:
        os.close(self.fd)  # its jobs hear SIGHUP
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@pytest.fixture
def shell() -> Iterator[Shell]:
    made = Shell()
    yield made
    made.close()


def typed(shell: Shell, keys: str) -> None:
    """The guest has the keys, and hvkvm the terminal."""
    shell.wait_until(lambda: shell.raw)
    shell.send(keys)
    shell.expect(keys.swapcase())


def at_prompt(shell: Shell) -> None:
    """The shell has the terminal and its modes."""
    shell.run("echo $((40 + 2))", r"42\r\n")
    assert not shell.raw


def command(guest: Guest) -> str:
    words = command_line(*run_arguments(guest(out_string(b"guest up\n") + ECHO), "--quiet"))
    return " ".join(words)


def test_a_job_from_the_background_takes_the_terminal_when_it_comes_to_the_front(
    shell: Shell, guest: Guest
) -> None:
    pid = int(shell.run(f"{command(guest)} &", r"\[1\] (\d+)\r\n")[1])
    shell.expect("guest up")
    at_prompt(shell)
    shell.run("fg", r"hvkvm")
    typed(shell, "abc")

    # Ctrl-Z is the guest's key, so the signal comes by kill: the terminal is given back first.
    os.kill(pid, signal.SIGTSTP)
    shell.expect("Stopped")
    at_prompt(shell)
    shell.run("fg", r"hvkvm")
    typed(shell, "def")

    # No process hears SIGSTOP; what it continues in is the background.
    os.kill(pid, signal.SIGSTOP)
    shell.expect("Stopped")
    shell.run("stty sane; bg", r"hvkvm")
    at_prompt(shell)
    shell.run("fg", r"hvkvm")
    typed(shell, "ghi")

    os.kill(pid, signal.SIGTSTP)
    shell.expect("Stopped")
    shell.run("bg", r"hvkvm")
    at_prompt(shell)
    os.kill(pid, signal.SIGCONT)
    at_prompt(shell)
    shell.run("fg", r"hvkvm")
    typed(shell, "jkl")
    shell.send("\x1a")
    shell.expect(":")
    shell.send("\x01x")
    shell.expect("ready> ")
    shell.run("echo status $?", r"status 130\r\n")
    at_prompt(shell)


def test_a_job_that_ends_in_the_background_leaves_the_terminal_alone(shell: Shell, guest: Guest) -> None:
    pid = int(shell.run(f"{command(guest)} &", r"\[1\] (\d+)\r\n")[1])
    shell.expect("guest up")
    shell.run("stty -echo", "ready> ")
    os.kill(pid, signal.SIGTERM)
    shell.wait_until(lambda: _ended(pid))
    assert not termios.tcgetattr(shell.fd)[3] & termios.ECHO


def _ended(pid: int) -> bool:
    """Whether it has; the shell may bury it at any moment, between two looks or in the middle of one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_stop_where_no_shell_would_continue_it_is_nothing(guest: Guest) -> None:
    """The kernel ignores SIGTSTP for a process group that nobody watches; so must the handler's stop be."""
    pid, fd = pty.fork()
    if pid == 0:
        os.execv(
            command_line()[0], command_line(*run_arguments(guest(out_string(b"up\n") + ECHO), "--quiet"))
        )
    try:
        seen = b""
        while b"up" not in seen:
            seen += os.read(fd, 4096)
        for key in (b"a", b"b", b"c"):
            os.kill(pid, signal.SIGTSTP)
            os.write(fd, key)
            while key.upper() not in seen:
                assert select.select([fd], [], [], DEADLINE)[0], seen
                seen += os.read(fd, 4096)
        os.write(fd, b"\x01x")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    finally:
        os.close(fd)
