"""A machine's way to rest and back: in which order, who is waited for, and what an end does to it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import cast

import pytest

from hvkvm.errors import BootError, HostExhausted, HvkvmError, Stuck
from hvkvm.events import Event, Observer, Warned
from hvkvm.machine import lifecycle as lifecycle_module
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.lifecycle import Lifecycle, Phase
from hvkvm.machine.outcome import Ending
from hvkvm.machine.part import Part
from hvkvm.machine.platform import Platform
from hvkvm.runtime.io_loop import IoLoop

SECONDS = 60.0


class Group:
    """vCPUs that come to rest when the test says so, on a thread of their own as real ones do."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.may_rest = threading.Event()
        self.may_rest.set()
        self._threads: list[threading.Thread] = []

    def start_all(self) -> None:
        self.log.append("run")

    def request_pause(self, when_paused: Callable[[], object]) -> None:
        def rest() -> None:
            if self.may_rest.wait(SECONDS):
                self.log.append("pause")
                when_paused()

        self._threads.append(threading.Thread(target=rest))
        self._threads[-1].start()

    def resume_all(self) -> None:
        self.log.append("run")

    def stop_all(self, timeout: float) -> None:
        self.may_rest.set()
        for thread in self._threads:
            thread.join(timeout)

    def describe(self) -> str:
        return "vcpu0: running guest"


class Recorder:
    """A part that says what it is told; `slow` ones answer a stop only when the test lets them."""

    def __init__(self, name: str, log: list[str], *, slow: bool = False) -> None:
        self.name = name
        self._log = log
        self.slow = slow
        self.waiting: list[Callable[[], object]] = []
        self.asked = threading.Event()

    def start(self) -> None:
        self._log.append(f"{self.name} starts")

    def stop(self, done: Callable[[], object]) -> None:
        self._log.append(f"{self.name} stops")
        if self.slow:
            self.waiting.append(done)
        else:
            done()
        self.asked.set()

    def reset(self) -> None:
        self._log.append(f"{self.name} resets")


