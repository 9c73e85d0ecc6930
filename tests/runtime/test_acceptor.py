"""Connections on the I/O loop: each is handed over once, and without fds the loop does not turn on them."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator

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
