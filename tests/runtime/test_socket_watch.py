"""SocketWatch: each thing asked for is told once, and nothing that was not asked for."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from hvkvm.runtime.io_loop import IoLoop
from hvkvm.runtime.socket_watch import HANG_UP, MAX_EVENTS, READ, WRITE, SocketWatch, Watched


class Loop:
    """Calls the reader when the test says so."""

    def __init__(self) -> None:
        self.callback: Callable[[], object] = lambda: None
        self.removed = 0
        self.timers: list[Callable[[], object]] = []

    def call_later(self, _seconds: float, fn: Callable[[], object]) -> Any:
        self.timers.append(fn)
        return SimpleNamespace(cancel=lambda: fn in self.timers and self.timers.remove(fn))

    def add_reader(self, _fd: int, callback: Callable[[], object]) -> Loop:
        self.callback = callback
        return self

    def remove(self) -> None:
        self.removed += 1


class Bench:
    def __init__(self) -> None:
        self.loop = Loop()
        self.watch = SocketWatch(self.loop)
        self.ours, self.theirs = socket.socketpair()
        self.told: list[int] = []
        self.watched = self.add(self.ours)

    def add(self, sock: socket.socket) -> Watched:
        return self.watch.add(sock.fileno(), self.told.append)

    def turn(self) -> list[int]:
        """What is told in one turn of the loop."""
        self.told.clear()
        self.loop.callback()
        return list(self.told)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.watch.close()
    made.ours.close()
    made.theirs.close()


def test_what_was_asked_for_is_told_once(bench: Bench) -> None:
    bench.theirs.send(b"x")
    assert bench.turn() == []
    bench.watched.arm(READ)
    [mask] = bench.turn()
    assert mask & READ
    assert bench.turn() == []
    bench.watched.arm(READ)
    assert len(bench.turn()) == 1


def test_what_was_asked_for_first_is_told_though_the_rest_is_not_so(bench: Bench) -> None:
    bench.ours.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            bench.ours.send(bytes(1 << 16))
    bench.watched.arm(READ)
    bench.watched.arm(WRITE)
    assert bench.turn() == []
    bench.theirs.send(b"x")
    [mask] = bench.turn()
    assert mask & READ
    assert not mask & WRITE


def test_a_socket_that_was_forgotten_may_be_watched_anew(bench: Bench) -> None:
    bench.watched.remove()
    again = bench.add(bench.ours)
    again.arm(WRITE)
    assert len(bench.turn()) == 1
    closed = socket.socketpair()[0]
    late = bench.add(closed)
    closed.close()
    late.remove()
    late.remove()


def test_asking_for_more_keeps_what_was_asked(bench: Bench) -> None:
    bench.watched.arm(READ)
    bench.watched.arm(WRITE)
    [mask] = bench.turn()
    assert mask & WRITE
    bench.theirs.send(b"x")
    assert bench.turn() == []  # both were told by one call


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.ENOBUFS])
def test_a_socket_of_a_host_without_memory_waits_for_time_and_not_for_room(bench: Bench, number: int) -> None:
    bench.theirs.send(b"x")
    for _ in range(3):
        bench.watched.arm_to_send(OSError(number, "no memory"))
        bench.watched.arm_to_send(OSError(number, "no memory"))
        assert bench.turn() == [], "it has room, and would be told of it at once for ever"
        bench.watched.arm(READ)
        [mask] = bench.turn()
        assert mask & READ, "what comes from the socket is told meanwhile"
        (timer,) = bench.loop.timers
        bench.loop.timers.clear()
        timer()
        [mask] = bench.turn()
        assert mask & WRITE
    for full in (None, BlockingIOError(errno.EAGAIN, "full")):
        bench.watched.arm_to_send(full)
        assert len(bench.turn()) == 1
    bench.watched.arm_to_send(OSError(number, "no memory"))
    bench.watched.remove()
    assert bench.loop.timers == []


def test_closing_waits_for_no_time_either(bench: Bench) -> None:
    bench.watched.arm_to_send(OSError(errno.ENOMEM, "no memory"))
    bench.watch.close()
    assert bench.loop.timers == []


def test_a_hang_up_is_told_unasked_and_once(bench: Bench) -> None:
    bench.theirs.close()
    [mask] = bench.turn()
    assert mask & HANG_UP
    assert bench.turn() == []


def test_a_half_close_is_readable(bench: Bench) -> None:
    bench.watched.arm(READ)
    assert bench.turn() == []
    bench.theirs.shutdown(socket.SHUT_WR)
    [mask] = bench.turn()
    assert mask & READ
    assert not mask & HANG_UP


def test_what_is_removed_is_told_nothing_not_even_in_this_turn(bench: Bench) -> None:
    pairs = [socket.socketpair() for _ in range(8)]
    watched: list[Watched] = []
    told: list[int] = []

    def first(fd: int) -> None:
        told.append(fd)
        for one in watched:
            one.remove()

    for ours, theirs in pairs:
        watched.append(bench.watch.add(ours.fileno(), first))
        theirs.send(b"x")
        watched[-1].arm(READ)
    bench.loop.callback()
    assert len(told) == 1
    bench.loop.callback()
    assert len(told) == 1
    for pair in pairs:
        for sock in pair:
            sock.close()


def test_closing_is_repeatable_and_removing_behind_it(bench: Bench) -> None:
    bench.watch.close()
    bench.watch.close()
    bench.watched.remove()
    assert bench.loop.removed == 1


def test_on_a_real_loop() -> None:
    loop = IoLoop()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.settimeout(100)
    loop.start()
    watch = SocketWatch(loop)

    def echo(_mask: int) -> None:
        ours.send(ours.recv(100))
        watched.arm(READ)

    watched = watch.add(ours.fileno(), echo)
    loop.call_soon(watched.arm, READ)
    for number in range(200):
        theirs.send(b"%d" % number)
        assert theirs.recv(100) == b"%d" % number
    loop.stop()
    watch.close()
    ours.close()
    theirs.close()


def test_a_turn_tells_of_so_many_and_one_that_raises_keeps_no_other_from_hearing() -> None:
    loop = Loop()
    watch = SocketWatch(loop)
    told: list[int] = []
    pairs = [socket.socketpair() for _ in range(3 * MAX_EVENTS)]

    def hear(number: int) -> None:
        told.append(number)
        if number % 2:
            raise KeyError(number)

    for number, (ours, theirs) in enumerate(pairs):
        watch.add(ours.fileno(), lambda _mask, number=number: hear(number)).arm(READ)
        theirs.send(b"x")
    for turn in range(1, 4):
        with pytest.raises(ExceptionGroup):
            loop.callback()
        assert len(told) == turn * MAX_EVENTS
    loop.callback()
    assert sorted(told) == list(range(len(pairs)))
    watch.close()
    for ours, theirs in pairs:
        ours.close()
        theirs.close()
