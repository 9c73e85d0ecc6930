"""One submit against its consumer's loop, cut at each instruction, in every order: no wake-up is lost.

Stress finds a window of two instructions about never. So here the consumer is
stopped before its nth instruction, for every n; the submitter is stopped before its
mth, for every m; the consumer then goes on until it sleeps, the submitter after
it, and the item must still be run. No time is measured: a lost wake-up is an
item that does not run at all.
"""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import pytest

from hvkvm.abi.kvm import KVM_EXIT_INTR, KVM_EXIT_IO
from hvkvm.abi.kvm_structs import kvm_run
from hvkvm.errors import Stopped
from hvkvm.runtime.io_loop import IoLoop
from hvkvm.runtime.kick import KICK_SIGNAL, Kicker
from hvkvm.runtime.vcpu_thread import VcpuThread
from hvkvm.runtime.workqueue import WorkQueue

pytestmark = pytest.mark.usefixtures("no_leaks")

LOST = 10.0
_ppoll = ctypes.CDLL(None).ppoll


class Stop:
    """Stops the thread it watches before the nth instruction of the named functions, until `go_on`."""

    def __init__(self, n: int, names: set[str]) -> None:
        self.n = n
        self.names = names
        self.count = 0
        self.stopped_in: str | None = None
        self.traces = threading.Event()
        self.reached = threading.Event()
        self.go_on = threading.Event()

    def instruction(self, name: str) -> None:
        """The watched thread is about to execute one, of the function `name`."""
        if name not in self.names:
            return
        self.count += 1
        if self.count == self.n:
            self.stopped_in = name
            self.reached.set()
            assert self.go_on.wait(LOST)

    def trace(self, frame: FrameType, event: str, arg: object) -> Any:
        """For sys.settrace, before Python 3.12."""
        self.traces.set()
        code = frame.f_code
        if code.co_name not in self.names or "hvkvm/runtime" not in code.co_filename:
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        if event == "opcode":
            self.instruction(code.co_name)
        return self.trace


class Watch:
    """Who is stopped where, by sys.monitoring: from Python 3.13 on sys.settrace does not see each opcode.

    `stops` is by thread; one that is not in it, nor the test's own, is the consumer, which `newcomer` stops.
    """

    def __init__(self) -> None:
        self.test = threading.get_ident()
        self.stops: dict[int, Stop] = {}
        self.newcomer: Stop | None = None

    def instruction(self, code: CodeType, _offset: int) -> None:
        me = threading.get_ident()
        stop = self.stops.get(me)
        if stop is None and me != self.test and self.newcomer is not None:
            stop = self.stops[me] = self.newcomer
        if stop is not None:
            stop.instruction(code.co_name)


WATCHED = {"_loop", "_attend", "drain", "submit", "kick", "_round", "_seconds_to_wait", "call_soon", "_wake"}
HAS_MONITORING = hasattr(sys, "monitoring")


@pytest.fixture(autouse=True)
def watch() -> Iterator[Watch | None]:
    """The watch of this test; None where sys.settrace does it."""
    if not HAS_MONITORING:
        yield None
        return
    monitoring = sys.monitoring
    tool = next(number for number in range(6) if monitoring.get_tool(number) is None)
    codes = [
        function.__code__
        for owner in (VcpuThread, IoLoop, WorkQueue, Kicker)
        for name, function in vars(owner).items()
        if name in WATCHED
    ]
    made = Watch()
    monitoring.use_tool_id(tool, "interleavings")
    monitoring.register_callback(tool, monitoring.events.INSTRUCTION, made.instruction)
    for code in codes:
        monitoring.set_local_events(tool, code, monitoring.events.INSTRUCTION)
    try:
        yield made
    finally:
        for code in codes:
            monitoring.set_local_events(tool, code, 0)
        monitoring.register_callback(tool, monitoring.events.INSTRUCTION, None)
        monitoring.free_tool_id(tool)


@contextmanager
def watched_threads(watch: Watch | None, stop: Stop) -> Iterator[None]:
    """Threads started inside are stopped by `stop`."""
    if watch is not None:
        watch.stops.clear()
        watch.newcomer = stop
        yield
        return
    threading.settrace(stop.trace)
    try:
        yield
        # A thread is told to have started before it looks whether it is to be traced.
        assert stop.traces.wait(LOST)
    finally:
        threading.settrace(None)  # type: ignore[arg-type]


def in_watched_thread(watch: Watch | None, stop: Stop, function: Callable[[], object]) -> threading.Thread:
    """Start `function` in a thread; return when it is stopped or has ended."""

    def run() -> None:
        if watch is None:
            sys.settrace(stop.trace)
        else:
            watch.stops[threading.get_ident()] = stop
        try:
            function()
        finally:
            if watch is None:
                sys.settrace(None)
            else:
                del watch.stops[threading.get_ident()]
            stop.reached.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert stop.reached.wait(LOST)
    return thread


class SleepyVcpu:
    """Gives the scripted exits, then sleeps like a halted guest and says so, until the kick."""

    index = 0

    def __init__(self, *script: int) -> None:
        self.run = kvm_run()
        self.script = list(script)
        self.asleep = threading.Event()

    def enter(self) -> int:
        signal.pthread_sigmask(signal.SIG_BLOCK, {KICK_SIGNAL})
        try:
            if not self.run.immediate_exit:
                if self.script:
                    return self.script.pop(0)
                self.asleep.set()
                _ppoll(None, 0, None, (ctypes.c_ubyte * 128)(), 8)  # lets the signals in, like KVM_RUN
            return KVM_EXIT_INTR
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {KICK_SIGNAL})


