"""Alarms share one timerfd: all go off, some a turn, the longest due first; threads lose none."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterator

import pytest

from hvkvm.errors import Stopped
from hvkvm.hyperv.usermode.alarm import MAX_ALARMS, Alarm, Alarms
from hvkvm.runtime.io_loop import IoLoop

MANY = 4 * 254
HOUR = 3600 * 10**9


class OneReader:
    """A loop that runs its one reader when the test says so; it is its handle, too."""

    watching = False

    def add_reader(self, fd: int, callback: Callable[[], object]) -> OneReader:
        self.fd = fd
        self.callback = callback
        self.watching = True
        return self

    def remove(self) -> None:
        if self.watching:
            os.fstat(self.fd)  # open still: its number may be another file's afterwards
        self.watching = False

    def rings(self, seconds: float = 0) -> bool:
        """Whether the timerfd went off; if so its turn is run."""
        if not select.select([self.fd], [], [], seconds)[0]:
            return False
        self.callback()
        return True


@pytest.fixture
def io() -> OneReader:
    return OneReader()


@pytest.fixture
def alarms(io: OneReader) -> Iterator[Alarms]:
    alarms = Alarms(io)
    yield alarms
    alarms.close()
    assert not io.watching
    alarms.close()


def test_a_loop_that_has_ended_leaves_nothing_open() -> None:
    class Ended(OneReader):
        def add_reader(self, fd: int, callback: Callable[[], object]) -> OneReader:
            self.fd = fd
            raise Stopped("the loop has ended")

    io = Ended()
    with pytest.raises(Stopped):
        Alarms(io)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(io.fd)


def test_a_turn_runs_so_many_and_those_first_that_were_due_first(io: OneReader, alarms: Alarms) -> None:
    heard: list[int] = []
    for number in range(MANY):
        alarms.make(lambda number=number: heard.append(number)).arm(0)
    turns = 0
    while len(heard) < MANY:
        before = len(heard)
        assert io.rings(20)
        turns += 1
        assert len(heard) - before <= MAX_ALARMS
    assert heard == list(range(MANY))
    assert turns >= MANY / MAX_ALARMS
    assert not io.rings()


def test_an_alarm_that_is_always_due_comes_behind_the_others(io: OneReader, alarms: Alarms) -> None:
    heard: list[int] = []
    made: list[Alarm] = []

    def again(number: int) -> None:
        heard.append(number)
        made[number].arm(0)

    for number in range(3 * MAX_ALARMS):
        made.append(alarms.make(lambda number=number: again(number)))
        made[-1].arm(0)
    while len(heard) < 4 * len(made):
        assert io.rings(20)
    for turn in range(4):
        assert sorted(heard[turn * len(made) : (turn + 1) * len(made)]) == list(range(len(made)))


def test_the_last_setting_counts(io: OneReader, alarms: Alarms) -> None:
    heard: list[str] = []
    first, second, third = (alarms.make(lambda name=name: heard.append(name)) for name in "abc")
    first.arm(0)
    first.arm(HOUR)
    second.arm(HOUR)
    second.arm(0)
    third.arm(0)
    third.disarm()
    while not heard:
        assert io.rings(20)
    while io.rings():
        pass
    assert heard == ["b"]
    first.arm(1000)
    while len(heard) < 2:
        assert io.rings(20)
    assert heard == ["b", "a"]
    second.close()


def test_alarms_take_no_file_descriptors_and_leave_nothing_behind(io: OneReader, alarms: Alarms) -> None:
    before = len(os.listdir("/proc/self/fd"))
    many = [alarms.make(int) for _ in range(MANY)]
    for _ in range(10):
        for alarm in many:
            alarm.arm(HOUR)
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(alarms._heap) <= 3 * MANY
    for alarm in many:
        alarm.close()
    assert len(alarms._heap) <= 100


def test_a_callback_that_raises_keeps_no_other_alarm_from_going_off(io: OneReader, alarms: Alarms) -> None:
    heard: list[int] = []
    for number in range(3):
        alarms.make(lambda: 1 // 0).arm(0)
        alarms.make(lambda number=number: heard.append(number)).arm(0)
    alarms.make(lambda: heard.append(3)).arm(1000)
    with pytest.raises(ExceptionGroup):
        io.rings(20)
    while len(heard) < 4:
        assert io.rings(20)
    assert heard == [0, 1, 2, 3]


def test_no_alarm_is_lost_among_threads(tiny_switch_interval: None) -> None:
    loop = IoLoop()
    loop.start()
    alarms = Alarms(loop)
    lost: list[str] = []

    def vp() -> None:
        heard = threading.Semaphore(0)
        alarm, other = alarms.make(lambda: (heard.release(), None)[1]), alarms.make(lambda: None)
        for round_ in range(300):
            other.arm(HOUR if round_ % 3 else 1000)
            alarm.arm(round_ % 7 * 1000)
            if not heard.acquire(timeout=20):
                lost.append(loop.state)
                return
            other.disarm()

    threads = [threading.Thread(target=vp) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alarms.close()
    loop.stop()
    assert lost == []
