"""Connections of vsock between a host program and a played guest, made either way. For tests."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest

from hvkvm.testing.vsock_guest import GuestSocket
from hvkvm.testing.vsock_loopback import HostProgram, VsockLoopback

Make = Callable[..., VsockLoopback]


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def from_host(bench: VsockLoopback, port: int = 77) -> tuple[HostProgram, GuestSocket]:
    """A connection that a host program made and a guest's took."""
    bench.guest.listening.add(port)
    count = len(bench.guest.sockets)
    program = bench.caller(b"CONNECT %d\n" % port)
    bench.run(lambda: program.line is not None)
    return program, bench.guest.sockets[count]


def from_guest(bench: VsockLoopback, port: int = 99) -> tuple[HostProgram, GuestSocket]:
    """A connection that a guest's program made to a program of this process."""
    came: list[socket.socket] = []
    bench.vsock.listen(port, came.append)
    count = len(bench.guest.sockets)
    bench.guest.connect(port)
    bench.run(lambda: came)
    return bench.run_program(came[0]), bench.guest.sockets[count]


def ended(bench: VsockLoopback, program: HostProgram, guest: GuestSocket) -> None:
    """Both have read to the end, and the guest's kernel has given the channel back."""
    bench.run(lambda: program.at_end and guest.state == "gone")


def ended_in_time(bench: VsockLoopback, program: HostProgram, guest: GuestSocket, seconds: float) -> None:
    """`ended`, where what waits for its time gets it."""
    for _ in range(100):
        bench.run()
        if program.at_end and guest.state == "gone":
            return
        bench.io.advance(seconds)
    ended(bench, program, guest)


WAYS = {"from host": from_host, "from guest": from_guest}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


class Poor:
    """A socket of a host that has no memory for what is sent each other time, or `times` times at first."""

    def __init__(self, real: Any, times: int = 0) -> None:
        self.real = real
        self.times = times
        self.asked = 0

    def sendmsg(self, *args: Any) -> int:
        return self._send(self.real.sendmsg, *args)

    def send(self, *args: Any) -> int:
        return self._send(self.real.send, *args)

    def _send(self, send: Any, *args: Any) -> int:
        self.asked += 1
        if self.asked % 2 if not self.times else self.asked <= self.times:
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        return int(send(*args))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)
