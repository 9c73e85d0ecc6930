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
from contextlib import suppress
from functools import partial
from pathlib import Path

from hvkvm.abi import hvsock as abi
from hvkvm.abi import vmbus
from hvkvm.devices.synth.hvsock import LINGER_SECONDS, Counters, HvsockConnection
from hvkvm.devices.synth.vsock_caller import Caller
from hvkvm.devices.synth.vsock_remainder import Remainder
from hvkvm.devices.synth.vsock_socket import ListeningSocket, connect
from hvkvm.errors import Stopped
from hvkvm.events import NULL_OBSERVER, Observer
from hvkvm.runtime.acceptor import Acceptor
from hvkvm.runtime.protocols import Loop, TimerHandle
from hvkvm.runtime.rotation import Rotation
from hvkvm.runtime.socket_watch import SocketWatch
from hvkvm.vmbus.actions import TlConnect
from hvkvm.vmbus.host import VmbusHost
from hvkvm.vmbus.offer import Channel, Offer
from hvkvm.vmbus.report import Reports
from hvkvm.vmbus.server import BusState

MAX_CONNECTIONS = 256
"""Most at a time, those that wait included."""

ACCEPT_SECONDS = 5.0
"""So long an offer waits for a guest's program to take it; Linux's own connect gives up after 2."""

RETRY_SECONDS = 0.05
RETRIES = 30
"""How often a guest's connect is tried again while the queue of the host's program is full."""

