"""The lab's host side: streams and their end marks, the job's script, a machine that answers or dies."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import lab_processor, lab_session
from steps.lab_host import CHANNELS


@given(output=st.binary(), cuts=st.lists(st.integers(0, 200)), after=st.binary(max_size=5))
def test_tail_gives_all_output_and_nothing_of_the_mark(output: bytes, cuts: list[int], after: bytes) -> None:
    tail = lab_session.Tail("0123456789abcdef")
    if b"\x000123456789abcdef" in output:
        return
    stream = output + b"\x000123456789abcdef" + after
    ends = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    pieces = [stream[a:b] for a, b in itertools.pairwise(ends)]
    got = b""
    for piece in pieces:
        if tail.ended:
            break
        got += tail.feed(piece)
    assert got == output
    assert tail.ended


@given(st.binary())
def test_tail_withholds_at_most_a_mark(output: bytes) -> None:
    tail = lab_session.Tail("ab")
    if b"\0ab" not in output:
        assert output.startswith(tail.feed(output))
        assert len(tail._held) < 3


TEXT = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]))


@settings(deadline=None)
@given(words=st.lists(TEXT, max_size=4), value=TEXT)
def test_job_script_passes_words_and_variables_unharmed(words: list[str], value: str) -> None:
    code = "import os,sys; sys.stdout.buffer.write(os.environb[b'V'] + b'|' + repr(sys.argv[1:]).encode())"
    text = lab_session.job_script([sys.executable, "-S", "-c", code, *words], Path("/"), {"V": value})
    text = text.replace(b"echo $$ >/run/lab/pid", b"")
    done = subprocess.run(["sh"], input=text, stdout=subprocess.PIPE, check=True)
    assert done.stdout == value.encode() + b"|" + repr(words).encode()


def test_job_in_a_folder_that_is_not_there_says_so() -> None:
    text = lab_session.job_script(["true"], Path("/nowhere/at-all"), {})
    done = subprocess.run(["sh"], input=text, capture_output=True, check=False)
    assert done.returncode == 126
    assert b"at-all: not there in the lab" in done.stderr


@pytest.mark.parametrize("name", ['a"b', "a`b", "a$(echo x)b", "a\\nb", "it's"])
def test_a_folder_s_name_is_no_part_of_the_script(name: str, tmp_path: Path) -> None:
    there = tmp_path / name
    for folder in (there, Path("/nowhere") / name):
        text = lab_session.job_script(["pwd"], folder, {}).replace(b"echo $$ >/run/lab/pid", b"")
        there.mkdir(exist_ok=True)
        done = subprocess.run(["sh"], input=text, capture_output=True, check=False)
        if folder == there:
            assert (done.returncode, done.stdout) == (0, f"{there}\n".encode())
        else:
            assert done.returncode == 126
            assert f"lab: {name}: not there in the lab\n".encode() in done.stderr


def test_variables_that_a_shell_cannot_have_are_left_out() -> None:
    names = {"HVKVM_A-B": "1", "PYTHON%%": "2", "HVKVM_C": "3", "PY_\u00e4": "4"}
    text = lab_session.job_script(["sh", "-c", "echo $HVKVM_C"], Path("/"), names)
    text = text.replace(b"echo $$ >/run/lab/pid", b"")
    done = subprocess.run(["sh"], input=text, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"3\n", b"")


class Machine:
    """Plays the machine's side of the channels: each is a socket that the test reads and writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(["sleep", "1000"])
        self.servers: dict[str, socket.socket] = {}
        for name in CHANNELS:
            server = self.servers[name] = socket.socket(socket.AF_UNIX)
            server.bind(str(folder / name))
            server.listen()
        self.ends: dict[str, socket.socket] = {}
        self.thread: threading.Thread | None = None

    def play(self, script: Callable[[Machine], None]) -> None:
        """Run `script` as the machine, in a thread."""

        def body() -> None:
            for name in ("control", "signals", "stdout", "stderr", "stdin"):
                self.ends[name] = self.servers[name].accept()[0]
            script(self)

        self.thread = threading.Thread(target=body, daemon=True)
        self.thread.start()

    def job(self) -> tuple[bytes, str]:
        """Await the job; its script and its token."""
        with self.ends["control"].makefile("rb", buffering=0) as control:
            verb, size, token, _ = control.readline().split()
            assert verb == b"job"
            script = b""
            while len(script) < int(size):
                script += control.read(int(size) - len(script))
        return script, token.decode()

    def say(self, channel: str, data: bytes) -> None:
        self.ends[channel].sendall(data)

    def finish(self, token: str, status: int) -> None:
        """End the job as the real machine does: the news, a mark on both streams, then the status."""
        self.say("control", b"ending\n")
        for channel in ("stdout", "stderr"):
            self.say(channel, b"\0" + token.encode())
        self.say("control", b"exit %d\n" % status)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for link in (*self.ends.values(), *self.servers.values()):
            link.close()
        if self.thread is not None:
            self.thread.join(10)
            assert not self.thread.is_alive()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    played = Machine(tmp_path)
    yield played
    played.close()


