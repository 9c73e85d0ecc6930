"""The I/O loop's rounds against a model, driven by hand: who runs in which round, in which order."""

from __future__ import annotations

from functools import partial

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hvkvm.kvm.irqfd import EventFd
from hvkvm.runtime.io_loop import MAX_TIMERS, Handle, IoLoop
from hvkvm.runtime.timers import Timer

FDS = st.integers(0, 3)


class Rounds(RuleBasedStateMachine):
    """Readers first, then the calls queued before, then the timers due by then, as many as a round takes."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[BaseException] = []
        self.loop = IoLoop(on_fault=self.faults.append)
        self.fds = [EventFd() for _ in range(4)]
        self.handles: dict[int, Handle] = {}
        self.signalled: set[int] = set()
        self.calls: list[tuple[int, str]] = []
        self.timers: dict[int, Timer] = {}
        self.number = 0
        self.log: list[tuple[str, int]] = []

    def ready(self, which: int) -> None:
        self.fds[which].drain()
        self.signalled.discard(which)
        self.log.append(("fd", which))

    def call(self, number: int, kind: str) -> None:
        self.log.append(("call", number))
        if kind == "again":
            self.add_call("plain")
        elif kind == "timer":
            self.add_timer()
        elif kind == "raise":
            raise KeyError(number)

    def timer(self, number: int) -> None:
        del self.timers[number]
        self.log.append(("timer", number))

    def add_call(self, kind: str) -> None:
        self.number += 1
        self.calls.append((self.number, kind))
        self.loop.call_soon(self.call, self.number, kind)

    def add_timer(self) -> None:
        self.number += 1
        self.timers[self.number] = self.loop.call_later(-1, self.timer, self.number)

    @rule(which=FDS)
    def signal(self, which: int) -> None:
        self.fds[which].signal()
        self.signalled.add(which)

    @rule(which=FDS)
    def watch_or_not(self, which: int) -> None:
        if which in self.handles:
            self.handles.pop(which).remove()
        else:
            self.handles[which] = self.loop.add_reader(self.fds[which].fd, partial(self.ready, which))

    @rule(kind=st.sampled_from(["plain", "again", "timer", "raise"]))
    def call_soon(self, kind: str) -> None:
        self.add_call(kind)

    @rule()
    def call_later(self) -> None:
        self.add_timer()

    @rule(pick=st.integers(0, 100))
    def cancel(self, pick: int) -> None:
        if self.timers:
            number = sorted(self.timers)[pick % len(self.timers)]
            self.timers.pop(number).cancel()

    @rule()
    def round(self) -> None:
        self.add_call("plain")  # so that the poll does not wait
        self.log.clear()
        fds = self.signalled & set(self.handles)
        calls, self.calls = self.calls, []
        failing = next((i for i, (_n, kind) in enumerate(calls) if kind == "raise"), len(calls) - 1)
        before = set(self.timers)
        self.loop._round()
        kinds = [kind for kind, _n in self.log]
        assert kinds == sorted(kinds, key=["fd", "call", "timer"].index)
        assert {n for kind, n in self.log if kind == "fd"} == fds
        assert [n for kind, n in self.log if kind == "call"] == [n for n, _kind in calls[: failing + 1]]
        ran_timers = [n for kind, n in self.log if kind == "timer"]
        assert ran_timers == sorted(before.union(self.timers, ran_timers))[:MAX_TIMERS]
        self.calls = calls[failing + 1 :] + self.calls

    @invariant()
    def only_the_raising_calls_are_faults(self) -> None:
        assert all(isinstance(fault, KeyError) for fault in self.faults)

    def teardown(self) -> None:
        self.loop.stop()
        for fd in self.fds:
            fd.close()


TestRounds = Rounds.TestCase
TestRounds.settings = settings(max_examples=60, deadline=None)