class Heard(Observer):
    """Keeps the texts of warnings."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def event(self, event: Event) -> None:
        if isinstance(event, Warned):
            self.texts.append(event.text)


class World:
    """A lifecycle on a real I/O loop, with two recording parts."""

    def __init__(self, *, reboot: bool = True, why_no_reset: str = "") -> None:
        self.heard = Heard()
        self.log: list[str] = []
        self.faults: list[BaseException] = []
        self.group = Group(self.log)
        self.io = IoLoop(on_fault=self.faults.append)
        config = MachineConfig(kernel=Path("/dev/null"))
        platform = cast(
            Platform,
            Platform(config, None, None, None, [], [], self.group, None, self.io, self.heard),  # type: ignore[arg-type]
        )
        self.lifecycle = Lifecycle(platform, reboot=reboot, why_no_reset=lambda: why_no_reset)
        self.user = Recorder("disk", self.log)
        self.used = Recorder("bus", self.log)
        self.panic: str | None = None
        self.lifecycle.govern([cast(Part, self.user), cast(Part, self.used)], self)

    def flush(self) -> None:
        pass

    def console_panic(self, *, hung: bool = False) -> str | None:
        return self.panic

    def console_panic_report(self) -> str | None:
        return self.panic

    def on_loop(self, fn: Callable[[], object] = lambda: None) -> None:
        """Run `fn` on the loop, behind all that was queued before."""
        done = threading.Event()
        self.io.call_soon(lambda: (fn(), done.set()))
        assert done.wait(SECONDS)

    def until(self, happened: Callable[[], bool]) -> None:
        gate = threading.Event()
        for _ in range(int(SECONDS / 0.005)):
            if happened():
                return
            gate.wait(0.005)
        raise AssertionError(f"it did not happen; phase {self.lifecycle.phase}, log {self.log}")

    def until_it_runs(self, resets: int = 0) -> None:
        """Until it goes on after so many resets; it says that it runs just before its vCPUs do."""
        self.until(lambda: self.lifecycle.resets == resets and self.lifecycle.phase is Phase.RUNNING)
        self.on_loop()


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    world.lifecycle.start()
    yield world
    world.user.slow = world.used.slow = False
    world.lifecycle.stop(SECONDS)
    world.lifecycle.close()
    assert not world.faults


STARTED = ["bus starts", "disk starts", "run"]
RESTED = ["pause", "disk stops", "bus stops"]
"""Who uses something stops first (S7)."""


def test_a_reset_stops_resets_and_starts_the_parts_in_order(world: World) -> None:
    world.lifecycle.request_reset("asked")
    world.until_it_runs(resets=1)
    assert world.log == [*STARTED, *RESTED, "disk resets", "bus resets", *STARTED]


def test_while_a_part_stops_the_loop_goes_on_and_nothing_is_reset(world: World) -> None:
    world.user.slow = True
    world.lifecycle.request_reset("asked")
    assert world.user.asked.wait(SECONDS)
    world.on_loop()
    assert world.lifecycle.phase is Phase.STOPPING
    assert world.log == [*STARTED, "pause", "disk stops"]
    world.on_loop(world.user.waiting.pop())
    world.until(lambda: world.lifecycle.resets == 1)


def test_while_a_vcpu_does_not_rest_the_loop_goes_on(world: World) -> None:
    world.group.may_rest.clear()
    world.lifecycle.request_reset("asked")
    world.on_loop()
    world.until(lambda: world.lifecycle.phase is Phase.PAUSING)
    world.on_loop()
    assert world.log == STARTED
    world.group.may_rest.set()
    world.until(lambda: world.lifecycle.resets == 1)


def test_resets_asked_for_at_once_are_one_and_a_later_one_is_another(world: World) -> None:
    world.user.slow = True
    for _ in range(3):
        world.lifecycle.request_reset("asked")
    assert world.user.asked.wait(SECONDS)
    world.lifecycle.request_reset("asked while it stops")
    world.user.slow = False
    world.on_loop(world.user.waiting.pop())
    world.until(lambda: world.lifecycle.resets == 1 and world.lifecycle.phase is Phase.RUNNING)
    world.lifecycle.request_reset("again")
    world.until(lambda: world.lifecycle.resets == 2)


def test_work_asked_for_on_the_way_is_done_in_the_same_rest(world: World) -> None:
    world.user.slow = True
    world.on_loop(lambda: world.lifecycle.at_rest(lambda go_on: (world.log.append("first"), go_on())))
    assert world.user.asked.wait(SECONDS)
    world.on_loop(lambda: world.lifecycle.at_rest(lambda go_on: (world.log.append("second"), go_on())))
    world.user.slow = False
    world.on_loop(world.user.waiting.pop())
    world.until_it_runs()
    assert world.log == [*STARTED, *RESTED, "first", "second", *STARTED]


def test_the_machine_stays_at_rest_until_its_work_lets_it_go_on(world: World) -> None:
    kept: list[Callable[[], object]] = []
    world.on_loop(lambda: world.lifecycle.at_rest(kept.append))
    world.until(lambda: bool(kept))
    world.on_loop()
    assert world.lifecycle.phase is Phase.AT_REST
    assert world.log == [*STARTED, *RESTED]
    threading.Thread(target=kept.pop()).start()
    world.until_it_runs()
    assert world.log == [*STARTED, *RESTED, *STARTED]


def test_an_end_on_the_way_to_rest_wins(world: World) -> None:
    world.user.slow = True
    world.lifecycle.request_reset("asked")
    assert world.user.asked.wait(SECONDS)
    world.lifecycle.finish(Ending.POWERED_OFF, 0)
    world.on_loop(world.user.waiting.pop())
    world.until(lambda: "bus stops" in world.log)
    world.on_loop()
    assert world.lifecycle.resets == 0
    assert not {"disk resets", "bus resets"} & set(world.log)
    assert world.log.count("run") == 1, "no vCPU goes on after the end"


def test_the_end_waits_for_parts_that_stop_later(world: World) -> None:
    world.user.slow = True
    ended = threading.Thread(target=world.lifecycle.stop, args=(SECONDS,))
    ended.start()
    assert world.user.asked.wait(SECONDS)
    world.on_loop()
    assert ended.is_alive()
    world.on_loop(world.user.waiting.pop())
    ended.join(SECONDS)
    assert not ended.is_alive()
    assert world.log[-1] == "bus stops"
    assert world.lifecycle.outcome is not None
    assert world.lifecycle.outcome.ending is Ending.QUIT


def test_a_part_that_never_stops_is_named_at_the_end(world: World) -> None:
    world.user.slow = True
    with pytest.raises(Stuck, match="the disk has not stopped"):
        world.lifecycle.stop(1.0)  # all of it passes; by then the loop must have come as far as the disk


def test_a_part_that_never_stops_ends_a_reset_with_its_name(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadlines: list[tuple[float, Callable[[], object]]] = []
    monkeypatch.setattr(world.io, "call_later", lambda *timer: deadlines.append(timer))
    world.user.slow = True
    world.lifecycle.request_reset("asked")
    assert world.user.asked.wait(SECONDS)
    ((seconds, too_late),) = deadlines  # it passes now that the vCPUs rest: they would be named else
    assert seconds == lifecycle_module.REST_SECONDS
    world.on_loop(too_late)
    outcome = world.lifecycle.wait(SECONDS)
    assert outcome is not None
    assert outcome.ending is Ending.STUCK
    assert "the disk" in outcome.detail


def test_a_process_that_was_stopped_meanwhile_gives_its_parts_their_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGSTOP in the middle of a reset, and SIGCONT much later: what a disk needs is still to come."""
    deadlines: list[SimpleNamespace] = []

    def call_later(seconds: float, fn: Callable[[], object]) -> SimpleNamespace:
        deadlines.append(SimpleNamespace(due=monotonic() + seconds, fn=fn, cancel=lambda: None))
        return deadlines[-1]

    monkeypatch.setattr(world.io, "call_later", call_later)
    world.user.slow = True
    world.lifecycle.request_reset("asked")
    assert world.user.asked.wait(SECONDS)
    deadlines[0].due -= 1000
    world.on_loop(deadlines[0].fn)
    assert world.lifecycle.outcome is None
    assert len(deadlines) == 2
    world.on_loop(world.user.waiting.pop())
    world.until(lambda: world.log[-1] == "run")
    assert world.lifecycle.outcome is None


