"""The work queue's promise: FIFO, bounded passes, run or cancelled or refused, also when closing races."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from hvkvm.errors import Stopped
from hvkvm.runtime.workqueue import WorkQueue


def test_runs_in_order_with_arguments() -> None:
    queue, seen = WorkQueue(), list[int]()
    for i in range(100):
        queue.submit(seen.append, i)
    assert queue.drain() == 100
    assert seen == list(range(100))
    assert queue.drain() == 0


def test_a_pass_runs_what_was_queued_when_it_began() -> None:
    queue, runs = WorkQueue(), list[int]()

    def again() -> None:
        runs.append(1)
        queue.submit(again)

    queue.submit(again)
    for passes in range(1, 5):
        assert queue.drain() == 1
        assert len(runs) == passes


def test_an_error_leaves_the_rest_queued() -> None:
    queue, seen = WorkQueue(), list[str]()
    queue.submit(seen.append, "before")
    queue.submit(lambda: 1 // 0)
    queue.submit(seen.append, "after")
    with pytest.raises(ZeroDivisionError):
        queue.drain()
    assert queue.running is None
    assert seen == ["before"]
    queue.drain()
    assert seen == ["before", "after"]


def test_names_what_it_runs() -> None:
    queue, names = WorkQueue(), list[object]()
    queue.submit(lambda: names.append(queue.running))
    queue.drain()
    assert "lambda" in getattr(names[0], "__qualname__", "")
    assert queue.running is None


def test_s31_closing_reports_the_rest_in_order() -> None:
    queue, seen = WorkQueue("vcpu7"), list[str]()
    queue.submit(seen.append, "ran")
    queue.drain()
    for name in ("a", "b"):
        queue.submit(seen.append, "never", cancelled=lambda name=name: seen.append(f"cancelled {name}"))
    queue.submit(seen.append, "never")
    assert queue.close() == 3
    assert queue.close() == 0
    assert queue.closed
    assert seen == ["ran", "cancelled a", "cancelled b"]
    with pytest.raises(Stopped, match="vcpu7"):
        queue.submit(seen.append, "late")
    assert queue.drain() == 0


def test_every_cancellation_is_reported_even_if_some_raise() -> None:
    queue, seen = WorkQueue(), list[int]()
    queue.submit(print, cancelled=lambda: 1 // 0)
    queue.submit(print, cancelled=lambda: seen.append(1))
    queue.submit(print, cancelled=[].pop)
    with pytest.raises(ExceptionGroup) as caught:
        queue.close()
    assert [type(error) for error in caught.value.exceptions] == [ZeroDivisionError, IndexError]
    assert seen == [1]


def test_an_item_may_close_its_own_queue() -> None:
    queue, seen = WorkQueue(), list[str]()
    queue.submit(queue.close)
    queue.submit(seen.append, "ran", cancelled=lambda: seen.append("cancelled"))
    queue.drain()
    assert seen == ["cancelled"]


def test_a_cancellation_may_submit_and_is_refused() -> None:
    queue, refused = WorkQueue(), list[bool]()

    def resubmit() -> None:
        with pytest.raises(Stopped):
            queue.submit(print)
        refused.append(True)

    queue.submit(print, cancelled=resubmit)
    queue.close()
    assert refused == [True]


class Queue(RuleBasedStateMachine):
    """Against a plain list, with items that submit more or raise."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = WorkQueue()
        self.waiting: list[tuple[int, str]] = []
        self.ran: list[int] = []
        self.cancelled: list[int] = []
        self.next = 0

    def act(self, number: int, kind: str) -> None:
        self.ran.append(number)
        if kind == "submits":
            self.add("plain")
        elif kind == "raises":
            raise KeyError(number)

    def add(self, kind: str) -> None:
        number = self.next
        self.next += 1
        self.waiting.append((number, kind))
        self.queue.submit(self.act, number, kind, cancelled=lambda: self.cancelled.append(number))

    @rule(kind=st.sampled_from(["plain", "submits", "raises"]))
    def submit(self, kind: str) -> None:
        if self.queue.closed:
            with pytest.raises(Stopped):
                self.queue.submit(print)
        else:
            self.add(kind)

    @rule()
    def drain(self) -> None:
        before, self.ran = list(self.waiting), []
        failing = next((i for i, (_n, kind) in enumerate(before) if kind == "raises"), None)
        expected = before if failing is None else before[: failing + 1]
        if failing is None:
            assert self.queue.drain() == len(before)
        else:
            with pytest.raises(KeyError):
                self.queue.drain()
        assert self.ran == [number for number, _kind in expected]
        del self.waiting[: len(expected)]
        assert len(self.queue.items) == len(self.waiting)

    @rule()
    def close(self) -> None:
        self.cancelled = []
        assert self.queue.close() == len(self.waiting)
        assert self.cancelled == [number for number, _kind in self.waiting]
        self.waiting.clear()


TestQueue = Queue.TestCase
TestQueue.settings = settings(max_examples=100, deadline=None)


@pytest.mark.usefixtures("tiny_switch_interval")
@pytest.mark.parametrize("closes_while_draining", [False, True])
def test_nothing_is_forgotten_when_closing_races(
    in_threads: Callable[..., None], closes_while_draining: bool
) -> None:
    for _ in range(30):
        race_closing(in_threads, closes_while_draining)


def race_closing(in_threads: Callable[..., None], closes_while_draining: bool) -> None:
    """Four submitters, a consumer, a close in the middle: each accepted item is run or cancelled, once."""
    queue, begun = WorkQueue(), threading.Event()
    accepted: list[tuple[int, int]] = []
    ran: list[tuple[int, int]] = []
    cancelled: list[tuple[int, int]] = []

    def submit_many(who: int) -> None:
        for item in ((who, i) for i in range(300)):
            try:
                queue.submit(ran.append, item, cancelled=partial(cancelled.append, item))
            except Stopped:
                return
            accepted.append(item)
            if item[1] == 50:
                begun.set()

    def consume() -> None:
        begun.wait()
        while not queue.closed:
            queue.drain()
            if not closes_while_draining and len(ran) > 100:
                queue.close()

    def close() -> None:
        begun.wait()
        queue.close()

    submitters = [partial(submit_many, who) for who in range(4)]
    in_threads(*submitters, consume, *([close] if closes_while_draining else []))
    assert Counter(ran + cancelled) == Counter(accepted)
    for who in range(4):
        mine = [i for w, i in ran if w == who]
        assert mine == sorted(mine), "not FIFO"
