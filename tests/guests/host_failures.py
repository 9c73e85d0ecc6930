"""Makes the nth thing that hvkvm asks of its host fail: an ioctl, a system call, a thread.

Only calls made by hvkvm's own code count. One that fails has done nothing.
"""

from __future__ import annotations

import _socket
import ctypes
import errno
import mmap
import os
import select
import socket
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from hvkvm.errors import KvmIoctlError
from hvkvm.kvm import ioctl as door
from hvkvm.kvm import vcpu as vcpu_module
from hvkvm.memory import mapping
from hvkvm.net import stream_peer
from hvkvm.runtime import timerfd, unix_listener

ERRNOS = (errno.EMFILE, errno.ENOMEM, errno.ENOSPC, errno.EAGAIN)

_NEVER_FAIL = ("KVM_CHECK_EXTENSION", "KVM_GET_API_VERSION", "KVM_GET_VCPU_MMAP_SIZE")


class HostFailures:
    """Installed for the length of `patched`; `fail(n, number)` arms it, `fail(0, 0)` only counts."""

    def __init__(self, patched: pytest.MonkeyPatch) -> None:
        self._lock = threading.Lock()
        self._at = self._errno = 0
        self.count = 0
        self.failed: str | None = None
        """What failed, and with what."""
        real_ioctl = door.ioctl

        def ioctl(fd: int, request: Any, arg: Any = 0, detail: str = "") -> int:
            # Not what a test asks of KVM in a guest's place: the method, and who called it.
            ours = "/hvkvm/" in sys._getframe(2).f_code.co_filename
            if ours and request.name not in _NEVER_FAIL and (number := self._due(request.name)):
                raise KvmIoctlError(number, request.name, request.scope, detail)
            return real_ioctl(fd, request, arg, detail)

        patched.setattr(door, "ioctl", ioctl)
        for name in ("eventfd", "memfd_create", "ftruncate"):
            patched.setattr(os, name, self._raising(name, getattr(os, name)))
        patched.setattr(mapping, "_mmap", self._raising("mmap", mapping._mmap))
        patched.setattr(
            vcpu_module, "mmap", SimpleNamespace(mmap=self._raising("mmap of a vCPU", mmap.mmap, "vcpu.py"))
        )
        for name in ("_create", "_settime"):
            patched.setattr(timerfd, name, self._returning(f"timerfd{name}", getattr(timerfd, name)))
        patched.setattr(select, "epoll", self._epoll_class())
        listening = SimpleNamespace(**vars(_socket))
        listening.socket = self._socket_class(_socket.socket)
        patched.setattr(unix_listener, "_socket", listening)
        calling = SimpleNamespace(**vars(socket))
        calling.socket = self._socket_class(socket.socket)
        patched.setattr(stream_peer, "socket", calling)
        patched.setattr(socket, "socketpair", self._raising("socketpair", socket.socketpair))
        patched.setattr(threading.Thread, "start", self._thread_start())

    def fail(self, at: int, number: int) -> None:
        """Fail the call number `at` from now on, with errno `number`."""
        with self._lock:
            self._at, self._errno, self.count, self.failed = at, number, 0, None

    def _due(self, name: str) -> int:
        """The errno with which this call fails; 0 if it does not."""
        with self._lock:
            self.count += 1
            if self.count != self._at:
                return 0
            self.failed = f"{name}: {errno.errorcode[self._errno]}"
            return self._errno

    def _raising(self, name: str, real: Callable[..., Any], where: str = "/hvkvm/") -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if where in sys._getframe(1).f_code.co_filename and (number := self._due(name)):
                raise OSError(number, os.strerror(number))
            return real(*arguments, **options)

        return wrapped

    def _returning(self, name: str, real: Callable[..., int]) -> Callable[..., int]:
        def wrapped(*arguments: Any) -> int:
            if number := self._due(name):
                ctypes.set_errno(number)
                return -1
            return real(*arguments)

        return wrapped

    def _thread_start(self) -> Callable[[threading.Thread], None]:
        real = threading.Thread.start

        def start(thread: threading.Thread) -> None:
            if "/hvkvm/" in sys._getframe(1).f_code.co_filename and self._due(f"thread {thread.name}"):
                raise RuntimeError("can't start new thread")
            real(thread)

        return start

    def _epoll_class(self) -> Callable[[], Any]:
        due, real = self._due, select.epoll

        class Epoll:
            def __init__(self) -> None:
                if number := due("epoll_create"):
                    raise OSError(number, os.strerror(number))
                self._real = real()
                for name in ("poll", "modify", "unregister", "close", "fileno"):
                    setattr(self, name, getattr(self._real, name))

            def register(self, fd: int, events: int) -> None:
                if number := due("epoll_ctl"):
                    raise OSError(number, os.strerror(number))
                self._real.register(fd, events)

            @property
            def closed(self) -> bool:
                return self._real.closed

        return Epoll

    def _socket_class(self, real: type[Any]) -> type[Any]:
        due = self._due

        class Socket(real):  # type: ignore[misc]
            def __init__(self, *arguments: Any, **options: Any) -> None:
                if "fileno" not in options and (number := due("socket")):
                    raise OSError(number, os.strerror(number))
                super().__init__(*arguments, **options)

            def bind(self, address: Any) -> None:
                if number := due("bind"):
                    raise OSError(number, os.strerror(number))
                super().bind(address)

            def listen(self, backlog: int) -> None:
                if number := due("listen"):
                    raise OSError(number, os.strerror(number))
                super().listen(backlog)

        return Socket