@pytest.mark.parametrize("reset_too", [False, True])
def test_who_is_patient_waits_for_a_part_and_ends_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, reset_too: bool
) -> None:
    """A save while a disk hangs: the guest lives, unless it is to be reset as well."""
    deadlines: list[Callable[[], object]] = []
    monkeypatch.setattr(world.io, "call_later", lambda _seconds, fn: deadlines.append(fn))
    world.user.slow = True
    saved = threading.Event()
    world.on_loop(lambda: world.lifecycle.at_rest(lambda go_on: (saved.set(), go_on()), patient=True))
    assert world.user.asked.wait(SECONDS)
    if reset_too:
        world.lifecycle.request_reset("asked")
        world.on_loop()
    world.on_loop(deadlines[0])
    if reset_too:
        assert world.lifecycle.outcome is not None
        assert world.lifecycle.outcome.ending is Ending.STUCK
        return
    assert world.lifecycle.outcome is None
    (told,) = world.heard.texts
    assert told == "no rest within 30 s: waiting for its parts to stop: the disk; it is waited for"
    world.on_loop(world.user.waiting.pop())
    assert saved.wait(SECONDS)
    world.until(lambda: world.log[-1] == "run")


def test_a_loop_that_never_answers_is_named_at_the_end_with_what_it_is_in(world: World) -> None:
    go_on = threading.Event()

    def stands_still() -> None:
        assert go_on.wait(SECONDS)

    world.io.call_soon(stands_still)
    try:
        with pytest.raises(Stuck, match=r"I/O loop has not answered .* running .*stands_still"):
            world.lifecycle.stop(1.0)
    finally:
        go_on.set()


