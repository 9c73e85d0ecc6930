"""What a run says on standard error: limited, held up by no reader, and there at the end for who reads."""

from __future__ import annotations

import fcntl
import io
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from running_vm import command_line
from tiny_guests import DEADLINE, HANG, SPIN, out, run_arguments

from hvkvm.abi import board, tlfs
from hvkvm.cli.teller import Teller
from hvkvm.events import BURST, Event, LimitedObserver, Observer, SynicPageMoved, Warned, limited

FLOOD = 20_000
FEW = BURST + 20
GuestImage = Callable[[bytes], Path]


class Recorder(Observer):
    def __init__(self) -> None:
        self.events: list[Event] = []

    def event(self, event: Event) -> None:
        self.events.append(event)


@pytest.fixture
def full_pipe() -> Iterator[tuple[int, int]]:
    """A pipe (read end, write end) of one page that is full: whoever writes to it waits."""
    reader, writer = os.pipe()
    size = fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writer, b"x" * (size - 1) + b"\n")
    yield reader, writer
    for fd in (reader, writer):
        try:
            os.close(fd)
        except OSError:
            continue  # the test closed it


def test_repeats_of_a_warning_are_few_and_counted() -> None:
    recorder = Recorder()
    observer = limited(recorder)
    for _ in range(FLOOD):
        observer.event(Warned("one", "wrong"))
    observer.event(Warned("another", "wrong too"))
    assert BURST < len(recorder.events) <= FEW
    assert recorder.events[-2] == Warned("one", "wrong (number 16384 of its kind)")
    assert recorder.events[-1] == Warned("another", "wrong too")


def test_other_events_are_not_limited() -> None:
    recorder = Recorder()
    observer = limited(recorder)
    for _ in range(100):
        observer.event(SynicPageMoved(0, "message", None))
    assert len(recorder.events) == 100


def test_subjects_without_end_neither_grow_a_table_nor_are_told() -> None:
    recorder = Recorder()
    observer = limited(recorder)
    for number in range(FLOOD):
        observer.event(Warned(f"subject {number}", "wrong"))
    assert len(recorder.events) < 300
    assert isinstance(observer, LimitedObserver)
    assert len(observer._counts) < 300


def test_what_is_limited_already_is_not_limited_twice() -> None:
    teller = Teller(io.StringIO(), quiet=False)
    assert limited(teller) is teller
    assert limited(limited(Recorder())) is not Recorder


