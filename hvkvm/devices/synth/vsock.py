"""vsock: a guest's AF_VSOCK programs and the host's programs reach one another.

A host program connects to the Unix socket PATH, writes `CONNECT <port>\\n` and
reads `OK <host port>\\n` once a guest's program has accepted; else the
connection is closed. What a guest's program connects to at port P is the host's
socket PATH_P. Programs in this process may use `listen` and `connect` instead.

Nothing waits here: a program that is slow, silent or gone costs a bounded
number of sockets for a bounded time.

Owner: the I/O loop, for all that is not said otherwise.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

from hvkvm.abi import hvsock as abi
from hvkvm.abi import vmbus
from hvkvm.devices.synth.hvsock import HvsockConnection, HvsockState
from hvkvm.devices.synth.vsock_caller import Caller
from hvkvm.devices.synth.vsock_connections import Connections
from hvkvm.devices.synth.vsock_saved import SavedStream, check, offer_to_port, saved_streams
from hvkvm.devices.synth.vsock_socket import ListeningSocket, connect
from hvkvm.errors import Stopped
from hvkvm.events import NULL_OBSERVER, Observer
from hvkvm.runtime.acceptor import Acceptor
from hvkvm.runtime.protocols import Loop, TimerHandle
from hvkvm.runtime.socket_watch import SocketWatch
from hvkvm.vmbus.actions import TlConnect
from hvkvm.vmbus.host import VmbusHost
from hvkvm.vmbus.offer import Offer
from hvkvm.vmbus.report import Reports
from hvkvm.vmbus.server import BusState

MAX_CONNECTIONS = 256
"""Most at a time, those that wait included."""

RETRY_SECONDS = 0.05
RETRIES = 30
"""How often a guest's connect is tried again while the queue of the host's program is full."""

_FIRST_HOST_PORT = 1 << 30


class Vsock:
    """The vsock of one machine. `path` None: for programs of this process alone.

    Build it, and `start`, before a guest runs.
    """

    def __init__(
        self,
        host: VmbusHost,
        io: Loop,
        path: Path | None = None,
        *,
        observer: Observer = NULL_OBSERVER,
    ) -> None:
        self._host = host
        self._io = io
        self._path = path
        self._reports = Reports(observer)
        self.connections = Connections(io, self._reports, host.remove)
        self._listening: ListeningSocket | None = None
        self._acceptor: Acceptor | None = None
        self._callers: set[Caller] = set()
        self._retries: dict[int, tuple[TlConnect, TimerHandle]] = {}
        """By id, since a guest may send the same request twice."""
        self._listeners: dict[int, Callable[[socket.socket], object]] = {}
        self._refused = 0
        self._next_host_port = _FIRST_HOST_PORT
        self._closed = False

    def start(self) -> None:
        """Listen. Once. ConfigError naming --vsock, Stopped after the loop's end."""
        listening = None if self._path is None else ListeningSocket(self._path)
        self._listening = listening
        try:
            self.connections.watch = SocketWatch(self._io)
            if listening is not None:
                self._acceptor = Acceptor(self._io, listening.socket, self._accepted, self._not_accepted)
        except BaseException:
            self.close()
            raise
        self._host.serve_connects(self._guest_connects)
        self._host.on_leave(self.reset)

    # For programs of this process.

    def listen(self, port: int, callback: Callable[[socket.socket], object]) -> None:
        """`callback(socket)` gets the other end of each connect of the guest to `port`, on the I/O loop.

        It comes before any PATH_`port`. Any thread.
        """
        self._listeners[port] = callback

    def unlisten(self, port: int) -> None:
        """Take no more. Any thread; idempotent."""
        self._listeners.pop(port, None)

    def connect(self, port: int) -> socket.socket:
        """A socket to `port` of the guest, at once; at its end at once, if the guest does not accept.

        Any thread. Stopped after the loop's end.
        """
        ours, theirs = socket.socketpair()
        try:
            self._io.call_soon(self._host.contain, self._call_guest, ours, port, False)
        except BaseException:
            ours.close()
            theirs.close()
            raise
        return theirs

    # Host to guest.

    def _accepted(self, sock: socket.socket) -> None:
        watch = self.connections.watch
        if watch is None or self._full:
            sock.close()
            return
        try:
            self._callers.add(
                Caller(sock, watch, self._io.call_later, partial(self._host.contain, self._called))
            )
        except (OSError, Stopped) as error:
            self._reports.add("vsock", f"cannot serve a program: {error}")
            sock.close()

    def _not_accepted(self, reason: str) -> None:
        self._reports.add("vsock", f"cannot accept: {reason}")

    @property
    def _full(self) -> bool:
        return len(self._callers) + len(self.connections) >= MAX_CONNECTIONS

    def _called(self, caller: Caller, port: int | None) -> None:
        """A program said which port it wants, or left, or was too slow."""
        self._callers.discard(caller)
        if port is None:
            caller.sock.close()
        else:
            self._call_guest(caller.sock, port, True)

    def _call_guest(self, sock: socket.socket, port: int, greets: bool) -> None:
        """Offer the guest a connection; `greets`: the program waits for the OK line."""
        server = self._host.server
        known = server.state is BusState.CONNECTED and server.version >= vmbus.VERSION_WIN10
        if not known or not 0 <= port <= abi.MAX_LISTEN_PORT or self._full or self._closed:
            self._refused += 1
            sock.close()
            return
        host_port = self._next_host_port
        self._next_host_port = max(_FIRST_HOST_PORT, (host_port + 1) & abi.MAX_LISTEN_PORT)
        offer = Offer(
            abi.service_guid(port),
            os.urandom(vmbus.GUID_BYTES),
            f"vsock to guest port {port}",
            flags=abi.OFFER_FLAGS,
            user_defined=abi.offer_parameters(to_guest=True),
        )

        def opened(connection: HvsockConnection) -> None:
            if greets:
                connection.greet(b"OK %d\n" % host_port)

        connection = self.connections.make(offer, sock, opened)
        if connection is not None:
            try:
                self.connections.live[connection] = self._host.add(connection)
            except ValueError as error:  # no relid is free
                connection.end(str(error))

    # Guest to host.

    def _guest_connects(self, request: TlConnect, retries: int = RETRIES) -> None:
        """A guest's program connects: to a listener of this process, or to PATH_<port>."""
        port = abi.port_of(request.service_id)
        sock = theirs = None
        if port is not None and port <= abi.MAX_LISTEN_PORT and not self._full and not self._closed:
            try:
                if port in self._listeners:
                    sock, theirs = socket.socketpair()
                elif self._path is not None:
                    sock = connect(self._path, port)
            except BlockingIOError:
                if retries:
                    self._retry_later(request, retries - 1)
                    return
            except OSError as error:
                self._reports.add("vsock", f"cannot connect to host port {port}: {error.strerror}")
        if sock is None or port is None:
            self._refused += 1
            self._host.refuse_connect(request)
            return
        offer = offer_to_port(port, request.endpoint_id, request.silo_id)
        connection = self.connections.make(offer, sock, partial(self._opened, port), guest_waits=True)
        if connection is None:
            if theirs is not None:
                theirs.close()
            self._host.refuse_connect(request)
            return
        if theirs is not None:
            self.connections.handed[connection] = theirs
        try:
            channel = self._host.accept_connect(request, connection)
        except ValueError as error:  # no relid is free, or the guest asks twice from one port
            self._host.refuse_connect(request)
            connection.end(str(error))
            return
        if channel is None:  # the guest has gone
            connection.end()
        else:
            self.connections.live[connection] = channel

    def _retry_later(self, request: TlConnect, retries: int) -> None:
        timer = self._io.call_later(RETRY_SECONDS, self._host.contain, self._retry, request, retries)
        self._retries[id(request)] = request, timer

    def _retry(self, request: TlConnect, retries: int) -> None:
        del self._retries[id(request)]
        self._guest_connects(request, retries)

    def _opened(self, port: int, connection: HvsockConnection) -> None:
        handed = self.connections.handed.pop(connection, None)
        if handed is not None:
            self._hand_over(handed, port)

    def _hand_over(self, sock: socket.socket, port: int) -> None:
        """The guest has accepted: the other end is the listener's. Its error ends this connection."""
        listener = self._listeners.get(port)
        if listener is None:
            sock.close()
            return
        try:
            listener(sock)
        except Exception as error:
            self._reports.add("vsock", f"the listener of port {port} failed: {type(error).__name__}: {error}")
            sock.close()

    # A saved machine.

    def save(self) -> tuple[SavedStream, ...]:
        """The streams that go on in another machine. At rest."""
        return saved_streams(self.connections.live)

    def restore(self, streams: tuple[SavedStream, ...]) -> dict[int, HvsockState]:
        """Make what `save` gave, before the bus is loaded; their states, by their id(). ValueError.

        Who listens to a port when the machine goes on gets its stream.
        """
        check(streams)
        return {id(made): stream.state for stream in streams if (made := self._restored(stream)) is not None}

    def _restored(self, stream: SavedStream) -> HvsockConnection | None:
        ours, theirs = socket.socketpair()

        def opened(connection: HvsockConnection) -> None:
            # When the machine runs: nobody listens yet.
            self._io.call_soon(self._opened, stream.port, connection)

        offer = offer_to_port(stream.port, stream.endpoint)
        connection = self.connections.make(offer, ours, opened, guest_waits=True)
        if connection is None:
            theirs.close()
            return None
        self.connections.handed[connection] = theirs
        self.connections.live[connection] = self._host.add(connection)
        return connection

    # Ends.

    def reset(self) -> None:
        """The guest has gone: end every connection. `VmbusHost` calls it for every such case."""
        retries, self._retries = self._retries, {}
        for _request, timer in retries.values():
            timer.cancel()
        self.connections.end_all()

    def close(self) -> None:
        """End everything and remove the socket. After the loop, before `VmbusHost.close`. Idempotent."""
        self._closed = True
        for caller in list(self._callers):
            caller.finish()
        self.connections.close()
        self.reset()
        if self._acceptor is not None:
            self._acceptor.close()
        listening, self._listening = self._listening, None
        if listening is not None:
            listening.close()
        if self.connections.watch is not None:
            self.connections.watch.close()

    # Telling.

    @property
    def service(self) -> str:
        """The service in a line, for people."""
        return (
            f"{self._path or 'without a path'}: {len(self.connections.live)} connections of"
            f" {self.connections.total} so far, {self._refused} refused, {len(self._callers)} programs have"
            " yet to name a port"
        )

    def describe(self) -> list[str]:
        """The service and its connections, for people."""
        return [f"vsock {self.service}", *(f"  {line}" for line in self.connections.describe())]