def run(
    machine: Machine, timeout: float | None = None, fresh: bool = True, stall: float | None = None
) -> lab_session.Outcome:
    session = lab_session.Session(
        machine.folder, machine.process.pid, tty=False, fresh=fresh, detail=lambda text: None, stall=stall
    )
    try:
        return session.run(b"script\n", timeout)
    finally:
        session.close()


@pytest.mark.parametrize("status", [0, 1, 77, 137, 255])
def test_output_and_status_come_back(
    machine: Machine, status: int, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    def play(played: Machine) -> None:
        played.say("control", b"hello 3.1\n")
        script, token = played.job()
        assert script == b"script\n"
        played.say("stdout", b"out\n")
        played.say("stderr", b"err\0\n")
        played.finish(token, status)

    machine.play(play)
    assert run(machine) == lab_session.Outcome(status, "", True)
    assert capfdbinary.readouterr() == (b"out\n", b"err\0\n")


def test_status_before_the_last_output_loses_nothing(
    machine: Machine, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    def play(played: Machine) -> None:
        played.say("control", b"hello 3.1\n")
        token = played.job()[1]
        played.say("control", b"ending\nexit 4\n")
        for _ in range(64):
            played.say("stdout", b"x" * 65536)
        played.say("stdout", b"\0" + token.encode())
        played.say("stderr", b"\0" + token.encode())

    machine.play(play)
    assert run(machine).status == 4
    assert len(capfdbinary.readouterr().out) == 64 * 65536


def test_machine_that_dies_is_told_from_a_command_that_fails(machine: Machine) -> None:
    def play(played: Machine) -> None:
        played.say("control", b"hello 3.1\n")
        played.job()
        played.process.kill()

    machine.play(play)
    assert run(machine) == lab_session.Outcome(None, "its process ended", False)


def test_machine_that_dies_after_output_says_there_was_some(machine: Machine) -> None:
    def play(played: Machine) -> None:
        played.say("control", b"hello 3.1\n")
        played.job()
        played.say("stdout", b"some\n")
        played.process.kill()

    machine.play(play)
    assert run(machine) == lab_session.Outcome(None, "its process ended", True)


def test_machine_that_dies_after_the_status_has_given_it(machine: Machine) -> None:
    def play(played: Machine) -> None:
        played.say("control", b"hello 3.1\n")
        played.finish(played.job()[1], 9)
        played.process.kill()

    machine.play(play)
    assert run(machine).status == 9


def test_machine_that_cannot_start_says_why(machine: Machine) -> None:
    machine.play(lambda played: played.say("control", b"fatal no root\n"))
    assert run(machine) == lab_session.Outcome(None, "no root")


def test_a_nul_at_the_end_of_output_does_not_wait_for_more(machine: Machine) -> None:
    """Two programs that talk through the lab in binary would wait for one another for ever."""
    answered = threading.Event()
    reader, writer = os.pipe()
    saved = os.dup(1)
    os.dup2(writer, 1)

    def play(played: Machine) -> None:
        played.say("control", b"hello 3.1\n")
        token = played.job()[1]
        played.say("stdout", b"question\0")
        answered.wait(60)
        played.finish(token, 0)

    def answer() -> None:
        got = b""
        while got != b"question\0":
            got += os.read(reader, 100)
        answered.set()

    threading.Thread(target=answer, daemon=True).start()
    machine.play(play)
    try:
        assert run(machine).status == 0
        assert answered.is_set()
    finally:
        os.dup2(saved, 1)
        for descriptor in (saved, reader, writer):
            os.close(descriptor)


def quick(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
    monkeypatch.setattr(lab_processor, "SAMPLE_SECONDS", 0.05)
    monkeypatch.setattr(lab_session, "POKE_SECONDS", 0.05)
    for name, value in seconds.items():
        monkeypatch.setattr(lab_session, name, value)


def test_silent_machine_with_an_idle_processor_stands_still(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch, SILENCE_SECONDS=0.5)

    def play(played: Machine) -> None:
        played.say("control", b"hello 3.1\n")
        played.job()

    machine.play(play)
    outcome = run(machine)
    assert outcome.status is None
    assert "stands still" in outcome.reason


def test_silent_machine_whose_processor_works_is_slow_and_not_dead(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch, SILENCE_SECONDS=0.1)
    monkeypatch.setattr(lab_processor.Processor, "idle", lambda self, now: 0.0)

    def play(played: Machine) -> None:
        played.say("control", b"hello 3.1\n")
        token = played.job()[1]
        for _ in range(20):
            assert played.ends["signals"].recv(100)  # it is prodded meanwhile
        played.finish(token, 6)

    machine.play(play)
    assert run(machine).status == 6


def test_machine_that_loops_in_silence_is_given_up_at_last(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch, SILENCE_SECONDS=0.1, BUSY_SILENCE_SECONDS=0.5)
    monkeypatch.setattr(lab_processor.Processor, "idle", lambda self, now: 0.0)

    def play(played: Machine) -> None:
        played.say("control", b"hello 3.1\n")
        played.job()

    machine.play(play)
    outcome = run(machine)
    assert outcome.status is None
    assert "its processor works" in outcome.reason


def beat(played: Machine, until: threading.Event) -> None:
    """Say now and then that the machine is alive, as its init does."""
    while not until.wait(0.05):
        with contextlib.suppress(OSError):
            played.say("control", b"beat\n")


def test_idle_machine_that_is_alive_is_asked_first_and_then_given_up(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch, SILENCE_SECONDS=10.0, TELL_SECONDS=3.0, AFTER_TELL_SECONDS=0.3)
    over = threading.Event()
    told: list[bytes] = []

    def play(played: Machine) -> None:
        played.say("control", b"hello 3.1\n")
        played.job()
        threading.Thread(target=beat, args=(played, over), daemon=True).start()
        while b"TELL\n" not in b"".join(told):
            told.append(played.ends["signals"].recv(100))
        played.say("stderr", b"waits for a guest\n")

    machine.play(play)
    outcome = run(machine, stall=0.3)
    over.set()
    assert outcome.status is None
    assert "stands still" in outcome.reason
    assert outcome.printed


class Moved:
    """Stands for the lab's processor: idle since the last `work()`."""

    def __init__(self) -> None:
        self.longest, self.since = 0.0, time.monotonic()

    def work(self) -> None:
        self.since = time.monotonic()

    def idle(self, now: float) -> float:
        return now - self.since


def asked(machine: Machine, monkeypatch: pytest.MonkeyPatch, work: Callable[[Moved], object]) -> list[float]:
    """A machine that does `work` each time it is asked what it waits for; when that was, thrice at most."""
    quick(monkeypatch, SILENCE_SECONDS=60.0, TELL_SECONDS=0.4, AFTER_TELL_SECONDS=0.2)
    processor = Moved()
    monkeypatch.setattr(lab_session, "Processor", lambda pid: processor)
    over, worked = threading.Event(), threading.Event()
    times: list[float] = []
    forward = lab_session.Session._forward

    def forward_and_wait(session: lab_session.Session, name: str) -> None:
        forward(session, name)
        if name == "TELL":
            assert worked.wait(100)  # or a busy host would be late, and that taken for the machine's work
            worked.clear()
            session.asked_at = time.monotonic()

    monkeypatch.setattr(lab_session.Session, "_forward", forward_and_wait)

    def play(played: Machine) -> None:
        played.say("control", b"hello 3.1\n")
        token = played.job()[1]
        threading.Thread(target=beat, args=(played, over), daemon=True).start()
        while len(times) < 3:
            got = played.ends["signals"].recv(100)
            if not got:
                return  # given up
            if b"TELL" in got:
                times.append(time.monotonic())
                work(processor)
                worked.set()
        played.finish(token, 0)

    machine.play(play)
    outcome = run(machine, stall=0.3)
    over.set()
    assert (outcome.status is None) == (len(times) < 3)
    return times


def test_what_the_asking_costs_is_no_sign_of_life(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one that stands for ever would be asked for ever."""
    assert len(asked(machine, monkeypatch, Moved.work)) == 1


def test_a_machine_that_goes_on_after_it_was_asked_is_not_given_up(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def for_long(processor: Moved) -> None:
        processor.since = time.monotonic() + 2.0

    assert len(asked(machine, monkeypatch, for_long)) == 3


def test_a_command_that_has_nothing_to_do_is_not_asked(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker of pytest-xdist waits for the others at its end, as long as they take."""
    quick(monkeypatch, SILENCE_SECONDS=60.0)
    monkeypatch.setattr(lab_session, "Processor", lambda pid: Moved())

    def play(played: Machine) -> None:
        played.say("control", b"hello 3.1\n")
        token = played.job()[1]
        end = time.monotonic() + 3.0
        while time.monotonic() < end:
            assert b"TELL" not in played.ends["signals"].recv(100)
            played.say("control", b"beat resting\n")
        played.finish(token, 0)

    machine.play(play)
    assert run(machine, stall=1.5).status == 0


def test_idle_machine_is_left_alone_when_nobody_minds(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell in the lab waits for its user."""
    quick(monkeypatch, SILENCE_SECONDS=0.5)
    over = threading.Event()

    def play(played: Machine) -> None:
        played.say("control", b"hello 3.1\n")
        token = played.job()[1]
        threading.Thread(target=beat, args=(played, over), daemon=True).start()
        for _ in range(30):
            assert b"TELL" not in played.ends["signals"].recv(100)
        over.set()
        played.finish(token, 0)

    machine.play(play)
    assert run(machine).status == 0


def test_deadline_terminates_the_command(machine: Machine) -> None:
    told: list[bytes] = []

    def play(played: Machine) -> None:
        played.say("control", b"hello 3.1\n")
        token = played.job()[1]
        told.append(played.ends["signals"].recv(100))
        played.finish(token, 143)

    machine.play(play)
    assert run(machine, timeout=0.1).status == lab_session.STATUS_TIMEOUT
    assert told == [b"TERM\n"]


def test_command_that_ignores_the_deadline_is_given_up(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab_session, "GRACE_SECONDS", 0.1)

    def play(played: Machine) -> None:
        played.say("control", b"hello 3.1\n")
        played.job()

    machine.play(play)
    outcome = run(machine, timeout=0.1)
    assert outcome.status == lab_session.STATUS_TIMEOUT
    assert outcome.reason


def test_standard_input_arrives_whole_and_ends(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = os.urandom(300_000)
    got: list[bytes] = []
    reader, writer = os.pipe()
    saved = os.dup(0)
    os.dup2(reader, 0)
    os.close(reader)

    def feed() -> None:
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(sent)

    def play(played: Machine) -> None:
        played.say("control", b"hello 3.1\n")
        token = played.job()[1]
        with played.ends["stdin"].makefile("rb") as stdin:
            got.append(stdin.read())
        played.finish(token, 0)

    feeder = threading.Thread(target=feed)
    feeder.start()
    machine.play(play)
    try:
        outcome = run(machine)
        assert outcome.status == 0
    finally:
        os.dup2(saved, 0)
        os.close(saved)
        feeder.join()
    assert got == [sent]
    assert outcome.fed  # so that the command is not started again, without what it took


def test_interrupt_is_passed_on(machine: Machine) -> None:
    told: list[bytes] = []

    def play(played: Machine) -> None:
        played.say("control", b"hello 3.1\n")
        token = played.job()[1]
        os.kill(os.getpid(), 2)
        told.append(played.ends["signals"].recv(100))
        played.finish(token, 130)

    machine.play(play)
    assert run(machine).status == 130
    assert told == [b"INT\n"]


BRIDGE = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
from steps import lab_session
folder, pid, *command = sys.argv[1:]
session = lab_session.Session(Path(folder), int(pid), tty=False, fresh=True, detail=lambda text: None)
sys.exit(session.run(lab_session.job_script(command, Path("/"), {{}}), None).status)
"""
"""What `scripts/lab` does with a machine that runs."""


def test_a_python_behind_the_lab_s_streams_is_a_worker_like_any(machine: Machine, tmp_path: Path) -> None:
    """The suite's workers are such: calls go in and results come out, in binary, for as long as they like."""
    import execnet

    bridge, script = tmp_path / "bridge.py", tmp_path / "job"
    bridge.write_text(BRIDGE.format(path=sys.path))

    def play(played: Machine) -> None:
        played.say("control", b"hello 3.1\n")
        text, token = played.job()
        script.write_bytes(text.replace(b"echo $$ >/run/lab/pid", b""))
        ends = {name: played.ends[name] for name in ("stdin", "stdout", "stderr")}
        played.finish(token, subprocess.run(["sh", script], check=False, **ends).returncode)  # type: ignore[call-overload]

    machine.play(play)
    group = execnet.Group(execmodel="main_thread_only")
    python = f"{sys.executable} {bridge} {machine.folder} {machine.process.pid} {sys.executable}"
    try:
        gateway = group.makegateway(f"popen//python={python}")
        channel = gateway.remote_exec("for size in channel: channel.send(bytes(size))")
        for size in (0, 1, 255, 256, 65536, 1 << 20):
            channel.send(size)
            assert channel.receive(60) == bytes(size)
        channel.close()
    finally:
        group.terminate(20)


def test_a_lab_under_nohup_outlives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with lab_session._signals_as_bytes() as arrived:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            assert os.read(arrived, 1) == bytes([signal.SIGTERM])
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
