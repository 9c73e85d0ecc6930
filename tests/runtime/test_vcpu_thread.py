"""The vCPU thread on a stand-in for KVM that keeps KVM_RUN's promises: dispatch, queue, faults, states."""

from __future__ import annotations

import ctypes
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from hvkvm.abi.kvm import KVM_EXIT_HLT, KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_MMIO
from hvkvm.abi.kvm_structs import kvm_run
from hvkvm.errors import HostExhausted, HvkvmError, Stopped, UnhandledExit
from hvkvm.runtime.kick import KICK_SIGNAL
from hvkvm.runtime.vcpu_thread import LAST_EXITS, VcpuThread
from hvkvm.runtime.vcpus import VcpuGroup

pytestmark = pytest.mark.usefixtures("no_leaks")

_ppoll = ctypes.CDLL(None).ppoll


class FakeVcpu:
    """`enter()` gives the scripted exits, then blocks like a halted guest.

    Like KVM_RUN it returns at once when immediate_exit is set, and takes the
    kick signal only while it waits. A scripted exit in `parts` needs that many
    further entries to complete, also with immediate_exit set.
    """

    def __init__(self, *script: int, index: int = 0) -> None:
        self.index = index
        self.run = kvm_run()
        self.script = deque(script)
        self.parts: deque[int] = deque()
        self.entries = 0
        self.inside = False

    def enter(self) -> int:
        self.entries += 1
        self.inside = True
        try:
            if self.parts:
                return self.parts.popleft()
            signal.pthread_sigmask(signal.SIG_BLOCK, {KICK_SIGNAL})
            if not self.run.immediate_exit:
                if self.script:
                    return self.script.popleft()
                none = (ctypes.c_ubyte * 128)()
                _ppoll(None, 0, None, none, 8)
            return KVM_EXIT_INTR
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {KICK_SIGNAL})
            self.inside = False


Handlers = dict[int, Callable[..., object]]


@contextmanager
def running(vcpu: FakeVcpu, handlers: Handlers | None = None, start: bool = True) -> Iterator[VcpuThread]:
    """A thread for `vcpu`; `thread.faults` has what it reported."""
    faults: list[BaseException] = []
    if handlers is None:
        handlers = {}
    thread = VcpuThread(vcpu, handlers, on_fault=lambda _thread, error: faults.append(error))  # type: ignore[arg-type]
    thread.faults = faults  # type: ignore[attr-defined]
    if start:
        thread.start()
    yield thread
    thread.stop()
    assert thread.join(100), thread.state


def faults_of(thread: VcpuThread) -> list[BaseException]:
    return thread.faults  # type: ignore[attr-defined, no-any-return]


def wait_for(thread: VcpuThread, state: str) -> None:
    """Wait until the thread says it is in `state`."""
    while thread.state != state:
        threading.Event().wait(0.001)


def test_each_exit_goes_to_its_handler_with_the_vcpu() -> None:
    seen: list[tuple[str, object, bool]] = []
    third = threading.Event()

    def handled(name: str, vcpu: object) -> None:
        seen.append((name, vcpu, thread.is_current()))
        if len(seen) == 3:
            third.set()

    vcpu = FakeVcpu(KVM_EXIT_IO, KVM_EXIT_MMIO, KVM_EXIT_IO)
    with running(vcpu, start=False) as thread:
        thread._handlers = {
            KVM_EXIT_IO: lambda v: handled("io", v),
            KVM_EXIT_MMIO: lambda v: handled("mmio", v),
        }
        thread.start()
        assert third.wait(100)  # without a kick, which would be an exit between them
        assert seen == [("io", vcpu, True), ("mmio", vcpu, True), ("io", vcpu, True)]
        assert thread.exit_counts[KVM_EXIT_IO] == 2
        assert thread.exit_counts[KVM_EXIT_MMIO] == 1
        assert thread.last_exits[:3] == (KVM_EXIT_IO, KVM_EXIT_MMIO, KVM_EXIT_IO)
        assert not thread.is_current()


