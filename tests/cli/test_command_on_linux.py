"""`hvkvm run -- command` with a stock Linux: over vsock on both SynICs, and over serial ports."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import termios
import zlib
from pathlib import Path

import pytest
from guest_artifacts import artifact
from running_vm import SECONDS, command_line, read_until

from hvkvm.machine.config import MachineConfig
from hvkvm.machine.warm_kept import kept

pytestmark = [pytest.mark.hyperv, pytest.mark.timeout(500)]

VSOCK = {"kernel": ("--synic", "kernel"), "user": ("--synic", "user")}
WAYS = ("kernel", "user", "serial")
SIZES = {"kernel": 3_000_001, "user": 1_500_001, "serial": 3_001}


def words(way: str, script: str, *options: object) -> list[str]:
    """The command line; `way`: the SynIC under vsock, or "serial" for a guest without its modules."""
    common = ("--kernel", artifact("HVKVM_GUEST_KERNEL"), "--busybox", artifact("HVKVM_GUEST_BUSYBOX"))
    own = ("--vmbus", "on", *VSOCK.get(way, ()))
    if way in VSOCK:
        own += ("--modules-dir", artifact("HVKVM_GUEST_MODULES"))
    limit = ("--timeout", SECONDS, "--quiet", "--append", "quiet")
    return command_line("run", *common, *own, *limit, *options, "--", "sh", "-c", script)


def warm_words(way: str, script: str) -> list[str]:
    """As `words`, in a copy of a guest that was booted once: for what has nothing to do with the boot."""
    config = MachineConfig(
        kernel=artifact("HVKVM_GUEST_KERNEL"),
        busybox=artifact("HVKVM_GUEST_BUSYBOX"),
        append="quiet",
        synic="kernel",
        timeout=SECONDS,
    )
    if way in VSOCK:
        config = config._replace(vmbus="on", modules_dir=artifact("HVKVM_GUEST_MODULES"))
    own = ("--from", kept(config), "--timeout", SECONDS, "--quiet")
    return command_line("run", *own, "--", "sh", "-c", script)


@pytest.mark.parametrize("way", WAYS)
def test_streams_are_byte_exact_apart_and_end(way: str, tmp_path: Path) -> None:
    """The parent of the command says which way its streams take; /dev/stderr can be opened as ever."""
    data = os.urandom(SIZES[way] // 2) * 2
    (tmp_path / "in").write_bytes(data)
    script = (
        "tr '\\0' ' ' </proc/$PPID/cmdline >&2; cat; echo again >/dev/stderr; sleep 1000 & "
        "printf '\\000\\r\\n\\377' >&2; exit 9"
    )
    with (tmp_path / "in").open("rb") as file:
        result = subprocess.run(
            words(way, script), stdin=file, capture_output=True, timeout=SECONDS, check=False
        )
    route = "serial" if way == "serial" else "vsock"
    assert result.stderr == f"/bin/sh /session {route} again\n".encode() + b"\0\r\n\xff"
    assert (len(result.stdout), zlib.crc32(result.stdout)) == (len(data), zlib.crc32(data))
    assert result.returncode == 9


@pytest.mark.parametrize("way", ["kernel", "serial"])
def test_signals_reach_the_command_and_its_children(way: str) -> None:
    script = "trap 'echo caught; kill -9 $$' TERM; echo up; while :; do sleep 1000; done"
    process = subprocess.Popen(warm_words(way, script), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGTERM)
    output, _errors = process.communicate(timeout=SECONDS)
    assert (process.returncode, output) == (137, b"caught\n")


def test_on_a_terminal_the_command_has_one() -> None:
    leader, follower = pty.openpty()
    resize(follower, 31, 101)
    before = termios.tcgetattr(follower)
    script = "tty; echo $TERM; trap 'stty size' WINCH; stty size; while :; do sleep 1; done"
    process = subprocess.Popen(
        warm_words("serial", script), stdin=follower, stdout=follower, env={**os.environ, "TERM": "screen"}
    )
    try:
        seen = read_until(leader, lambda text: "31 101\r" in text)
        assert seen.split() == ["/dev/ttyS1", "screen", "31", "101"]
        resize(follower, 40, 90)
        process.send_signal(signal.SIGWINCH)
        read_until(leader, lambda text: "40 90\r" in text)
        os.write(leader, b"\x03")
        assert process.wait(SECONDS) == 130
        assert termios.tcgetattr(follower) == before
    finally:
        process.kill()
        process.wait()
        os.close(leader)
        os.close(follower)


def resize(fd: int, rows: int, columns: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def test_a_reader_that_goes_away_ends_the_writer_as_in_a_pipe() -> None:
    script = "yes; echo status $? >&2; exit 4"
    process = subprocess.Popen(warm_words("kernel", script), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(10) == b"y\ny\ny\ny\ny\n"
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b"status 141\n"
    assert process.wait(SECONDS) == 4
