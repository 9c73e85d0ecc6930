"""A guest that runs a command, saved and gone on with by other runs: together they show what one run would.

And one that is reset: a copy of a warm guest boots, and runs its command again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from guest_artifacts import artifact
from running_vm import SECONDS, command_line, ctl, environment, wait_until_listening

from hvkvm.machine.config import MachineConfig
from hvkvm.machine.warm_kept import kept

pytestmark = [pytest.mark.hyperv, pytest.mark.timeout(900)]

SOAK = bool(os.environ.get("HVKVM_SOAK"))
LINES = 200
COUNT = f"i=0; while [ $i -lt {LINES} ]; do i=$((i + 1)); echo line $i; usleep 5000; done"
MANY = 20_000


def warm_file(way: str) -> Path:
    """A guest that takes its streams over vsock, with the SynIC `way`, or over serial ports."""
    config = MachineConfig(
        kernel=artifact("HVKVM_GUEST_KERNEL"),
        busybox=artifact("HVKVM_GUEST_BUSYBOX"),
        append="quiet",
        synic="user" if way == "user" else "kernel",
        timeout=SECONDS,
    )
    if way != "serial":
        config = config._replace(vmbus="on", modules_dir=artifact("HVKVM_GUEST_MODULES"))
    return kept(config)


class Run:
    """One `hvkvm run`, and what it has shown."""

    def __init__(self, runtime: Path, *arguments: object) -> None:
        self.runtime = runtime
        self.process = subprocess.Popen(
            command_line("run", "--timeout", SECONDS, "--quiet", *arguments),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(runtime),
        )  # fmt: skip
        self.out, self.err = bytearray(), bytearray()
        self._came = threading.Condition()
        streams: list[tuple[Any, bytearray]] = [
            (self.process.stdout, self.out),
            (self.process.stderr, self.err),
        ]
        self._threads = [threading.Thread(target=self._read, args=one, daemon=True) for one in streams]
        for thread in self._threads:
            thread.start()

    def _read(self, stream: Any, into: bytearray) -> None:
        while data := stream.read1():
            with self._came:
                into += data
                self._came.notify_all()

    def wait_for(self, words: bytes, count: int = 1, behind: bytes = b"") -> None:
        """Until standard output has `words` so often, which may have begun at the end of `behind`."""
        front = behind[-len(words) :]
        with self._came:
            ok = self._came.wait_for(lambda: (front + self.out).count(words) >= count, timeout=SECONDS)
        assert ok, (self.out[-500:], self.err[-500:])

    def type(self, text: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text)
        self.process.stdin.flush()

    def save(self, file: Path) -> None:
        """Have it saved, which ends it; as soon as it listens."""
        wait_until_listening(self.process, self.runtime, lambda: self.err[-500:])
        while (
            told := ctl(self.runtime, "save", file, "--end")
        ).returncode == 2 and self.process.poll() is None:
            assert "no VM is running" in told.stderr, told
        assert told.returncode == 0, told
        assert self.finish() == 0

    def finish(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.close()
        status = self.process.wait(SECONDS)
        for thread in self._threads:
            thread.join(SECONDS)
        return status


@contextmanager
def running(runtime: Path, *arguments: object) -> Iterator[Run]:
    run = Run(runtime, *arguments)
    try:
        yield run
    finally:
        run.process.kill()
        run.process.wait()


@pytest.mark.parametrize("way", ["kernel", "serial", *(["user"] if SOAK else [])])
def test_the_runs_of_a_saved_command_show_together_what_one_run_would(way: str, tmp_path: Path) -> None:
    """Little at a time, then much at once, then input; standard error beside it; the command's own status."""
    many = MANY if way != "serial" else 500
    script = f"{COUNT}; seq {many}; while read -r line; do echo got $line >&2; done; echo end; exit 7"
    file = tmp_path / "state"
    wanted = "".join(f"line {n}\n" for n in range(1, LINES + 1)) + "".join(
        f"{n}\n" for n in range(1, many + 1)
    )
    out, err = bytearray(), bytearray()
    source: tuple[object, ...] = ("--from", warm_file(way))
    for words in (b"line 20\n", f"line {LINES // 2}\n".encode(), b"\n200\n"):
        with running(tmp_path, *source, *(("--", "sh", "-c", script) if not out else ())) as run:
            if words not in out:  # what a save takes long to say, the guest may have said before it
                run.wait_for(words, behind=bytes(out))
            run.save(file)
            out += run.out
            err += run.err.removesuffix(f"hvkvm: quit: saved to {file}\n".encode())
        source = ("--restore", file)
    with running(tmp_path, *source) as run:
        run.type(b"more\nand more\n")
        assert run.finish() == 7, run.err[-500:]
        out += run.out
        err += run.err
    text = out.decode()
    assert text.startswith(wanted), first_difference(text, wanted)
    assert text.removeprefix(wanted) == "end\n"
    assert err.decode() == "got more\ngot and more\n"


def first_difference(text: str, wanted: str) -> str:
    """Where they part, for people."""
    at = next((n for n, (a, b) in enumerate(zip(text, wanted, strict=False)) if a != b), len(text))
    return f"at {at} of {len(wanted)}: {text[at - 100 : at + 100]!r}"


def test_signals_reach_a_command_that_went_on_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "state"
    script = "trap 'echo caught; exit 9' TERM; echo up; while :; do usleep 50000; done"
    with running(tmp_path, "--from", warm_file("kernel"), "--", "sh", "-c", script) as run:
        run.wait_for(b"up\n")
        run.save(file)
    for _ in range(2):  # as often as one likes
        with running(tmp_path, "--restore", file) as run:
            wait_until_listening(run.process, tmp_path, lambda run=run: run.err)
            while ctl(tmp_path, "info").returncode != 0:
                assert run.process.poll() is None, run.err
            run.process.send_signal(signal.SIGTERM)
            assert run.finish() == 9, run.err
            assert run.out == b"caught\n"


@pytest.mark.parametrize("way", ["kernel", *(["serial"] if SOAK else [])])
def test_a_copy_of_a_warm_guest_that_is_reset_boots_and_runs_its_command_again(
    way: str, tmp_path: Path
) -> None:
    (tmp_path / "tool").write_text("#!/bin/sh\necho up $(cat /proc/sys/kernel/random/boot_id)\n")
    (tmp_path / "tool").chmod(0o755)
    script = "/tool; read -r order; [ $order = reset ] && reboot -f; exit 3"
    tool = ("--file", f"/tool={tmp_path / 'tool'}")
    with running(tmp_path, "--from", warm_file(way), *tool, "--", "sh", "-c", script) as run:
        for resets in (1, 2):
            run.wait_for(b"\n", resets)
            run.type(b"reset\n")
        run.wait_for(b"\n", 3)
        run.type(b"end\n")
        assert run.finish() == 3, run.err
        boots = bytes(run.out).splitlines()
        assert len({*boots}) == 3, boots
        assert all(boot.startswith(b"up ") for boot in boots)
    with running(tmp_path, "--from", warm_file(way), "--no-reboot", "--", "reboot", "-f") as run:
        assert run.finish() == 0, run.err