class SleepyEpoll:
    """An epoll that says when it is about to wait."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.asleep = threading.Event()

    def poll(self, timeout: float | None, most: int) -> Any:
        if timeout != 0:
            self.asleep.set()
        return self.real.poll(timeout, most)

    def close(self) -> None:
        self.real.close()


def vcpu_consumer(
    watch: Watch | None,
    stop: Stop,
) -> tuple[VcpuThread, threading.Event, Callable[..., object], Callable[[], bool]]:
    """A vCPU thread that drains, handles an exit and an interruption, and then halts."""
    vcpu = SleepyVcpu(KVM_EXIT_IO, KVM_EXIT_INTR)

    def broken(_thread: object, error: BaseException) -> None:
        raise error

    thread = VcpuThread(vcpu, {KVM_EXIT_IO: lambda _vcpu: None}, on_fault=broken)  # type: ignore[arg-type]
    thread.submit(int)
    with watched_threads(watch, stop):
        thread.start()

    def end() -> bool:
        thread.stop()
        return thread.join(LOST)

    return thread, vcpu.asleep, thread.submit, end


def loop_consumer(
    watch: Watch | None, stop: Stop
) -> tuple[IoLoop, threading.Event, Callable[..., object], Callable[[], bool]]:
    """An I/O loop with one call to run, which then waits."""
    loop = IoLoop()
    epoll = SleepyEpoll(loop._epoll)
    loop._epoll = epoll  # type: ignore[assignment]
    loop.call_soon(int)
    with watched_threads(watch, stop):
        loop.start()

    def end() -> bool:
        loop.stop(LOST)
        return True

    return loop, epoll.asleep, loop.call_soon, end


ALWAYS_WHOLE = {"_seconds_to_wait"}
"""Not called where no timer waits."""

CONSUMERS: dict[str, tuple[Any, set[str], set[str]]] = {
    "vcpu": (vcpu_consumer, {"_loop", "_attend", "drain"}, {"submit", "kick"}),
    "loop": (
        loop_consumer,
        {"_round", "_seconds_to_wait", "drain"},
        {"submit", "call_soon", "_wake"},
    ),
}


def one_interleaving(watch: Watch | None, kind: str, n: int, m: int) -> tuple[str | None, str | None]:
    """Run one; where the consumer was stopped before it slept, and where the submitter; None for nowhere."""
    make, consumer_names, submitter_names = CONSUMERS[kind]
    consumer_stop, submitter_stop = Stop(n, consumer_names), Stop(m, submitter_names)
    consumer, asleep, submit, end = make(watch, consumer_stop)
    while not (consumer_stop.reached.wait(0.0005) or asleep.is_set()):
        pass
    done = threading.Event()
    submitter = in_watched_thread(watch, submitter_stop, lambda: submit(done.set))
    asleep.clear()
    at_n, at_m = consumer_stop.stopped_in, submitter_stop.stopped_in
    consumer_stop.go_on.set()
    if at_n and at_m:
        # Stopped inside the queue's lock the submitter lets nobody but itself go on; else until it sleeps.
        asleep.wait(LOST if not done.is_set() else 0)
    submitter_stop.go_on.set()
    submitter.join(LOST)
    assert done.wait(LOST), (
        f"lost: consumer before its instruction {n}, submitter before its {m}; {consumer.state}"
    )
    assert end()
    return at_n, at_m


@pytest.mark.parametrize("kind", CONSUMERS)
def test_no_interleaving_loses_a_wakeup(watch: Watch | None, kind: str) -> None:
    """The whole grid of the consumer's instructions, the submitter whole and cut at each instruction.

    How many there are is the interpreter's own business; that each function was cut is not.
    """
    cuts: set[str] = set()
    n, at_n = 0, ""
    while at_n is not None:
        n += 1
        m, at_m = 0, ""
        while at_m is not None:
            m += 7 if n % 11 else 1  # every cut of the submitter at every 11th place, some at all
            at_n, at_m = one_interleaving(watch, kind, n, m)
            if at_n is None:
                break
            cuts |= {at_n, at_m or at_n}
    assert cuts >= (CONSUMERS[kind][1] | CONSUMERS[kind][2]) - ALWAYS_WHOLE
    assert n > 20


def test_no_interleaving_of_submit_and_close_forgets_an_item(watch: Watch | None) -> None:
    """The submitter is cut at each instruction, the queue closed, and it goes on: cancelled or refused."""
    m, at_m = 0, ""
    outcomes = set()
    while at_m is not None:
        m += 1
        queue, stop = WorkQueue(), Stop(m, {"submit"})
        fate: list[str] = []

        def submit(queue: WorkQueue = queue, fate: list[str] = fate) -> None:
            try:
                queue.submit(fate.append, "ran", cancelled=lambda: fate.append("cancelled"))
            except Stopped:
                fate.append("refused")

        submitter = in_watched_thread(watch, stop, submit)
        at_m = stop.stopped_in
        closer = threading.Thread(target=queue.close)
        closer.start()
        closer.join(0.01)  # it may have to wait for the submitter's lock
        stop.go_on.set()
        submitter.join(LOST)
        closer.join(LOST)
        assert len(fate) == 1, f"at instruction {m}: {fate}"
        assert not queue.items
        outcomes |= set(fate)
    assert m > 10
    assert outcomes == {"cancelled", "refused"}
