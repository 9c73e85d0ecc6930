"""Connections on the I/O loop: each is handed over once, and without fds the loop does not turn on them."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import pytest

from hvkvm.runtime import acceptor
from hvkvm.runtime.acceptor import Acceptor
from hvkvm.runtime.io_loop import IoLoop

SECONDS = 100


class Listener(socket.socket):
    """A listener that cannot accept as often as `failures` says."""

    failures = 0
    tries = 0

    def accept(self) -> tuple[socket.socket, object]:
        self.tries += 1
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


def aborted() -> tuple[socket.socket, object]:
    raise ConnectionAbortedError(errno.ECONNABORTED, os.strerror(errno.ECONNABORTED))


class ManualLoop:
    """A loop with one reader and its timers, which run when the test says so."""

    def __init__(self) -> None:
        self.read: Callable[[], object] | None = None
        self.full = False
        self.later: list[Callable[[], object]] = []

    def add_reader(self, fd: int, callback: Callable[[], object]) -> ManualLoop:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        assert self.read is None, "watched already"
        self.read = callback
        return self

    def remove(self) -> None:
        self.read = None

    def call_later(self, seconds: float, fn: Callable[..., object], *args: object) -> SimpleNamespace:
        entry = partial(fn, *args)
        self.later.append(entry)
        return SimpleNamespace(cancel=lambda: self.later.remove(entry) if entry in self.later else None)

    def run_later(self) -> None:
        taken, self.later = self.later, []
        for fn in taken:
            fn()


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener(socket.AF_UNIX) as one:
        one.bind(f"\0hvkvm-test-{os.getpid()}")
        one.listen()
        one.setblocking(False)
        yield one


@pytest.fixture
def loop() -> Iterator[IoLoop]:
    one = IoLoop()
    one.start()
    yield one
    one.stop()


def call(listener: Listener) -> socket.socket:
    caller = socket.socket(socket.AF_UNIX)
    caller.connect(listener.getsockname())
    return caller


def test_every_connection_is_handed_over_without_blocking(
    loop: IoLoop, listener: Listener, settle: Callable[[IoLoop], None]
) -> None:
    came: list[socket.socket] = []
    all_here = threading.Event()

    def accepted(sock: socket.socket) -> None:
        came.append(sock)
        if len(came) == 5:
            all_here.set()

    taker = Acceptor(loop, listener, accepted)
    callers = [call(listener) for _ in range(5)]
    assert all_here.wait(SECONDS)
    assert not any(sock.getblocking() for sock in came)
    taker.close()
    taker.close()
    with call(listener):
        settle(loop)  # else the loop may not have looked at it yet
        assert len(came) == 5
    for sock in came + callers:
        sock.close()


def test_without_fds_it_waits_and_those_who_call_wait_too(
    loop: IoLoop, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptor, "ACCEPT_PAUSE", 0.05)
    listener.failures = 3
    came: list[socket.socket] = []
    reasons: list[str] = []
    here = threading.Event()

    def accepted(sock: socket.socket) -> None:
        came.append(sock)
        here.set()

    taker = Acceptor(loop, listener, accepted, reasons.append)
    with call(listener):
        assert here.wait(SECONDS)
        assert reasons == [os.strerror(errno.EMFILE)] * 3
        assert listener.tries == 4
    taker.close()
    came[0].close()


def test_the_loop_does_not_turn_on_one_who_waits(
    loop: IoLoop, listener: Listener, monkeypatch: pytest.MonkeyPatch, settle: Callable[[IoLoop], None]
) -> None:
    monkeypatch.setattr(acceptor, "ACCEPT_PAUSE", 3600)
    listener.failures = 1000
    told = threading.Event()
    taker = Acceptor(loop, listener, lambda sock: sock.close(), lambda _reason: told.set())
    with call(listener):
        assert told.wait(SECONDS)
        for _ in range(5):
            settle(loop)
        assert listener.tries == 1
    taker.close()


def test_one_who_was_gone_again_is_nobodys_failure(listener: Listener) -> None:
    came: list[socket.socket] = []
    reasons: list[str] = []
    io = ManualLoop()
    taker = Acceptor(io, listener, came.append, reasons.append)
    assert io.read is not None
    io.read()  # nobody is there
    monkey = listener.accept
    listener.accept = aborted  # type: ignore[method-assign]
    io.read()
    listener.accept = monkey  # type: ignore[method-assign]
    with call(listener):
        io.read()
    assert (len(came), reasons, io.later) == (1, [], [])
    taker.close()
    assert io.read is None
    came[0].close()


def test_one_for_whom_something_is_missing_is_hung_up_on_and_the_next_is_served(listener: Listener) -> None:
    came: list[socket.socket] = []
    reasons: list[str] = []

    def accepted(sock: socket.socket) -> None:
        came.append(sock)
        if len(came) == 1:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    io = ManualLoop()
    taker = Acceptor(io, listener, accepted, reasons.append)
    with call(listener) as first, call(listener):
        assert io.read is not None
        io.read()
        assert (reasons, came[0].fileno()) == ([os.strerror(errno.ENOMEM)], -1)
        assert first.recv(1) == b""
        io.read()
        assert (len(came), len(reasons)) == (2, 1)
        came[1].close()
    taker.close()


def test_a_loop_that_cannot_watch_again_is_asked_once_more(listener: Listener) -> None:
    came: list[socket.socket] = []
    io = ManualLoop()
    listener.failures = 1
    taker = Acceptor(io, listener, came.append)
    assert io.read is not None
    with call(listener):
        io.read()
        assert io.read is None
        io.full = True
        io.run_later()
        assert (io.read, len(io.later)) == (None, 1)
        io.full = False
        io.run_later()
        assert io.read is not None
        io.read()
    assert (len(came), io.later) == (1, [])
    came[0].close()
    taker.close()


def test_a_pause_ends_with_the_acceptor(
    loop: IoLoop, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptor, "ACCEPT_PAUSE", 0.01)
    listener.failures = 1
    later = threading.Event()
    taker = Acceptor(loop, listener, lambda sock: sock.close(), lambda _reason: taker.close())
    with call(listener):
        loop.call_later(0.2, later.set)
        assert later.wait(SECONDS)
    assert listener.tries == 1
