"""The rotation: one turn pending, each member once in the line, a budget, errors that stop nobody else."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest

from hvkvm.runtime.rotation import Rotation


class Loop:
    """A loop that the test turns; `rounds` stands still unless it says so, and its first turn is taken."""

    def __init__(self) -> None:
        self.rounds = -1
        self.queue = deque[Callable[[], object]]()

    def call_soon(self, fn: Callable[[], object]) -> None:
        self.queue.append(fn)


class Worker:
    def __init__(self, name: str, log: list[str], work: int = 1) -> None:
        self.name = name
        self.log = log
        self.work = work
        self.then: Callable[[], object] = int

    def turn(self) -> int:
        self.log.append(self.name)
        self.then()
        return self.work


def test_members_take_turns_within_the_budget() -> None:
    loop, log = Loop(), list[str]()
    queue = loop.queue
    rotation = Rotation(loop, 3)
    workers = [Worker(name, log, work) for name, work in zip("abcd", (2, 2, 5, 1), strict=True)]
    for worker in (*workers, *workers):
        rotation.ask(worker)
    assert (len(queue), len(rotation)) == (1, 4)
    queue.popleft()()
    assert (log, len(queue)) == (["a", "b"], 1)
    rotation.ask(workers[0])
    rotation.forget(workers[3])
    rotation.forget(workers[3])
    queue.popleft()()
    assert (log, len(queue)) == (["a", "b", "c"], 1)
    queue.popleft()()
    assert (log, len(queue), len(rotation)) == (["a", "b", "c", "a"], 0, 0)


def test_who_asks_inside_its_turn_comes_behind_all_others() -> None:
    loop, log = Loop(), list[str]()
    queue = loop.queue
    rotation = Rotation(loop, 1)
    greedy, modest = Worker("g", log), Worker("m", log)
    greedy.then = lambda: rotation.ask(greedy)
    rotation.ask(greedy)
    rotation.ask(modest)
    for _ in range(4):
        queue.popleft()()
        assert len(queue) == 1
    assert log == ["g", "m", "g", "g"]


def test_who_raises_keeps_nobody_else_from_a_turn() -> None:
    loop, log = Loop(), list[str]()
    queue = loop.queue
    rotation = Rotation(loop, 10)
    broken, other = Worker("b", log), Worker("o", log)
    broken.then = lambda: 1 // 0
    rotation.ask(broken)
    rotation.ask(other)
    with pytest.raises(ZeroDivisionError):
        queue.popleft()()
    queue.popleft()()
    assert log == ["b", "o"]
    assert not queue


def test_the_first_of_a_round_has_its_turn_at_once_if_nobody_waits() -> None:
    loop, log = Loop(), list[str]()
    rotation = Rotation(loop, 10)
    first, second, third = (Worker(name, log) for name in "abc")
    loop.rounds = 1
    first.then = lambda: rotation.ask(first)  # comes behind, not inside
    rotation.ask(first)
    rotation.ask(second)
    assert (log, len(loop.queue), len(rotation)) == (["a"], 1, 2)
    loop.rounds = 2
    rotation.ask(third)
    assert log == ["a"], "others wait"
    first.then = int
    loop.queue.popleft()()
    assert (log, len(loop.queue)) == (["a", "a", "b", "c"], 0)
    rotation.ask(second)
    assert log[-1] == "b"
    assert not loop.queue
