"""`hvkvm warm` and `hvkvm run --from` with a stock Linux: a copy does what a guest that was booted does."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, time

import pytest
from guest_artifacts import artifact
from running_vm import SECONDS, command_line, ctl, environment, read_until

import hvkvm
from hvkvm.machine.outcome import Ending

pytestmark = [pytest.mark.hyperv, pytest.mark.timeout(900)]


def settings(*, vmbus: bool) -> list[object]:
    common = ["--kernel", artifact("HVKVM_GUEST_KERNEL"), "--busybox", artifact("HVKVM_GUEST_BUSYBOX")]
    bus = ["--vmbus", "on", "--modules-dir", artifact("HVKVM_GUEST_MODULES"), "--module", "hv_utils"]
    return [*common, *(bus if vmbus else ())]


def make(file: Path, *options: object) -> None:
    line = command_line("warm", *options, "--append", "quiet", "--timeout", SECONDS, "-o", file)
    done = subprocess.run(line, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done
    assert f"{file}: a warm guest, " in done.stderr


class WarmFiles:
    """A guest with vsock for its streams, and one with serial ports alone, and nothing to see in /dev/mem.

    Each is made when it is asked for: a worker of the suite has not all tests of this module.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, way: str) -> Path:
        file = self._folder / way
        if not file.exists():
            make(file, *settings(vmbus=way == "vsock"), *(self._blind() if way == "serial" else ()))
        return file

    def _blind(self) -> tuple[str, str]:
        blind = self._folder / "blind"
        blind.write_text("#!/bin/sh\nexit 1\n")
        blind.chmod(0o755)
        return "--file", f"/bin/guest-orders={blind}"


@pytest.fixture(scope="session")
def warm_files(tmp_path_factory: pytest.TempPathFactory) -> WarmFiles:
    """Of the session, since the suite runs the longest tests first, so those of a module are not in a row."""
    return WarmFiles(tmp_path_factory.mktemp("warm"))


def words(file: Path, script: str, *options: object) -> list[str]:
    own = ("--from", file, "--quiet", "--timeout", SECONDS, *options)
    return command_line("run", *own, "--", "sh", "-c", script)


@contextmanager
def running(line: list[str], runtime: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(runtime)
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("way", ["vsock", "serial"])
def test_a_copy_runs_a_command_with_files_as_a_booted_guest_does(
    way: str, warm_files: WarmFiles, tmp_path: Path
) -> None:
    big = way == "vsock"
    data, handed = os.urandom(500_001 if big else 3_001), os.urandom(300_000 if big else 3_000)
    (tmp_path / "in").write_bytes(data)
    (tmp_path / "tool").write_bytes(handed)
    (tmp_path / "tool").chmod(0o750)
    script = (
        "tr '\\0' ' ' </proc/$PPID/cmdline >&2; cat; stat -c %a /opt/it/tool >&2; cat /opt/it/tool >&2;"
        " ls /proc/self/fd | tr '\\n' ' ' >&2; exit 9"
    )
    with (tmp_path / "in").open("rb") as file:
        line = words(warm_files[way], script, "--file", f"/opt/it/tool={tmp_path / 'tool'}")
        result = subprocess.run(line, stdin=file, capture_output=True, timeout=SECONDS, check=False)
    assert result.stderr == f"/bin/sh /session {way} 750\n".encode() + handed + b"0 1 2 3 "
    assert (len(result.stdout), zlib.crc32(result.stdout)) == (len(data), zlib.crc32(data))
    assert result.returncode == 9


def test_copies_run_side_by_side_and_nothing_of_them_is_the_same(
    warm_files: WarmFiles, tmp_path: Path
) -> None:
    file = warm_files["vsock"]
    before = file.stat()
    random = "/proc/sys/kernel/random"
    script = f"head -c 16 /dev/urandom | od -An -tx8; cat {random}/boot_id {random}/uuid; read line"
    line = words(file, script)
    with running(line, tmp_path) as one, running(line, tmp_path) as two:
        seen = []
        for process in (one, two):
            assert process.stdout is not None
            seen.append({word for _ in range(3) for word in process.stdout.readline().split()})
            assert len(seen[-1]) == 4
        assert not seen[0] & seen[1], "two copies have random numbers of their own"
        listed = json.loads(ctl(tmp_path, "--json", "list").stdout)
        assert {vm["pid"] for vm in listed} == {one.pid, two.pid}
        assert len({vm["name"] for vm in listed}) == 2
        for process in (one, two):
            process.communicate(b"\n", timeout=SECONDS)
            assert process.returncode == 0
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("way", ["vsock", "serial"])
def test_the_clock_is_right_within_a_second(way: str, warm_files: WarmFiles, tmp_path: Path) -> None:
    with running(words(warm_files[way], "while read -r ask; do date +%s; done"), tmp_path) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(3):
            before = time()
            process.stdin.write(b"\n")
            process.stdin.flush()
            told = int(process.stdout.readline())
            assert before - 2 <= told <= time() + 1, "whole seconds, cut off, and one that it may be wrong"
        process.communicate(timeout=SECONDS)
        assert process.returncode == 0


def test_signals_reach_the_command_of_a_copy(warm_files: WarmFiles, tmp_path: Path) -> None:
    script = "trap 'echo caught; kill -9 $$' TERM; echo up; while :; do sleep 1000; done"
    with running(words(warm_files["vsock"], script), tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGTERM)
        output, _errors = process.communicate(timeout=SECONDS)
        assert (process.returncode, output) == (137, b"caught\n")


def test_a_copy_has_a_terminal_if_asked(warm_files: WarmFiles) -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        words(warm_files["serial"], "tty; echo $TERM; read line; echo got $line; sleep 1000", "-t"),
        stdin=follower, stdout=follower, env={**os.environ, "TERM": "screen"},
    )  # fmt: skip
    os.close(follower)
    try:
        assert "/dev/ttyS1" in read_until(leader, lambda text: "screen\r" in text)
        os.write(leader, b"that\n")
        read_until(leader, lambda text: "got that\r" in text)
        os.write(leader, b"\x03")
        assert process.wait(SECONDS) == 130
    finally:
        process.kill()
        process.wait()
        os.close(leader)


