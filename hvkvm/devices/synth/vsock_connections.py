"""The connections of a vsock service: made, counted, ended; and what outlives them for a moment.

A connection that ends may leave data that its program has yet to take (`vsock_remainder`), or a
socket that a program of this process was to get. Owner: the I/O loop.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from hvkvm.devices.synth.hvsock import LINGER_SECONDS, Counters, HvsockConnection
from hvkvm.devices.synth.vsock_remainder import Remainder
from hvkvm.errors import Stopped, is_temporary
from hvkvm.runtime.protocols import Loop
from hvkvm.runtime.rotation import Rotation
from hvkvm.runtime.socket_watch import SocketWatch
from hvkvm.vmbus.offer import Channel, Offer
from hvkvm.vmbus.report import Reports

ACCEPT_SECONDS = 5.0
"""So long an offer waits for a guest's program to take it; Linux's own connect gives up after 2."""

TURN_PACKETS = 64
"""Packets that all connections together move in a turn of the I/O loop; the last one may go beyond."""


class Connections:
    """`on_rescind(channel)` is asked to take the channel of a connection that ended from the guest."""

    def __init__(self, io: Loop, reports: Reports, on_rescind: Callable[[Channel], object]) -> None:
        self._io = io
        self._reports = reports
        self._on_rescind = on_rescind
        self.accept_seconds = ACCEPT_SECONDS
        """So long an offer waits for a guest's program; may be changed for later ones."""
        self.linger_seconds = LINGER_SECONDS
        """See `hvsock.LINGER_SECONDS`; likewise."""
        self.watch: SocketWatch | None = None
        """None before the start, and then there are none."""
        self.turns = Rotation(io, TURN_PACKETS)
        self.live: dict[HvsockConnection, Channel | None] = {}
        self.handed: dict[HvsockConnection, socket.socket] = {}
        """The programs' ends of connections that the guest has not accepted yet."""
        self.total = 0
        self._remainders: set[Remainder] = set()
        self._past = Counters()
        self._closed = False

    def __len__(self) -> int:
        """How many there are, and what is left of others."""
        return len(self.live) + len(self._remainders)

    def make(
        self,
        offer: Offer,
        sock: socket.socket,
        opened: Callable[[HvsockConnection], object],
        *,
        guest_waits: bool = False,
    ) -> HvsockConnection | None:
        """A connection on `sock`, which is closed if there can be none."""
        if self.watch is None:
            sock.close()
            return None
        try:
            connection = HvsockConnection(
                offer,
                sock,
                self.watch,
                self.turns,
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
        self.live[connection] = None
        self.total += 1
        return connection

    def _ended(self, connection: HvsockConnection, why: str) -> None:
        channel = self.live.pop(connection, None)
        handed = self.handed.pop(connection, None)
        if handed is not None:
            handed.close()
        self._past = self._past.plus(connection.counters)
        if why:
            self._reports.add("vsock", f"{connection.offer.name}: {why}")
        if channel is not None and not self._closed:
            self._on_rescind(channel)

    def _left(self, sock: socket.socket, data: bytes) -> None:
        """A connection ends, and its program has not got all yet: what it does not take now waits for it."""
        watch, sent = self.watch, 0
        try:
            try:
                sent = sock.send(data, socket.MSG_NOSIGNAL)
            except OSError as error:
                if not is_temporary(error):
                    raise
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

    def end_all(self) -> None:
        """The guest has gone."""
        for connection in list(self.live):
            connection.end()

    def close(self) -> None:
        """End everything; the channels go with their bus. Idempotent."""
        self._closed = True
        for connection in list(self.live):
            connection.close(lambda: None)  # what a guest wrote last is still in its ring
        self.end_all()
        for remainder in list(self._remainders):
            remainder.finish()

    @property
    def counters(self) -> Counters:
        """What all connections moved, past ones included. Any thread."""
        total = self._past
        for connection in list(self.live):
            total = total.plus(connection.counters)
        return total

    def describe(self) -> list[str]:
        """Each in a line, for people. Any thread."""
        return [connection.describe() for connection in list(self.live)]