def test_handlers_may_be_added_until_start() -> None:
    handlers: Handlers = {}
    seen: list[int] = []
    with running(FakeVcpu(KVM_EXIT_HLT), handlers, start=False) as thread:
        handlers[KVM_EXIT_HLT] = lambda _vcpu: seen.append(1)
        thread.start()
        while not seen:
            thread.call(int)
    assert seen == [1]
    assert not faults_of(thread)


def test_only_the_last_exits_are_remembered() -> None:
    with running(FakeVcpu(*[KVM_EXIT_IO] * 100), {KVM_EXIT_IO: lambda _vcpu: None}) as thread:
        while thread.exit_counts[KVM_EXIT_IO] < 100:
            thread.call(int)
        assert len(thread.last_exits) == LAST_EXITS


def test_an_exit_without_a_handler_is_a_typed_fault() -> None:
    with running(FakeVcpu(KVM_EXIT_MMIO, index=3)) as thread:
        assert thread.join(100)
        (fault,) = faults_of(thread)
        assert isinstance(fault, UnhandledExit)
        assert (fault.reason, fault.vcpu_index) == (KVM_EXIT_MMIO, 3)
        assert thread.fault is fault
        assert "UnhandledExit" in thread.state


def test_s31_a_fault_ends_the_thread_and_cancels_what_waits() -> None:
    seen: list[str] = []
    in_handler, let_go = threading.Event(), threading.Event()

    def broken(_vcpu: object) -> None:
        in_handler.set()
        let_go.wait()
        raise KeyError("handler")

    with running(FakeVcpu(KVM_EXIT_IO), {KVM_EXIT_IO: broken}) as thread:
        assert in_handler.wait(100)
        assert thread.state == "handling KVM_EXIT_IO"
        thread.submit(seen.append, "ran", cancelled=lambda: seen.append("cancelled"))
        let_go.set()
        assert thread.join(100)
        assert isinstance(thread.fault, KeyError)
        assert seen == ["cancelled"]
        with pytest.raises(Stopped):
            thread.submit(print)


