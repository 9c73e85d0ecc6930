"""A machine called twice, too late, from two threads at once, by its own ones; and callbacks that raise."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import hvkvm
from hvkvm.errors import ConfigError, HvkvmError, StateError, Stopped
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.dump_vcpu import describe
from hvkvm.machine.lifecycle import Lifecycle
from hvkvm.machine.machine import Machine
from hvkvm.machine.outcome import Ending
from hvkvm.testing import micro
from hvkvm.testing.micro import MicroGuest

SECONDS = 100.0
SPIN = "1: jmp 1b"
HELLO = 'print "hello"\nexit 3'
WRITES = "movw $0x700, %dx\n1: outb %al, %dx\njmp 1b"
PORT = 0x700

Make = Callable[..., MicroGuest]


class Port:
    """A device of one port, which runs `fn` for each write."""

    def __init__(self, fn: Callable[[], object]) -> None:
        self._fn = fn

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self._fn()


def test_a_closed_machine_is_not_started_and_its_end_is_known(micro_guest: Make, tmp_path: Path) -> None:
    machine = micro_guest(HELLO).machine
    assert machine.run().status == 3
    with pytest.raises(StateError, match="not saved: the run has ended: command exited"):
        machine.save(tmp_path / "saved")
    machine.close()
    with pytest.raises(HvkvmError, match="this machine is closed; build another one"):
        machine.run()
    machine.finish(Ending.QUIT, 0, "too late")
    machine.expire()
    assert machine.wait() == machine.outcome == (Ending.COMMAND_EXITED, 3, "")
    with pytest.raises(StateError, match="not saved: the run has ended: command exited"):
        machine.save(tmp_path / "saved")
    never_ran = micro_guest(HELLO).machine
    never_ran.close()
    with pytest.raises(HvkvmError, match="is closed"):
        never_ran.start()
    assert never_ran.wait() == (Ending.QUIT, 0, "stopped by the host")


@pytest.mark.parametrize("what", ["stop", "close"])
def test_two_threads_end_it_at_once(micro_guest: Make, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one's question to the I/O loop was lost with the loop, and waited for."""
    both = threading.Barrier(2)
    stop = Lifecycle._stop_parts_from_outside

    def together(lifecycle: Lifecycle, seconds: float) -> None:
        with suppress(threading.BrokenBarrierError):
            both.wait(1)  # it passes where nothing keeps the second one out
        stop(lifecycle, seconds)

    monkeypatch.setattr(Lifecycle, "_stop_parts_from_outside", together)
    machine = micro_guest(SPIN).machine
    machine.start()
    errors: list[Exception] = []

    def end() -> None:
        try:
            getattr(machine, what)()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=end) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert errors == []
    assert machine.lifecycle.phase.name == "ENDED"


def test_time_may_be_over_without_a_limit(micro_guest: Make) -> None:
    machine = micro_guest(SPIN).machine
    machine.start()
    machine.expire()
    assert machine.wait(SECONDS) == (Ending.TIMEOUT, 124, "the guest had not finished in time")


def _calls(machine: Machine, path: Path) -> list[str]:
    """What each call that waits for the machine's threads says here."""
    said = []
    for call in (machine.stop, machine.close, lambda: machine.save(path)):
        try:
            call()
        except RuntimeError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("thread", ["io", "vcpu0"])
def test_a_thread_of_its_own_does_not_wait_for_itself(micro_guest: Make, thread: str, tmp_path: Path) -> None:
    machine = micro_guest(WRITES).machine
    said: list[str] = []
    told = threading.Event()

    def ask() -> None:
        if not told.is_set():
            said.extend(_calls(machine, tmp_path / "saved"))
            told.set()

    machine.board.ports.add(PORT, 1, Port(ask if thread == "vcpu0" else lambda: None))
    machine.start()
    if thread == "io":
        machine.platform.io.call_soon(ask)
    assert told.wait(SECONDS)
    assert [text.partition("()")[0] for text in said] == ["stop", "close", "save"]
    assert all(f"waits for the thread {thread};" in text for text in said)
    assert machine.outcome is None, "it runs on"
    machine.save(tmp_path / "saved")


