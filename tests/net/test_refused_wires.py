"""Wires on a host that refuses an fd or memory at any call: it is tried again, and no frame is lost."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
from time import monotonic, sleep

import pytest
from host_failures import ERRNOS, HostFailures

from hvkvm.errors import HostExhausted
from hvkvm.events import NULL_OBSERVER
from hvkvm.net.stream import StreamPort
from hvkvm.net.stream_peer import Answerer, Caller
from hvkvm.net.tap import TapPort
from hvkvm.net.tap_open import Tap
from hvkvm.net.user import UserPort, start_user
from hvkvm.runtime import acceptor, retry
from tests.net.conftest import SECONDS, Loop, Nic, views


@pytest.fixture
def failures(monkeypatch):
    monkeypatch.setattr(retry, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(acceptor, "ACCEPT_PAUSE", 0.01)
    return HostFailures(monkeypatch)


@pytest.fixture
def loop(failures):
    """As the others have it, but its epoll fails when it is to."""
    loop = Loop()
    loop.start()
    yield loop
    loop.stop()
    assert loop.faults == []


def attach(loop, port):
    """A NIC at `port`, which is started."""
    nic = Nic(loop)
    port.attach(nic)
    loop.call_soon(port.start)
    return nic


def fill(loop, port, far, there, words=350):
    """Send over `port` until it takes no more, for `there` takes nothing; then all that was sent arrives."""
    here = port._receiver
    there.room = 0
    already, sent, waits = len(there.got), [], here.writables
    taken = frames = 1
    while taken == frames:
        batch = [len(sent).to_bytes(4, "big") * words] * 8
        frames, taken = len(batch), loop.do(port.send, views(*batch))
        sent += batch[:taken]
    there.room = None
    loop.do(far.resume)
    here.wait(lambda nic: nic.writables > waits, "room")
    there.wait(lambda nic: nic.got[already:] == sent, "every frame")


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def each_call(failures, life):
    """Run `life(arm)` once for each call that it makes of the host, with that call refused; which they were.

    `arm()` says from where on they count.
    """
    seen = set()
    before = descriptors()
    at = 0
    while at == 0 or failures.failed is not None:
        at += 1
        life(lambda at=at: failures.fail(at, ERRNOS[at % len(ERRNOS)]))
        assert descriptors() == before, failures.failed
        if failures.failed is not None:
            seen.add(failures.failed.partition(":")[0])
    return seen


def test_two_ends_of_a_stream_find_one_another_again(loop, failures, tmp_path):
    path = tmp_path / "wire"

    def life(arm):
        a, b = StreamPort(loop, 1500), StreamPort(loop, 1500)
        theirs, ours = attach(loop, b), attach(loop, a)

        def meet():
            Answerer(loop, b, path)
            Caller(loop, a, path)
            arm()

        def linked(up):
            for nic in (ours, theirs):
                nic.wait(lambda nic: nic.links[-1:] == [up], f"a link that is {up}")

        loop.do(meet)
        linked(True)
        fill(loop, a, b, theirs)
        fill(loop, b, a, ours)
        ups = [nic.links.count(True) for nic in (ours, theirs)]
        loop.do(lambda: a._sock.shutdown(socket.SHUT_RDWR))
        for nic, up in zip((ours, theirs), ups, strict=True):
            nic.wait(lambda nic, up=up: nic.links.count(True) > up, "another peer")
        fill(loop, a, b, theirs)
        loop.do(a.close)
        loop.do(b.close)

    assert each_call(failures, life) == {"socket", "epoll_create", "epoll_ctl"}


class Poor:
    """A socket of a host that has no memory for the next call of each of `refused`."""

    def __init__(self, real):
        self.real = real
        self.refused = {}

    def sendmsg(self, *args):
        return self._send("sendmsg", *args)

    def send(self, *args):
        return self._send("send", *args)

    def _send(self, name, *args):
        number = self.refused.pop(name, 0)
        if number:
            raise OSError(number, os.strerror(number))
        return getattr(self.real, name)(*args)

    def __getattr__(self, name):
        return getattr(self.real, name)


@pytest.mark.parametrize("call", ["sendmsg", "send"])
@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.ENOMEM])
def test_a_stream_outlasts_a_host_without_memory_for_what_is_sent(loop, failures, call, number):
    """Its peer is there, and no frame is lost, torn or doubled."""
    sockets = socket.socketpair()
    ports = [StreamPort(loop, 1500) for _ in sockets]
    nics = [attach(loop, port) for port in ports]
    lost, poor = [], Poor(sockets[0])
    for port, sock in zip(ports, (poor, sockets[1]), strict=True):
        sock.setblocking(False)
        port.lost = lost.append
        loop.do(port.connected, sock)
    poor.refused[call] = number
    for _ in range(2):
        fill(loop, *ports, nics[1], words=15000)  # so large that the last one goes in part
    assert not poor.refused
    assert not lost
    assert ports[0].statistics.sent_dropped == 0
    for port in ports:
        loop.do(port.close)


def test_a_tap_of_two_queues_carries_what_it_would(loop, failures):
    """Each queue is a socket of datagrams, which is read, written and full as a tap's is."""

    def life(arm):
        queues = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) for _ in "12"]
        ends = [
            TapPort(loop, Tap(fds[0], "test", 1500, vnet_header=True, more=(fds[1],)))
            for fds in zip(*[[sock.detach() for sock in pair] for pair in queues], strict=True)
        ]
        loop.do(arm)
        nics = [attach(loop, end) for end in ends]
        fill(loop, *ends, nics[1])
        fill(loop, *reversed(ends), nics[0])
        for end in ends:
            loop.do(end.close)

    assert each_call(failures, life) == {"epoll_create", "epoll_ctl"}


def test_what_passt_says_is_heard(loop, failures):
    def life(arm):
        ours, theirs = socket.socketpair()

        def begin():
            process = subprocess.Popen(["sh", "-c", "echo words >&2; read x"], stdin=-1, stderr=-1)
            arm()
            return UserPort(loop, process, ours, 1500, NULL_OBSERVER)

        port = loop.do(begin)
        attach(loop, port)
        end = monotonic() + SECONDS
        while port._said != b"words\n" or not port._reading:
            assert monotonic() < end, failures.failed
            sleep(0.001)
        loop.do(port.close)  # while the process lives: who has ended needs no thread that waits for that
        port.process.stdin.close()
        port.process.wait()
        theirs.close()

    assert each_call(failures, life) == {"epoll_ctl", "thread passt-end"}


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EAGAIN, errno.ENOMEM])
def test_a_host_that_starts_no_passt_now_is_told_of_as_that(loop, monkeypatch, number):
    """Whoever installs it anew gains nothing."""

    def refuse(*_arguments, **_more):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(HostExhausted, match=rf"^--net user: passt: {os.strerror(number)}; "):
        start_user(loop)
