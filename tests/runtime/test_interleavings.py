"""One submit against its consumer's loop, every interleaving forced opcode by opcode: no wake-up is lost.

Stress finds a window of two opcodes about never. So here the consumer is
stopped before its nth opcode, for every n; the submitter is stopped before its
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
from types import FrameType
from typing import Any

import pytest

from hvkvm.abi.kvm import KVM_EXIT_INTR, KVM_EXIT_IO
from hvkvm.abi.kvm_structs import kvm_run
from hvkvm.errors import Stopped
from hvkvm.runtime.io_loop import IoLoop
from hvkvm.runtime.kick import KICK_SIGNAL
from hvkvm.runtime.vcpu_thread import VcpuThread
from hvkvm.runtime.workqueue import WorkQueue

pytestmark = pytest.mark.usefixtures("no_leaks")

LOST = 10.0
_ppoll = ctypes.CDLL(None).ppoll


class Stop:
    """Stops the thread it traces before the nth opcode of the named functions, until `go_on`."""

    def __init__(self, n: int, names: set[str]) -> None:
        self.n = n
        self.names = names
        self.count = 0
        self.reached = threading.Event()
        self.go_on = threading.Event()

    def trace(self, frame: FrameType, event: str, arg: object) -> Any:
        code = frame.f_code
        if code.co_name not in self.names or "hvkvm/runtime" not in code.co_filename:
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        if event == "opcode":
            self.count += 1
            if self.count == self.n:
                self.reached.set()
                assert self.go_on.wait(LOST)
        return self.trace


@contextmanager
def traced_threads(stop: Stop) -> Iterator[None]:
    """Threads started inside are traced."""
    threading.settrace(stop.trace)
    try:
        yield
    finally:
        threading.settrace(None)  # type: ignore[arg-type]


def in_traced_thread(stop: Stop, function: Callable[[], object]) -> threading.Thread:
    """Start `function` in a thread; return when it is stopped or has ended."""

    def run() -> None:
        sys.settrace(stop.trace)
        try:
            function()
        finally:
            sys.settrace(None)
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
    stop: Stop,
) -> tuple[VcpuThread, threading.Event, Callable[..., object], Callable[[], bool]]:
    """A vCPU thread that drains, handles an exit and an interruption, and then halts."""
    vcpu = SleepyVcpu(KVM_EXIT_IO, KVM_EXIT_INTR)

    def broken(_thread: object, error: BaseException) -> None:
        raise error

    thread = VcpuThread(vcpu, {KVM_EXIT_IO: lambda _vcpu: None}, on_fault=broken)  # type: ignore[arg-type]
    thread.submit(int)
    with traced_threads(stop):
        thread.start()

    def end() -> bool:
        thread.stop()
        return thread.join(LOST)

    return thread, vcpu.asleep, thread.submit, end


def loop_consumer(stop: Stop) -> tuple[IoLoop, threading.Event, Callable[..., object], Callable[[], bool]]:
    """An I/O loop with one call to run, which then waits."""
    loop = IoLoop()
    epoll = SleepyEpoll(loop._epoll)
    loop._epoll = epoll  # type: ignore[assignment]
    loop.call_soon(int)
    with traced_threads(stop):
        loop.start()

    def end() -> bool:
        loop.stop(LOST)
        return True

    return loop, epoll.asleep, loop.call_soon, end


CONSUMERS = {
    "vcpu": (vcpu_consumer, {"_loop", "_attend", "drain"}, {"submit", "kick"}),
    "loop": (
        loop_consumer,
        {"_round", "_seconds_to_wait", "drain"},
        {"submit", "call_soon", "_wake"},
    ),
}


def one_interleaving(kind: str, n: int, m: int) -> tuple[bool, bool]:
    """Run one; whether the consumer had an nth opcode before it slept, and the submitter an mth."""
    make, consumer_names, submitter_names = CONSUMERS[kind]
    consumer_stop, submitter_stop = Stop(n, consumer_names), Stop(m, submitter_names)
    consumer, asleep, submit, end = make(consumer_stop)
    while not (consumer_stop.reached.wait(0.0005) or asleep.is_set()):
        pass
    done = threading.Event()
    submitter = in_traced_thread(submitter_stop, lambda: submit(done.set))
    asleep.clear()
    had_n, had_m = consumer_stop.count >= n, submitter_stop.count >= m
    consumer_stop.go_on.set()
    if had_n and had_m:
        # Stopped inside the queue's lock the submitter lets nobody but itself go on; else until it sleeps.
        asleep.wait(LOST if not done.is_set() else 0)
    submitter_stop.go_on.set()
    submitter.join(LOST)
    assert done.wait(LOST), (
        f"lost: consumer before its opcode {n}, submitter before its {m}; {consumer.state}"
    )
    assert end()
    return had_n, had_m


@pytest.mark.parametrize("kind", CONSUMERS)
def test_no_interleaving_loses_a_wakeup(kind: str) -> None:
    """The whole grid of the consumer's opcodes, with the submitter whole and with it cut at each opcode."""
    combinations = 0
    n, had_n = 0, True
    while had_n:
        n += 1
        m, had_m = 0, True
        while had_m:
            m += 7 if n % 11 else 1  # every cut of the submitter at every 11th place, some at all
            had_n, had_m = one_interleaving(kind, n, m)
            combinations += 1
            if not had_n:
                break
    assert n > 40
    assert combinations > 300


def test_no_interleaving_of_submit_and_close_forgets_an_item() -> None:
    """The submitter is cut at each opcode, the queue closed, the submitter goes on: cancelled or refused."""
    m, had_m = 0, True
    outcomes = set()
    while had_m:
        m += 1
        queue, stop = WorkQueue(), Stop(m, {"submit"})
        fate: list[str] = []

        def submit(queue: WorkQueue = queue, fate: list[str] = fate) -> None:
            try:
                queue.submit(fate.append, "ran", cancelled=lambda: fate.append("cancelled"))
            except Stopped:
                fate.append("refused")

        submitter = in_traced_thread(stop, submit)
        had_m = stop.count >= m
        closer = threading.Thread(target=queue.close)
        closer.start()
        closer.join(0.01)  # it may have to wait for the submitter's lock
        stop.go_on.set()
        submitter.join(LOST)
        closer.join(LOST)
        assert len(fate) == 1, f"at opcode {m}: {fate}"
        assert not queue.items
        outcomes |= set(fate)
    assert m > 15
    assert outcomes == {"cancelled", "refused"}