def test_a_sink_that_raises_ends_the_run_by_its_error(micro_guest: Make) -> None:
    machine = micro_guest(f'print "hello"\n{SPIN}').machine
    heard: list[bytes] = []

    def sink(data: bytes) -> None:
        heard.append(data)
        raise LookupError("no such word")

    machine.board.attach_sink(sink)
    with pytest.raises(LookupError, match="no such word"):
        machine.run()
    assert (outcome := machine.outcome)
    assert (outcome.ending, outcome.status) == (Ending.HOST_ERROR, 254)
    assert outcome.detail.startswith("I/O loop: LookupError: no such word (test_machine_calls.py:")
    assert len(heard) == 1, "it gets nothing more"


def test_what_a_sink_raises_behind_the_end_is_raised_by_the_stop(micro_guest: Make) -> None:
    """The board was named as stuck for it, after ten seconds; what was raised was lost."""
    machine = micro_guest(HELLO).machine

    def sink(data: bytes) -> None:
        machine.wait()
        raise LookupError("no such word")

    machine.board.attach_sink(sink)
    with pytest.raises(LookupError, match="no such word"):
        machine.run()
    assert machine.lifecycle.phase.name == "ENDED"
    assert machine.outcome == (Ending.COMMAND_EXITED, 3, "")
    with pytest.raises(Stopped):
        machine.platform.io.call_soon(print)
    machine.stop()


def test_a_mistake_in_a_device_is_told_with_its_kind_and_place(micro_guest: Make) -> None:
    """That of an assertion without a text was nothing at all."""

    def check() -> None:
        raise AssertionError

    machine = micro_guest(WRITES).machine
    machine.board.ports.add(PORT, 1, Port(check))
    with pytest.raises(AssertionError):
        machine.run()
    assert (outcome := machine.outcome)
    assert outcome.ending is Ending.HOST_ERROR
    assert outcome.detail.startswith("vcpu0: AssertionError: (test_machine_calls.py:")
    assert describe(machine.platform.threads[0])[0].startswith(f"vcpu0: ended by {outcome.detail[7:]};")


def test_a_fault_is_of_the_vcpu_that_tells_it() -> None:
    """Another one's result may come between its numbers."""
    port = micro._ResultPort()

    def result(number: int) -> None:
        port.write(0, 4, number)
        port.write(4, 4, 0)

    for number in (13, 0, 0xABCD):
        result(number)
    other = threading.Thread(target=result, args=(0x1111,))
    other.start()
    other.join()
    result(7)
    assert port.take_last(4) == [13, 0, 0xABCD, 7]
    assert port.results == (0x1111,)
    assert port.take_last(4) == []


@pytest.mark.parametrize(("key", "flag"), [("restore", "--restore"), ("warm", "--from")])
def test_a_guest_is_not_made_warm_from_a_saved_one(
    micro_guest: Make, tmp_path: Path, key: str, flag: str
) -> None:
    """It was an AssertionError without a text, once all of the machine was made."""
    machine = micro_guest(SPIN).machine
    machine.start()
    saved = tmp_path / "saved"
    machine.save(saved, end=True)
    with pytest.raises(
        ConfigError, match=f"^{flag} {saved}: a guest that is made warm is booted; leave it out$"
    ):
        hvkvm.warm(MachineConfig(**{key: saved}), tmp_path / "warm")  # type: ignore[arg-type]


def unclosed(warned: pytest.WarningsRecorder) -> list[str]:
    """What is told of machines: other tests may have left something else in a cycle."""
    told = [str(one.message) for one in warned if one.category is ResourceWarning]
    return sorted(line for line in told if line.startswith("unclosed machine "))


def test_one_that_nobody_has_closed_is_told_of(micro_guest: Make, recwarn: pytest.WarningsRecorder) -> None:
    """Its fds and its guest's RAM stay until the process ends, and nothing said so."""
    config = micro_guest(HELLO).machine.config
    made = [Machine(config), Machine(config)]
    made[0].run()
    names, stacks = [machine.name for machine in made], [machine._stack for machine in made]
    made.clear()
    gc.collect()
    assert unclosed(recwarn) == sorted(
        f"unclosed machine {name}: call close(), or use it in a `with` block" for name in names
    )
    for stack in stacks:
        stack.close()


def test_one_that_was_closed_or_never_made_is_not(
    micro_guest: Make, recwarn: pytest.WarningsRecorder
) -> None:
    config = micro_guest(HELLO).machine.config
    Machine(config).close()
    with Machine(config) as machine:
        machine.run()
    del machine
    with pytest.raises(ConfigError):
        Machine(config._replace(cpus=0))
    gc.collect()
    assert unclosed(recwarn) == []