def test_a_reset_that_cannot_boot_again_says_so_and_is_no_failure_of_kvm(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's package was exchanged in the weeks since the guest was started."""

    def reset() -> None:
        raise BootError("--kernel x: no such file")

    monkeypatch.setattr(world.used, "reset", reset)
    world.lifecycle.request_reset("asked")
    outcome = world.lifecycle.wait(SECONDS)
    assert outcome is not None
    assert (outcome.ending, outcome.status, outcome.clean) == (Ending.RESET, 254, False)
    assert str(outcome) == "reset: it is not started again: --kernel x: no such file"


def test_a_saved_machine_that_is_not_started_again_says_so() -> None:
    world = World(why_no_reset="its kernel has changed")
    try:
        world.lifecycle.start()
        world.lifecycle.request_reset("asked")
        outcome = world.lifecycle.wait(SECONDS)
    finally:
        world.lifecycle.stop(SECONDS)
        world.lifecycle.close()
    assert outcome is not None
    assert (outcome.ending, outcome.status) == (Ending.RESET, 0)
    assert world.heard.texts == ["asked; it is not started again: its kernel has changed"]


def test_a_vcpu_that_never_rests_ends_a_reset_with_what_it_does(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle_module, "REST_SECONDS", 0.05)
    world.group.may_rest.clear()
    world.lifecycle.request_reset("asked")
    outcome = world.lifecycle.wait(SECONDS)
    assert outcome is not None
    assert "vcpu0: running guest" in outcome.detail


def test_a_reset_behind_a_panic_is_the_panic(world: World) -> None:
    world.panic = "Kernel panic - not syncing: oops"
    world.lifecycle.request_reset("asked")
    outcome = world.lifecycle.wait(SECONDS)
    assert outcome == (Ending.PANIC, 255, world.panic)
    assert world.log == STARTED


def test_a_machine_that_shall_not_reboot_ends_at_a_reset() -> None:
    world = World(reboot=False)
    world.lifecycle.start()
    world.lifecycle.request_reset("asked")
    assert world.lifecycle.wait(SECONDS) == (Ending.RESET, 0, "asked")
    world.lifecycle.stop(SECONDS)
    world.lifecycle.close()


@pytest.mark.parametrize("what", ["loop", "part"])
def test_a_start_that_fails_is_not_waited_for(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has run, so nothing is to be stopped, flushed or named as stuck."""
    world = World()
    ended: list[str] = []
    world.lifecycle.at_end(lambda done: (ended.append("flush"), done()))

    def refuse() -> None:
        raise HostExhausted("no thread for io")

    monkeypatch.setattr(world.io if what == "loop" else world.used, "start", refuse)
    with pytest.raises(HostExhausted):
        world.lifecycle.start()
    world.lifecycle.stop(SECONDS)
    world.lifecycle.close()
    assert ended == []


def test_a_crash_that_was_told_is_the_end_whatever_the_guest_does_next(world: World) -> None:
    """A triple fault, or its power-off, comes on a vCPU's thread, and the loop may have had no turn yet."""
    standing = threading.Event()
    world.io.call_soon(standing.wait, SECONDS)
    world.lifecycle.panicked("BUGCHECK 1")
    world.lifecycle.panicked("BUGCHECK 2")
    world.lifecycle.finish(Ending.TRIPLE_FAULT, 254, "vcpu0")
    standing.set()
    assert world.lifecycle.wait(SECONDS) == (Ending.PANIC, 255, "BUGCHECK 1")


def test_a_reset_may_follow_one_that_is_counted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who saw it counted and asked for the next one was not heard."""
    asked: list[int] = []

    class Counted(Lifecycle):
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value)
            if name == "resets" and value == 1 and not asked:
                asked.append(1)
                self.request_reset("again")

    world.lifecycle.__class__ = Counted
    world.lifecycle.request_reset("first")
    world.until_it_runs(resets=2)


def test_who_comes_behind_the_end_is_not_heard(world: World) -> None:
    """A vCPU's last exit, or a device's callback, may be late."""
    world.lifecycle.stop(SECONDS)
    ended = world.lifecycle.outcome
    world.lifecycle.panicked("late")
    world.lifecycle.request_reset("late")
    world.lifecycle.finish(Ending.RESET, 0, "late")
    assert world.lifecycle.wait(0) is ended


def test_a_machine_starts_once(world: World) -> None:
    with pytest.raises(HvkvmError, match="started already"):
        world.lifecycle.start()