TURN_PACKETS = 64
"""Packets that all connections together move in a turn of the I/O loop; the last one may go beyond."""

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
        accept_seconds: float = ACCEPT_SECONDS,
        linger_seconds: float = LINGER_SECONDS,
    ) -> None:
        self._host = host
        self._io = io
        self._path = path
        self._reports = Reports(observer)
        self.accept_seconds = accept_seconds
        """So long an offer waits for a guest's program; may be changed for later ones."""
        self.linger_seconds = linger_seconds
        """See `hvsock.LINGER_SECONDS`; likewise."""
        self._listening: ListeningSocket | None = None
        self._acceptor: Acceptor | None = None
        self._watch: SocketWatch | None = None
        self._turns = Rotation(io, TURN_PACKETS)
        self._callers: set[Caller] = set()
        self._remainders: set[Remainder] = set()
        self._retries: dict[int, tuple[TlConnect, TimerHandle]] = {}
        """By id, since a guest may send the same request twice."""
        self._connections: dict[HvsockConnection, Channel | None] = {}
        self._handed: dict[HvsockConnection, socket.socket] = {}
        """The programs' ends of connections that the guest has not accepted yet."""
        self._listeners: dict[int, Callable[[socket.socket], object]] = {}
        self._past = Counters()
        self._total = self._refused = 0
        self._next_host_port = _FIRST_HOST_PORT
        self._closed = False

    def start(self) -> None:
        """Listen. Once. ConfigError naming --vsock, Stopped after the loop's end."""
        listening = None if self._path is None else ListeningSocket(self._path)
        self._listening = listening
        try:
            self._watch = SocketWatch(self._io)
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
        watch = self._watch
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
        return len(self._callers) + len(self._connections) + len(self._remainders) >= MAX_CONNECTIONS

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

        connection = self._connection(offer, sock, opened)
        if connection is not None:
            try:
                self._connections[connection] = self._host.add(connection)
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
        offer = Offer(
            request.service_id,
            request.endpoint_id,
            f"vsock to host port {port}",
            flags=abi.OFFER_FLAGS,
            user_defined=abi.offer_parameters(to_guest=False, silo_id=request.silo_id),
        )

        def opened(connection: HvsockConnection) -> None:
            handed = self._handed.pop(connection, None)
            if handed is not None:
                self._hand_over(handed, port)

        connection = self._connection(offer, sock, opened, guest_waits=True)
        if connection is None:
            if theirs is not None:
                theirs.close()
            self._host.refuse_connect(request)
            return
        if theirs is not None:
            self._handed[connection] = theirs
        try:
            channel = self._host.accept_connect(request, connection)
        except ValueError as error:  # no relid is free, or the guest asks twice from one port
            self._host.refuse_connect(request)
            connection.end(str(error))
            return
        if channel is None:  # the guest has gone
            connection.end()
        else:
            self._connections[connection] = channel

    def _retry_later(self, request: TlConnect, retries: int) -> None:
        timer = self._io.call_later(RETRY_SECONDS, self._host.contain, self._retry, request, retries)
        self._retries[id(request)] = request, timer

    def _retry(self, request: TlConnect, retries: int) -> None:
        del self._retries[id(request)]
        self._guest_connects(request, retries)

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

    # Both.

    def _connection(
        self,
        offer: Offer,
        sock: socket.socket,
        opened: Callable[[HvsockConnection], object],
        *,
        guest_waits: bool = False,
    ) -> HvsockConnection | None:
        """A connection on `sock`, which is closed if there can be none."""
        watch = self._watch
        if watch is None:  # not started
            sock.close()
            return None
        try:
            connection = HvsockConnection(
                offer,
                sock,
                watch,
                self._turns,
                self._io.call_later,
                opened,
                self._ended,
                self._left,
                open_seconds=self.accept_seconds,
                linger_seconds=self.linger_seconds,
                guest_waits=guest_waits,
            )
        except (OSError, Stopped) as error:
            self._reports.add("vsock", f"{offer.name}: {error}")
            sock.close()
            return None
        self._connections[connection] = None
        self._total += 1
        return connection

    def _ended(self, connection: HvsockConnection, why: str) -> None:
        channel = self._connections.pop(connection, None)
        handed = self._handed.pop(connection, None)
        if handed is not None:
            handed.close()
        self._past = self._past.plus(connection.counters)
        if why:
            self._reports.add("vsock", f"{connection.offer.name}: {why}")
        if channel is not None and not self._closed:
            self._host.remove(channel)

    def _left(self, sock: socket.socket, data: bytes) -> None:
        """A connection ends, and its program has not got all yet: what it does not take now waits for it."""
        watch, sent = self._watch, 0
        try:
            with suppress(BlockingIOError):
                sent = sock.send(data, socket.MSG_NOSIGNAL)
            if watch is None or sent == len(data):
                sock.close()
                return
            data = data[sent:]
            self._remainders.add(
                Remainder(
                    sock, data, watch, self._io.call_later, self.linger_seconds, self._remainders.discard
                )
            )
        except (OSError, Stopped):
            sock.close()

    # Ends.

    def reset(self) -> None:
        """The guest has gone: end every connection. `VmbusHost` calls it for every such case."""
        retries, self._retries = self._retries, {}
        for _request, timer in retries.values():
            timer.cancel()
        for connection in list(self._connections):
            connection.end()

    def close(self) -> None:
        """End everything and remove the socket. After the loop, before `VmbusHost.close`. Idempotent."""
        self._closed = True
        for caller in list(self._callers):
            caller.finish()
        for connection in list(self._connections):
            connection.close(lambda: None)  # what a guest wrote last is still in its ring
        self.reset()
        for remainder in list(self._remainders):
            remainder.finish()
        if self._acceptor is not None:
            self._acceptor.close()
        listening, self._listening = self._listening, None
        if listening is not None:
            listening.close()
        if self._watch is not None:
            self._watch.close()

    # Telling.

    @property
    def counters(self) -> Counters:
        """What all connections moved, past ones included."""
        total = self._past
        for connection in list(self._connections):
            total = total.plus(connection.counters)
        return total

    def describe(self) -> list[str]:
        """The service and its connections, for dumps."""
        live = list(self._connections)
        head = (
            f"vsock {self._path or 'without a path'}: {len(live)} connections of {self._total} so far, "
            f"{self._refused} refused, {len(self._callers)} programs have yet to name a port"
        )
        return [head, *(f"  {connection.describe()}" for connection in live)]
