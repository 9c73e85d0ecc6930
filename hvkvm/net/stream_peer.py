"""Who is at the other end of a stream: a socket that we connect to again and again, or one of ours.

Owner: the I/O loop, for all but construction.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from hvkvm import given_file
from hvkvm.errors import ConfigError, NameTaken
from hvkvm.events import NULL_OBSERVER, Observer, Warned
from hvkvm.net.stream import StreamPort
from hvkvm.runtime import unix_listener
from hvkvm.runtime.acceptor import Acceptor
from hvkvm.runtime.protocols import Loop
from hvkvm.runtime.retry import Retry


class Caller:
    """Keeps `port` connected to whoever listens at `path`. ConfigError if no socket can ever be there."""

    def __init__(self, io: Loop, port: StreamPort, path: Path, *, observer: Observer = NULL_OBSERVER) -> None:
        if len(os.fsencode(path)) > unix_listener.MAX_PATH:
            most = unix_listener.MAX_PATH
            raise ConfigError(f"--net socket={path}: longer than {most} bytes; choose a shorter path")
        if why := given_file.why_no_folder(path.parent):
            raise ConfigError(f"--net socket={path}: {why}")
        self._port = port
        self._path = path
        self._observer = observer
        self._retry = Retry(io, self._call)
        self._closed = False
        self._told = False
        port.lost = self._lost
        port.on_close(self.close)
        io.call_soon(self._call)

    def _call(self) -> None:
        if self._closed:
            return
        try:
            sock = self._connect()
        except OSError as error:  # nobody listens, or the host has no fd or memory
            if not self._told:
                self._told = True
                why = error.strerror or str(error)
                text = f"network socket {self._path}: {why}; trying again until somebody listens"
                self._observer.event(Warned("net-socket", text))
            self._retry.later()
            return
        self._told = False
        self._port.connected(sock)

    def _connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.connect(str(self._path))
        except BaseException:
            sock.close()
            raise
        return sock

    def _lost(self, _reason: str) -> None:
        if not self._closed:
            self._retry.later()

    def close(self) -> None:
        """Try no more. Idempotent."""
        self._closed = True
        self._retry.cancel()


class Answerer:
    """Listens at `path` for `port`: one peer at a time, and the next one when it has gone. ConfigError."""

    def __init__(self, io: Loop, port: StreamPort, path: Path) -> None:
        try:
            fd = unix_listener.listen_fd(path, 1, 0o600)
        except NameTaken as error:
            raise ConfigError(f"--net listen={path}: {error}") from None
        except OSError as error:
            why = error.strerror or str(error)
            raise ConfigError(f"--net listen={path}: {why}; name a socket that you may create") from None
        self._io = io
        self._port = port
        self._path = path
        self._listener = socket.socket(fileno=fd)
        self._owned = unix_listener.identity(path)
        self._closed = False
        self._acceptor: Acceptor | None = None
        self._retry = Retry(io, self._listen)
        port.lost = lambda _reason: self._listen()
        port.on_close(self.close)
        io.call_soon(self._listen)

    def _listen(self) -> None:
        if not self._closed and self._acceptor is None:
            try:
                self._acceptor = Acceptor(self._io, self._listener, self._accepted)
            except OSError:  # no memory to watch it; who connects meanwhile waits
                self._retry.later()

    def _accepted(self, sock: socket.socket) -> None:
        """The next one waits in the listener's queue meanwhile."""
        acceptor, self._acceptor = self._acceptor, None
        if acceptor is not None:
            acceptor.close()
        self._port.connected(sock)

    def close(self) -> None:
        """Listen no more, and take the socket's file away. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._retry.cancel()
        if self._acceptor is not None:
            self._acceptor.close()
        unix_listener.remove(self._path, self._owned)
        self._listener.close()
