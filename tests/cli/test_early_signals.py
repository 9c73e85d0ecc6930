"""A signal before the guest runs ends the building of the machine: nothing waits, stays, or has been run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import kernel_images
import pytest
from running_vm import command_line, environment
from tiny_guests import DEADLINE, HANG, out_string, run_arguments

from hvkvm.cli.signals import EndedEarly, Signals
from hvkvm.kvm.irqfd import EventFd

Guest = Callable[[bytes], Path]

FAR = 60.0
"""Seconds: nobody waits that long unless a signal is lost."""


class Built:
    """Stands for a Machine: `make` is its making, `parts` what it has near its end, `undo` its unwinding."""

    def __init__(self, make: Callable[[Any], object], undo: Callable[[], object] = lambda: None) -> None:
        try:
            make(self)
        finally:
            undo()


def taken(*numbers: signal.Signals) -> Signals:
    return Signals(numbers, builds=Built)  # type: ignore[arg-type]


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def test_what_blocks_is_ended_and_a_second_one_breaks_into_nothing() -> None:
    undone: list[int] = []

    def undo() -> None:
        send(signal.SIGUSR2)
        sleep(0.01)  # a handler would have run by now
        undone.append(1)

    begun = monotonic()
    with taken(signal.SIGUSR1, signal.SIGUSR2) as signals, EventFd() as never:
        pid = subprocess.Popen(["/bin/sh", "-c", f"sleep 0.2; kill -USR1 {os.getpid()}"])
        with pytest.raises(EndedEarly) as ended:
            Built(lambda _: sleep(FAR), undo)
        pid.wait()
        assert (ended.value.number, str(ended.value), undone) == (signal.SIGUSR1, "SIGUSR1", [1])
        assert [signals.wait(never.fd, 0) for _ in range(2)] == [signal.SIGUSR1, signal.SIGUSR2]
    assert monotonic() - begun < FAR


def test_one_that_python_drops_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes in a `__del__`, say, which lets nothing out: the next one ends the building all the same."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)

    class Dropping:
        def __del__(self) -> None:
            send(signal.SIGUSR1)

    def make(_: Any) -> None:
        Dropping()
        send(signal.SIGUSR2)

    with taken(signal.SIGUSR1, signal.SIGUSR2):
        with pytest.raises(EndedEarly) as ended:
            Built(make)
        assert ended.value.number == signal.SIGUSR2


def test_one_outside_of_the_building_or_at_its_end_is_noted() -> None:
    """Once it has its parts it moves what would unwind them, and that must not be cut in two."""

    def make(built: Any) -> None:
        built.parts = "all"
        send(signal.SIGUSR1)

    with taken(signal.SIGUSR1) as signals, EventFd() as never:
        signals.end_early()
        Built(make)
        with pytest.raises(EndedEarly):
            signals.end_early()
        assert signals.wait(never.fd, 0) == signal.SIGUSR1
        signals.end_early()


def test_those_that_end_nothing_stay_for_the_run() -> None:
    with taken(signal.SIGQUIT, signal.SIGWINCH) as signals, EventFd() as never:
        Built(lambda _: (send(signal.SIGQUIT), send(signal.SIGWINCH)))
        signals.end_early()
        assert [signals.wait(never.fd, 0) for _ in range(2)] == [signal.SIGQUIT, signal.SIGWINCH]


# With the command itself, on a real KVM.

BUS = ("--vmbus", "on", "--hv", "host-model", "--synic", "user")
ENDS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@contextmanager
def silent_server(path: Path) -> Iterator[Callable[[], object]]:
    """A server that takes connections and says nothing; wait for one."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        server.settimeout(DEADLINE)
        kept = []
        yield lambda: kept.append(server.accept())
        for client, _ in kept:
            client.close()