def test_a_driver_of_the_generation_id_hears_of_each_copy(tmp_path: Path) -> None:
    """Debian's cloud kernel has it since 6.12. A copy of a copy has another id again."""
    file, again = tmp_path / "warm", tmp_path / "again"
    config = hvkvm.MachineConfig(
        kernel=artifact("HVKVM_NEWER_KERNEL"),
        busybox=artifact("HVKVM_GUEST_BUSYBOX"),
        append="quiet",
        synic="kernel",
        timeout=SECONDS,
    )
    hvkvm.warm(config, file)
    told = "crng reseeded due to virtual machine fork"
    script = (
        f"count() {{ until [ $(dmesg | grep -c '{told}') -ge $1 ]; do sleep 0.1; done; echo heard $1; }};"
        " count 1; count 2; dmesg | grep -E 'WARNING: CPU|ACPI.*[Ee]rror'; exit 4"
    )
    output = bytearray()
    copy = hvkvm.MachineConfig(kernel=file, warm=file, command=("sh", "-c", script), timeout=SECONDS)
    with hvkvm.Machine(copy) as machine:
        machine.board.attach_sink(output.extend)
        machine.start()
        end = monotonic() + SECONDS
        while b"heard 1" not in output:
            assert machine.wait(0.1) is None, output
            assert monotonic() < end, output
        machine.save(again, end=True)
    with hvkvm.Machine(hvkvm.MachineConfig(kernel=again, restore=again, timeout=SECONDS)) as machine:
        machine.board.attach_sink(output.extend)
        outcome = machine.run()
    assert (outcome.ending, outcome.status) == (Ending.COMMAND_EXITED, 4), output
    assert b"heard 2" in output
    assert b"WARNING" not in output
    assert b"rror" not in output, output


@pytest.mark.parametrize("cpus", [1, 2])
def test_a_program_makes_and_copies_them(cpus: int, tmp_path: Path) -> None:
    file = tmp_path / "warm"
    config = hvkvm.MachineConfig(
        kernel=artifact("HVKVM_GUEST_KERNEL"),
        busybox=artifact("HVKVM_GUEST_BUSYBOX"),
        append="quiet",
        cpus=cpus,
        synic="user",
        memory=256 << 20,
        timeout=SECONDS,
    )
    heard = bytearray()
    assert hvkvm.warm(config, file, on_console=heard.extend) == file.stat().st_size
    assert b"hvkvm: init " in heard
    for number in (3, 4):
        copy = hvkvm.MachineConfig(
            kernel=file, warm=file, command=("sh", "-c", f"nproc; exit {number}"), timeout=SECONDS
        )
        with hvkvm.Machine(copy) as machine:
            said = bytearray()
            machine.board.attach_sink(said.extend)
            outcome = machine.run()
        assert (outcome.ending, outcome.status) == (Ending.COMMAND_EXITED, number), said
        assert bytes(said).split() == [str(cpus).encode()]
