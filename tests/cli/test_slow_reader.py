"""`hvkvm run` whose standard output is read slowly, or not at all, after the guest has ended."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from running_vm import command_line
from tiny_guests import DEADLINE, HANG, out, out_string, run_arguments

from hvkvm.abi import board
from hvkvm.backends.console import DRAIN_SECONDS

pytestmark = pytest.mark.kvm

Guest = Callable[[bytes], Path]


class SlowReader:
    """`hvkvm run` with a small pipe for its output, and a guest that says more than fits and exits with 3."""

    TEXT = bytes(65 + index % 26 for index in range(20000)) + b"\n"

    def __init__(self, guest: Guest, *options: object) -> None:
        kernel = guest(out_string(self.TEXT) + out(board.GUEST_EXIT_PORT, 3) + HANG)
        self.fd, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        words = command_line(*run_arguments(kernel, *options))
        self.process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=writer, stderr=subprocess.PIPE
        )
        os.close(writer)

    def wait_until_it_waits(self) -> None:
        """Until the machine is gone and only the output keeps the process."""
        fds = Path(f"/proc/{self.process.pid}/fd")
        # That there was a machine is told by what it printed: a quick one is gone before anybody looks.
        assert select.select([self.fd], [], [], DEADLINE)[0]
        end = time.monotonic() + DEADLINE
        while any("kvm" in target for target in _targets(fds)):
            assert time.monotonic() < end
            time.sleep(0.05)

    def read(self) -> bytes:
        with os.fdopen(self.fd, "rb") as reader:
            return reader.read()

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, errors.decode()


def _targets(fds: Path) -> list[str]:
    found = []
    for fd in fds.iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            found.append(os.readlink(fd))
    return found


def test_a_reader_who_takes_his_time_gets_everything(guest: Guest) -> None:
    """As from any program: a pager may be at its first page when the guest has ended."""
    slow = SlowReader(guest)
    slow.wait_until_it_waits()
    time.sleep(DRAIN_SECONDS + 1)
    assert slow.process.poll() is None
    assert slow.read() == SlowReader.TEXT
    assert slow.end() == (3, "")


@pytest.mark.parametrize(
    ("options", "number"), [((), signal.SIGINT), (("--timeout", "10"), None)], ids=["ctrl-c", "--timeout"]
)
def test_what_is_not_read_in_time_is_told(
    guest: Guest, options: tuple[str, ...], number: signal.Signals | None
) -> None:
    slow = SlowReader(guest, *options)
    if number is not None:
        slow.wait_until_it_waits()
        slow.process.send_signal(signal.SIGQUIT)
        time.sleep(0.5)
        assert slow.process.poll() is None
        slow.process.send_signal(number)
    status, errors = slow.end()
    lost = len(SlowReader.TEXT) - len(slow.read())
    assert lost > 0
    told = f"hvkvm: {lost} bytes of the guest's output are lost: standard output was not read in time\n"
    assert (status, errors) == (3, told)