def test_submitted_work_that_raises_is_a_fault_and_a_call_that_raises_is_not() -> None:
    with running(FakeVcpu()) as thread:
        with pytest.raises(ZeroDivisionError):
            thread.call(lambda: 1 // 0)
        assert thread.call(lambda: 42) == 42
        thread.submit(lambda: 1 // 0)
        assert thread.join(100)
        assert [type(fault) for fault in faults_of(thread)] == [ZeroDivisionError]


def test_an_error_of_the_vcpu_itself_is_a_fault() -> None:
    vcpu = FakeVcpu()
    vcpu.enter = lambda: 1 // 0  # type: ignore[method-assign]
    with running(vcpu) as thread:
        assert thread.join(100)
        assert isinstance(thread.fault, ZeroDivisionError)


def test_an_error_in_a_cancellation_is_reported() -> None:
    with running(FakeVcpu(), start=False) as thread:
        thread.submit(thread.stop)
        thread.submit(lambda: None)
        thread.start()
        wait_for(thread, "ended")
        assert not faults_of(thread)
    in_call, let_go = threading.Event(), threading.Event()
    with running(FakeVcpu()) as thread:
        thread.submit(lambda: (in_call.set(), let_go.wait()))
        assert in_call.wait(100)
        thread.submit(print, cancelled=lambda: 1 // 0)
        thread.stop()
        let_go.set()
    assert [type(fault) for fault in faults_of(thread)] == [ExceptionGroup]


def test_work_submitted_before_start_runs_before_the_guest() -> None:
    vcpu = FakeVcpu()
    entries: list[int] = []
    with running(vcpu, start=False) as thread:
        assert thread.state == "not started"
        thread.submit(lambda: entries.append(vcpu.entries))
        thread.start()
        thread.call(int)
    assert entries == [0]


def test_a_thread_stopped_before_start_cancels_and_cannot_start() -> None:
    seen: list[str] = []
    with running(FakeVcpu(), start=False) as thread:
        thread.submit(print, cancelled=lambda: seen.append("cancelled"))
        thread.stop()
        assert seen == ["cancelled"]
        assert thread.join(0)
        with pytest.raises(HvkvmError, match="cannot start"):
            thread.start()


def test_a_thread_starts_once() -> None:
    with running(FakeVcpu()) as thread:
        with pytest.raises(HvkvmError, match="cannot start"):
            thread.start()


def test_a_call_on_the_thread_itself_runs_at_once() -> None:
    with running(FakeVcpu()) as thread:
        assert thread.call(lambda: thread.call(lambda: "inner")) == "inner"


def test_a_call_to_a_stopped_thread_is_stopped() -> None:
    with running(FakeVcpu()) as thread:
        thread.stop()
        thread.join(100)
        with pytest.raises(Stopped):
            thread.call(int)


def test_a_call_that_waits_too_long_is_withdrawn() -> None:
    in_call, let_go = threading.Event(), threading.Event()
    runs: list[int] = []
    with running(FakeVcpu()) as thread:
        thread.submit(lambda: (in_call.set(), let_go.wait()))
        assert in_call.wait(100)
        with pytest.raises(TimeoutError, match="withdrawn"):
            thread.call(runs.append, 1, timeout=0.01)
        let_go.set()
        thread.call(int)
    assert not runs


def test_s25_kicks_only_a_thread_that_is_in_the_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elided: before start, from its own handlers, and while it drains. Sent: when it is inside."""
    in_call, let_go = threading.Event(), threading.Event()
    own: list[int] = []
    vcpu = FakeVcpu(KVM_EXIT_IO)
    handlers: Handlers = {KVM_EXIT_IO: lambda _vcpu: thread.submit(own.append, 1)}
    with running(vcpu, handlers, start=False) as thread:
        kicks: list[int] = []
        real = type(thread._kicker).kick

        def kick(kicker: object) -> None:
            kicks.append(1)
            real(kicker)  # type: ignore[arg-type]

        monkeypatch.setattr("hvkvm.runtime.kick.Kicker.kick", kick)
        thread.submit(lambda: (in_call.set(), let_go.wait()))
        thread.start()
        assert in_call.wait(100)
        for _ in range(100):
            thread.submit(int)
        let_go.set()
        while not own:
            threading.Event().wait(0.001)
        assert kicks == []
        while not vcpu.inside:
            threading.Event().wait(0.001)
        thread.call(int)
        assert kicks == [1]


def test_work_that_submits_itself_again_holds_up_neither_pause_nor_stop() -> None:
    def again() -> None:
        thread.submit(again)

    with running(FakeVcpu()) as thread:
        thread.submit(again)
        for _ in range(50):
            thread.request_pause()
            assert thread.wait_paused(20)
            thread.resume()


def test_the_state_names_what_is_drained() -> None:
    in_call, let_go = threading.Event(), threading.Event()

    def deliver_message() -> None:
        in_call.set()
        let_go.wait()

    with running(FakeVcpu()) as thread:
        thread.submit(deliver_message)
        assert in_call.wait(100)
        assert "draining" in thread.state
        assert "deliver_message" in thread.state
        let_go.set()
        wait_for(thread, "running guest")
    assert thread.state == "ended"


def test_only_kicks_reach_the_thread() -> None:
    masks: list[set[int]] = []
    with running(FakeVcpu()) as thread:
        thread.call(lambda: masks.append(set(signal.pthread_sigmask(signal.SIG_BLOCK, ()))))
    assert {signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGALRM} <= masks[0]
    assert not {KICK_SIGNAL, signal.SIGSEGV, signal.SIGBUS} & masks[0]


def test_a_kick_runs_no_python_handler() -> None:
    assert signal.getsignal(KICK_SIGNAL) in (None, signal.SIG_DFL)


def test_one_group_stop_names_the_thread_that_is_stuck() -> None:
    in_handler, let_go = threading.Event(), threading.Event()
    with (
        running(FakeVcpu(KVM_EXIT_IO), {KVM_EXIT_IO: lambda _v: (in_handler.set(), let_go.wait())}) as stuck,
        running(FakeVcpu(index=1)) as fine,
    ):
        group = VcpuGroup([stuck, fine])
        assert in_handler.wait(100)
        with pytest.raises(TimeoutError, match="vcpu0 is handling KVM_EXIT_IO"):
            group.stop_all(0.05)
        assert fine.join(100)  # however long the host took for it: from now on only one is stuck
        with pytest.raises(TimeoutError, match="vcpu0 is handling KVM_EXIT_IO") as caught:
            group.stop_all(0.05)
        assert "vcpu1" not in str(caught.value)
        assert "vcpu1: ended" in group.describe()
        let_go.set()
        group.stop_all(20)


def test_a_pause_tells_once_when_the_vcpu_is_at_rest() -> None:
    with running(FakeVcpu()) as thread:
        told = threading.Event()
        thread.request_pause(told.set)
        assert told.wait(20)
        assert thread.state == "waiting paused"
        again: list[bool] = []
        thread.request_pause(lambda: again.append(thread.is_current()))
        assert again == [False], "at rest already: told right here"
        thread.resume()
        thread.resume()


def test_a_resume_that_comes_first_forgets_whom_to_tell() -> None:
    hold, held = threading.Event(), threading.Event()

    def busy() -> None:
        held.set()
        hold.wait(20)

    told: list[int] = []
    with running(FakeVcpu()) as thread:
        thread.submit(busy)
        assert held.wait(20)
        thread.request_pause(lambda: told.append(1))
        thread.resume()
        hold.set()
        thread.call(int)
        thread.request_pause()
        assert thread.wait_paused(20)
        thread.resume()
    assert not told


def test_a_thread_that_ends_tells_who_waits_for_its_rest() -> None:
    told, hold, held = threading.Event(), threading.Event(), threading.Event()
    with running(FakeVcpu()) as thread:
        thread.submit(lambda: (held.set(), hold.wait(20)))
        assert held.wait(20)
        thread.request_pause(told.set)
        thread.stop()
        hold.set()
        assert told.wait(20)


def test_a_group_tells_once_when_its_last_vcpu_is_at_rest() -> None:
    with running(FakeVcpu(index=0)) as first, running(FakeVcpu(index=1)) as second:
        group = VcpuGroup([first, second])
        for _ in range(50):
            told: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
            group.request_pause(lambda told=told: told.put([t.state for t in group.threads]))  # type: ignore[misc]
            assert told.get(timeout=20) == ["waiting paused"] * 2
            group.resume_all()
            assert told.empty()


def test_a_thread_that_the_host_refuses_is_named_and_leaves_no_call_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was submitted before, and whoever waits for a pause, hears that nothing will run."""
    told: list[str] = []
    thread = VcpuThread(FakeVcpu(), {}, on_fault=lambda _thread, error: told.append(repr(error)))  # type: ignore[arg-type]
    thread.submit(told.append, "ran", cancelled=lambda: told.append("cancelled"))

    def refused(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(HostExhausted, match="no thread for vcpu0: can't start new thread; end"):
        thread.start()
    assert told == ["cancelled"]
    with pytest.raises(Stopped):
        thread.submit(told.append, "too late")
    assert thread.wait_paused(0)
    assert thread.join(0)
    thread.stop()


def test_a_start_that_is_interrupted_leaves_a_thread_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes while the thread that runs already is waited for: it ran on, and no stop reached it."""
    vcpu = FakeVcpu()
    thread = VcpuThread(vcpu, {}, on_fault=lambda *_: None)  # type: ignore[arg-type]
    start = threading.Thread.start

    def interrupted(begun: threading.Thread) -> None:
        start(begun)
        while not vcpu.inside:
            threading.Event().wait(0.001)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        thread.start()
    thread.stop()
    assert thread.join(100), thread.state
    assert thread.state == "ended"