def test_threads_that_warn_at_once_are_all_counted() -> None:
    recorder = Recorder()
    observer = limited(recorder)
    assert isinstance(observer, LimitedObserver)

    def warn() -> None:
        for _ in range(2000):
            observer.event(Warned("one", "wrong"))

    threads = [threading.Thread(target=warn) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert observer._counts["one"] == 8000


def test_nobody_waits_for_a_reader_and_what_found_no_room_is_told(full_pipe: tuple[int, int]) -> None:
    reader, writer = full_pipe
    with os.fdopen(writer, "w") as stream:
        teller = Teller(stream, quiet=False, limit=1000)
        for number in range(100):
            teller.write(f"line {number:3}, which nobody reads yet\n")
        assert 0 < teller.dropped < 100
        teller.say("the end")  # has room where others have none
        dropped = teller.dropped
        text = b""
        closer = threading.Thread(target=teller.close, args=(DEADLINE,))
        closer.start()
        while b"lost" not in text:
            text += os.read(reader, 1 << 16)
        closer.join(DEADLINE)
        assert not closer.is_alive()
    lines = text.decode().splitlines()[1:]
    assert lines[:3] == [f"line {number:3}, which nobody reads yet" for number in range(3)]
    assert lines[-2] == "hvkvm: the end"
    assert lines[-1] == f"hvkvm: {dropped} messages are lost: standard error was not read in time"


def test_closing_waits_no_longer_than_it_may(full_pipe: tuple[int, int]) -> None:
    reader, writer = full_pipe
    with os.fdopen(writer, "w") as stream:
        teller = Teller(stream, quiet=False)
        teller.say("nobody reads this")
        assert teller.close(0.05) is False
        teller.say("nor this")
        assert teller.waiting
        os.read(reader, 1 << 16)  # lets the thread end
        assert os.read(reader, 1 << 16) == b"hvkvm: nobody reads this\n"
        assert teller._thread is not None
        teller._thread.join(DEADLINE)


def test_a_reader_that_went_away_is_waited_for_no_more(full_pipe: tuple[int, int]) -> None:
    reader, writer = full_pipe
    with os.fdopen(writer, "w") as stream:
        teller = Teller(stream, quiet=False)
        teller.say("nobody will read this")
        os.close(reader)
        assert teller.close(DEADLINE) is False
        teller.say("nor this")
        assert not teller.waiting


def test_a_machine_without_threads_to_spare_still_says_how_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    teller = Teller(stream, quiet=False)

    def refused(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refused)
        teller.say("first")
    teller.say("last")
    assert teller.close() is True
    assert stream.getvalue() == "hvkvm: first\nhvkvm: last\n"


def test_a_forked_child_says_nothing_and_waits_for_nothing(full_pipe: tuple[int, int]) -> None:
    _, writer = full_pipe
    with os.fdopen(writer, "w", closefd=False) as stream:
        teller = Teller(stream, quiet=False)
        teller.say("the parent's")
        with teller._changed:  # as another thread of the parent may hold it at the fork
            child = os.fork()
            if not child:
                teller.say("the child's")
                teller.flush()
                teller.close(DEADLINE)
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        os.set_blocking(writer, False)
        teller.close(0)


@pytest.mark.kvm
@pytest.mark.user_synic
def test_a_guest_that_makes_warnings_is_not_held_up_by_who_reads_them(
    boot_agent: Callable[..., object], full_pipe: tuple[int, int]
) -> None:
    """A thousand SIMP writes that no page can follow, standard error a pipe that nobody reads."""
    reader, writer = full_pipe
    with os.fdopen(writer, "w") as stream:
        teller = Teller(stream, quiet=False)
        guest = boot_agent(hv="passthrough", synic="user", observer=teller)
        guest.enlighten()  # type: ignore[attr-defined]
        for number in range(1000):
            address = 0xFFFF_F000_0000_0000 + (number & 1) * 0x1000
            guest[0].wrmsr(tlfs.HV_X64_MSR_SIMP, address | 1)  # type: ignore[index]
        guest.machine.stop()  # type: ignore[attr-defined]
        os.set_blocking(reader, False)
        text = b""
        end = time.monotonic() + DEADLINE
        while b"number 512" not in text and time.monotonic() < end:
            try:
                text += os.read(reader, 1 << 16)
            except BlockingIOError:
                time.sleep(0.01)
        teller.close()
    assert BURST < text.count(b"no message page can lie") <= FEW


def start(kernel: Path, errors: int, *options: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command_line(*run_arguments(kernel, *options)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
    )


@pytest.mark.kvm
def test_a_run_can_be_ended_while_nobody_reads_its_standard_error(
    guest: GuestImage, full_pipe: tuple[int, int]
) -> None:
    """SIGQUIT's report finds the pipe full; SIGTERM ends the run all the same."""
    _, writer = full_pipe
    process = start(guest(out(board.COM1_PORT, ord("!")) + SPIN), writer)
    assert process.stdout is not None
    assert process.stdout.read(1) == b"!"
    process.send_signal(signal.SIGQUIT)
    time.sleep(0.2)
    assert process.poll() is None
    process.terminate()
    assert process.wait(DEADLINE) == 128 + signal.SIGTERM
    process.stdout.close()


@pytest.mark.kvm
def test_the_line_that_says_how_it_ended_comes_last_and_waits_for_a_slow_reader(
    guest: GuestImage, full_pipe: tuple[int, int]
) -> None:
    reader, writer = full_pipe
    flood = b"".join(out(0x5C0, value & 0xFF) for value in range(3000))
    process = start(guest(flood + out(board.COM1_PORT, ord("!")) + HANG), writer, "--timeout", "8")
    os.close(writer)
    assert process.stdout is not None
    assert process.stdout.read(1) == b"!"
    process.send_signal(signal.SIGQUIT)
    time.sleep(1)
    with os.fdopen(reader, "rb") as stream:
        lines = stream.read().decode().splitlines()[1:]
    assert process.wait(DEADLINE) == 124
    process.stdout.close()
    assert lines[-1] == "hvkvm: timeout: the guest had not finished after 8 s"
    assert BURST < sum("found no device" in line for line in lines) <= FEW
    assert any("vcpu0" in line for line in lines[:-1])
