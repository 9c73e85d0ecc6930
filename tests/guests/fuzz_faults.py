"""Host calls that fail when a fuzzer says so: EMFILE, ENOMEM, ENOSPC, EAGAIN in a guest's path.

`Faults` stands before the calls that the VMBus host and its devices make on behalf of a
guest. Armed, the next calls of a name fail with an errno; else everything goes through.
"""

from __future__ import annotations

import errno
import os
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from hvkvm.devices.synth import hvsock_host, vsock
from hvkvm.errors import RouteError
from hvkvm.runtime.socket_watch import SocketWatch
from hvkvm.testing.vmbus_loopback import LoopbackRoute, LoopbackSynic

ERRNOS = (errno.EMFILE, errno.ENOMEM, errno.ENOSPC, errno.EAGAIN, errno.ENOBUFS, errno.EIO)
NAMES = (
    "open_route",
    "add_event",
    "add_event raises",
    "post",
    "set_event_flag",
    "complete",
    "connect",
    "socketpair",
    "watch",
    "readv",
    "send",
)


class Faults:
    """Counts down: `arm(name, errno, times)`, then `trip(name)` is that errno so many times, else 0."""

    def __init__(self) -> None:
        self._armed: dict[str, tuple[int, int]] = {}
        self._stack = ExitStack()

    def arm(self, name: str, number: int, times: int) -> None:
        assert name in NAMES
        self._armed[name] = (number, times)

    def clear(self) -> None:
        self._armed.clear()

    def trip(self, name: str) -> int:
        number, times = self._armed.get(name, (0, 0))
        if times <= 0:
            return 0
        self._armed[name] = (number, times - 1)
        return number

    def check(self, name: str) -> None:
        if number := self.trip(name):
            raise OSError(number, os.strerror(number))

    def _patch(self, owner: Any, name: str, make: Any) -> None:
        self._stack.enter_context(mock.patch.object(owner, name, make(getattr(owner, name))))

    def install(self, synic: LoopbackSynic) -> None:
        """Stand before every call, until `close`."""

        def open_route(real: Any) -> Any:
            def call(*arguments: Any) -> LoopbackRoute:
                if number := self.trip("open_route"):
                    raise RouteError(os.strerror(number))
                route = real(*arguments)
                self._stand_before(route)
                return route  # type: ignore[no-any-return]

            return call

        def add_event(real: Any) -> Any:
            def call(*arguments: Any) -> int:
                self.check("add_event raises")
                return -self.trip("add_event") or real(*arguments)

            return call

        def checked(name: str) -> Any:
            def wrap(real: Any) -> Any:
                def call(*arguments: Any) -> Any:
                    self.check(name)
                    return real(*arguments)

                return call

            return wrap

        def connect(real: Any) -> Any:
            def call(path: Path, port: int) -> socket.socket | None:
                self.check("connect")
                found = real(path, port)
                return None if found is None else FaultySocket(self, found)

            return call

        self._patch(synic, "open_route", open_route)
        self._patch(synic, "add_event", add_event)
        self._patch(SocketWatch, "add", checked("watch"))
        self._patch(vsock, "connect", connect)
        self._stack.enter_context(mock.patch.object(vsock, "socket", _SocketModule(self)))
        self._stack.enter_context(mock.patch.object(hvsock_host, "os", _OsModule(self)))

    def _stand_before(self, route: LoopbackRoute) -> None:
        post, set_event_flag, on_complete = route.post, route.set_event_flag, route.on_complete
        route.post = lambda *a: -self.trip("post") or post(*a)  # type: ignore[method-assign]
        route.set_event_flag = (  # type: ignore[method-assign]
            lambda *a: -self.trip("set_event_flag") or set_event_flag(*a)
        )
        if on_complete is not None:
            # ENXIO says that the message is not there: not of one that was delivered.
            route.on_complete = lambda status: on_complete(
                status or (-errno.EIO if self.trip("complete") else 0)
            )

    def close(self) -> None:
        self._stack.close()


class FaultySocket(socket.socket):
    """A socket whose sends may fail."""

    def __init__(self, faults: Faults, taken: socket.socket) -> None:
        super().__init__(fileno=taken.detach())
        self._faults = faults

    def send(self, *arguments: Any) -> int:
        self._faults.check("send")
        return super().send(*arguments)

    def sendmsg(self, *arguments: Any) -> int:
        self._faults.check("send")
        return super().sendmsg(*arguments)


class _SocketModule:
    def __init__(self, faults: Faults) -> None:
        self._faults = faults

    def socketpair(self) -> tuple[socket.socket, socket.socket]:
        self._faults.check("socketpair")
        ours, theirs = socket.socketpair()
        return FaultySocket(self._faults, ours), theirs

    def __getattr__(self, name: str) -> Any:
        return getattr(socket, name)


class _OsModule:
    def __init__(self, faults: Faults) -> None:
        self._faults = faults

    def readv(self, fd: int, views: Any) -> int:
        self._faults.check("readv")
        return os.readv(fd, views)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)