def ended_by(number: signal.Signals, blocks: Callable[[], object], line: list[str], folder: Path) -> Any:
    """Status, output and errors of a command that is sent the signal once `blocks` has returned."""
    process = subprocess.Popen(
        line,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**environment(folder), "PATH": f"{folder}:{os.environ['PATH']}"}, start_new_session=True,
    )  # fmt: skip
    try:
        blocks()
        process.send_signal(number)
        out, err = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
        process.wait()
    return process.returncode, out, err


@pytest.mark.kvm
@pytest.mark.parametrize(("number", "status"), ENDS)
def test_a_server_that_does_not_answer_is_not_waited_for(
    tmp_path: Path, guest: Guest, number: signal.Signals, status: int
) -> None:
    """The signal was forgotten: the run ended with 2, since nobody had answered in 10 s."""
    recording = tmp_path / "recording"
    recording.write_bytes(b"kept")
    with silent_server(tmp_path / "sock") as blocks:
        disk = (*BUS, "--disk", f"nbd:unix:{tmp_path}/sock")
        words = run_arguments(guest(out_string(b"ran") + HANG), "--record", recording, *disk)
        ended = ended_by(number, blocks, command_line(*words), tmp_path)
    assert ended == (status, "", f"hvkvm: quit: {number.name}\n")
    assert recording.read_bytes() == b"kept"
    assert not list(tmp_path.glob("hvkvm/*.sock"))


@pytest.mark.kvm
def test_the_same_of_a_warm_guest(tmp_path: Path) -> None:
    kernel, file = tmp_path / "kernel", tmp_path / "file"
    kernel.write_bytes(kernel_images.bzimage(bytes(kernel_images.ENTRY_64) + HANG))
    with silent_server(tmp_path / "sock") as blocks:
        disk = (*BUS, "--disk", f"nbd:unix:{tmp_path}/sock")
        line = command_line("warm", "--kernel", kernel, "--memory", "64M", *disk, "-o", file)
        ended = ended_by(signal.SIGTERM, blocks, line, tmp_path)
    assert ended == (143, "", "hvkvm: not warm: quit: SIGTERM\n")
    assert not file.exists()


@pytest.mark.kvm
def test_a_passt_that_does_not_answer_goes_too(tmp_path: Path, guest: Guest) -> None:
    passt, pid = tmp_path / "passt", tmp_path / "pid"
    passt.write_text(
        f"""#!/bin/sh
if [ "$1" = --help ]; then echo --foreground --fd --stderr; exit; fi
echo $$ > {pid}.new
mv {pid}.new {pid}
exec sleep 100
"""
    )
    passt.chmod(0o755)

    def blocks() -> None:
        end = monotonic() + DEADLINE
        while not pid.exists():
            assert monotonic() < end
            sleep(0.02)

    words = run_arguments(guest(HANG), *BUS, "--net", "user")
    ended = ended_by(signal.SIGINT, blocks, command_line(*words), tmp_path)
    assert ended == (130, "", "hvkvm: quit: SIGINT\n")
    assert not Path("/proc", pid.read_text().strip()).exists()


@pytest.mark.kvm
@pytest.mark.parametrize("more", [(), ("--json",)])
def test_one_that_comes_between_building_and_starting_starts_nothing(
    tmp_path: Path, guest: Guest, more: tuple[str, ...]
) -> None:
    """The guest ran for a moment, and its recordings took the place of those of the last run."""
    recording = tmp_path / "recording"
    recording.write_bytes(b"kept")
    words = run_arguments(guest(out_string(b"ran") + HANG), *BUS, "--record", recording, *more)
    code = f"""
import os, signal, sys
from hvkvm import cli
from hvkvm.cli import front
make = front.front_for
def made(*words):
    os.kill(os.getpid(), signal.SIGTERM)
    return make(*words)
front.front_for = made
sys.exit(cli.main({list(map(str, words))!r}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE, check=False,
        env=environment(tmp_path),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (143, "")
    said = done.stderr.splitlines()[-1]
    assert '"status": 143, "detail": "SIGTERM"' in said if more else said == "hvkvm: quit: SIGTERM"
    assert recording.read_bytes() == b"kept"
    assert not list(tmp_path.glob("hvkvm/*.sock"))
