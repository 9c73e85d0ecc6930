"""One hvsock connection: a byte stream between a host's socket and a guest's channel.

Bytes go from the ring's pages (`hvsock_packets`) to the socket (`hvsock_host`) and back with no copy
of ours, but for what the socket does not take at once.
Whoever cannot go on is asked to tell when it can: the socket by `SocketWatch`,
the guest by the pending size of the ring.

Ends. An empty packet says that its sender sends no more; the other direction
goes on. Linux closes a channel only after the host has rescinded it, so we do
that as soon as both have said so, or when anything goes wrong.

What was written before a close arrives, whoever closes first and when:
- A host program that has gone, even before the guest accepted, may have left
  data. The guest gets it, and then the end. What the guest sends meanwhile goes
  nowhere. The channel goes as soon as the guest has taken all and is known to
  be past its connect (Linux's times out if the channel goes before that).
- What a guest wrote before it closed the channel is still in the ring, or in
  our hands while the socket was full: `on_left` gets it with the socket.

A turn moves a bounded number of packets; all connections of a service share
the service's turn (`runtime.rotation`).

A connection can be saved and go on in another machine, where its program is another one. What had left
the guest's ring is the former program's; what that had sent, and the guest has yet to get, goes along.

`vsock.Vsock` makes these. Owner: the I/O loop.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from operator import add

from hvkvm.abi import hvsock as abi
from hvkvm.abi.ring import VM_PKT_DATA_INBAND
from hvkvm.devices.synth.hvsock_host import HostEnd
from hvkvm.devices.synth.hvsock_packets import FULL_PACKET, HEADER_BYTES, PACKETS, data_header, take
from hvkvm.runtime.guard import Guard
from hvkvm.runtime.protocols import CallLater, TimerHandle
from hvkvm.runtime.rotation import Rotation
from hvkvm.runtime.socket_watch import HANG_UP, READ, SocketWatch
from hvkvm.tuples import NamedTuple
from hvkvm.vmbus.channel_io import ChannelIo
from hvkvm.vmbus.device import Done
from hvkvm.vmbus.offer import Offer

LEAST_DATA = 512
"""No packet with less room is begun: a ring so full is left to the guest to empty."""
TURN = 4
"""So many times PACKETS go each way before other connections have their turn."""
VISIT_COST = 4
"""What a turn costs beside its packets, in packets."""
LINGER_SECONDS = 30.0
"""A guest that sends no more, and takes nothing for so long while there is something, has closed."""
GONE_SECONDS = 2.5
"""How often a guest whose host program has gone is looked at; longer than Linux's connect takes (2 s)."""
MAX_LAST_BYTES = 1 << 20
MAX_LAST_PACKETS = 4096
"""Most that is taken from the ring of a guest that has closed its channel, in one turn. Linux's have less."""


class Counters(NamedTuple):
    """What a connection moved, or all of them; `signals` interrupted the guest, `wakes` called us."""

    bytes_to_guest: int = 0
    bytes_to_host: int = 0
    packets_to_guest: int = 0
    packets_to_host: int = 0
    signals: int = 0
    wakes: int = 0

    def plus(self, other: Counters) -> Counters:
        """The sum, field by field."""
        return Counters(*map(add, self, other))


class HvsockState(NamedTuple):
    """What the guest could tell apart, and `unsent`: what its program had sent and is not in the ring yet."""

    guest_done: bool
    host_done: bool
    told_guest: bool
    end_at: int
    """Where the guest's ring has the empty packet."""
    unsent: bytes


class HvsockConnection:
    """A channel's device, on `sock`, which becomes its own: made non-blocking, closed at the end.

    `on_opened(self)` once the guest has accepted; `on_ended(self, why)` once and
    last, whoever ended it, with `why` if the guest broke a rule: the caller then
    rescinds the channel. `on_left(sock, data)` before that, if the socket has yet
    to take data of the guest: the socket is the caller's then, to be closed behind
    the data. `guest_waits`: a guest's program asked for it, so that it is kept also
    if the host's program leaves without a word. OSError or Stopped if the socket
    cannot be watched, and then it is still the caller's.
    """

    def __init__(
        self,
        offer: Offer,
        sock: socket.socket,
        watch: SocketWatch,
        turns: Rotation,
        call_later: CallLater,
        on_opened: Callable[[HvsockConnection], object],
        on_ended: Callable[[HvsockConnection, str], object],
        on_left: Callable[[socket.socket, bytes], object],
        *,
        open_seconds: float,
        linger_seconds: float = LINGER_SECONDS,
        guest_waits: bool = False,
    ) -> None:
        self._offer = offer
        self._host = HostEnd(sock)
        self._turns = turns
        self._call_later = call_later
        self._on_opened = on_opened
        self._on_ended = on_ended
        self._on_left = on_left
        self._linger_seconds = linger_seconds
        self._guest_waits = guest_waits
        self._io: ChannelIo | None = None
        self._may_read = True  # the socket may have something; else it is asked to tell
        self._guest_done = False  # the guest's empty packet was seen
        self._host_done = False  # the socket's end was seen
        self._told_host = False  # and each was passed on
        self._told_guest = False
        self._end_at = 0  # where the guest's ring has the empty packet
        self._ended = False
        self._to_guest_bytes = self._to_host_bytes = self._wakes = 0
        self._final: Counters | None = None
        self.guard = Guard()
        self._watched = watch.add(sock.fileno(), partial(self.guard.run, self._socket_ready))
        try:
            self._timer: TimerHandle | None = call_later(open_seconds, self.guard.run, self.end)
        except BaseException:
            self._watched.remove()
            raise

    State = HvsockState

    def save(self) -> HvsockState:
        """See `vmbus.device.SavedDevice`."""
        unsent = self._host.unread() if not self._host_done else b""
        return HvsockState(self._guest_done, self._host_done, self._told_guest, self._end_at, unsent)

    def load(self, io: ChannelIo | None, state: HvsockState) -> None:
        """See `vmbus.device.SavedDevice`."""
        self._host.ahead = memoryview(state.unsent)
        if io is None:
            return  # the guest is about to accept
        self._guest_done, self._host_done = state.guest_done, state.host_done
        self._told_guest, self._end_at = state.told_guest, state.end_at & 0xFFFF_FFFF
        self.opened(io)
        if self._guest_done:
            self._linger((-1, -1))

    # vmbus.device.StreamDevice

    @property
    def offer(self) -> Offer:
        """What the guest is offered."""
        return self._offer

    def opened(self, io: ChannelIo) -> None:
        """The guest has accepted."""
        self._drop_timer()
        self._io = io
        self._on_opened(self)

    def rung(self) -> None:
        """The guest has written, or made room."""
        self._turns.ask(self)

    def close(self, done: Done) -> None:
        """The guest closed it, left, or broke the ring: what it wrote before is taken now or never."""
        io = self._io
        if io is not None and not self._host.gone:
            pieces, total = [memoryview(self._host.left)], 0
            most = io.reader.packets + MAX_LAST_PACKETS
            while total < MAX_LAST_BYTES and io.reader.packets < most:
                views, size = self._take(io)
                if not size:
                    break
                pieces += views
                total += size
            if not self._ended:  # or it broke a rule in there
                self._to_host_bytes += total
                self._host.left = b"".join(pieces)
        self.end()
        done()

    # runtime.rotation.Member

    def turn(self) -> int:
        """Move what can be moved, up to a bound; what it cost in packets."""
        io = self._io
        if io is None:
            return 0
        self._wakes += 1
        before = io.reader.packets + io.writer.packets
        self.guard.run(self._move, io)
        return io.reader.packets + io.writer.packets - before + VISIT_COST

    def _move(self, io: ChannelIo) -> None:
        with io:
            self._to_host()
            self._to_guest()
            self._settle()

    # The socket.

    def greet(self, line: bytes) -> None:
        """Write a line ahead of the stream."""
        self._host.left = line
        self._send(self._host.send_left)

    def _socket_ready(self, mask: int) -> None:
        if mask & (READ | HANG_UP):
            self._may_read = True
        if mask & HANG_UP:
            self._host_left()
        if self._io is not None:
            self._turns.ask(self)
        elif not self._guest_waits and not self._host.has_data():
            self.end()  # it hung up before the guest accepted, and has nothing for it

    def _send(self, send: Callable[[], bool]) -> bool:
        """What `send` says; a socket that takes no more may still have something for the guest."""
        was_gone = self._host.gone
        sent = send()
        if self._host.gone and not was_gone:
            self._may_read = True
        return sent

    def _host_left(self) -> None:
        """Nobody will read the socket's other end; what it sent before is still to come."""
        self._host.leave()
        self._may_read = True

    def _settle(self) -> None:
        """End if both sides are done, else ask the socket for what we wait for."""
        if self._ended:
            return
        if self._told_guest and (self._told_host or (self._host.gone and self._guest_has_all())):
            self.end()
            return
        if self._host.gone and self._timer is None:
            self._timer = self._call_later(GONE_SECONDS, self.guard.run, self._gone)
        if self._host.left:
            self._watched.arm_to_send(self._host.refused)
        if not self._may_read and not self._host_done:
            self._watched.arm(READ)

    # Ring to socket.

    def _to_host(self) -> None:
        io = self._io
        if io is None or not self._send(self._host.send_left):
            return
        io.reader.mask()  # nobody need ring while we read, nor while the socket is full
        for _ in range(TURN):
            views, size = self._take(io)
            if size:
                sent = self._send(partial(self._host.send, views, size))
                if not self._host.gone:
                    self._to_host_bytes += size
                if not sent:
                    return
                continue
            self._tell_host()
            if self._ended or io.rest():
                return
        self._turns.ask(self)

    def _take(self, io: ChannelIo) -> tuple[list[memoryview], int]:
        """The data of the packets that are there, and its size."""
        taken = take(io.reader, self._guest_done)
        if taken.broken:
            self.end(taken.broken)
            return [], 0
        if taken.ended and not self._guest_done:
            self._guest_done = True
            self._linger((-1, -1))
        return taken.views, taken.size

    def _tell_host(self) -> None:
        """All is sent: pass on that no more comes, if it is so."""
        if not self._guest_done or self._told_host:
            return
        self._told_host = True
        self._host.end_stream()

    # Socket to ring.

    def _to_guest(self) -> None:
        io = self._io
        if io is None or self._told_guest:
            return
        writer, turns = io.writer, 0
        need = min(FULL_PACKET, writer.size // 2)
        while self._may_read and not self._host_done:
            if turns == TURN:
                self._turns.ask(self)
                return
            turns += 1
            views = writer.reserve(HEADER_BYTES, abi.MAX_DATA_BYTES, LEAST_DATA, PACKETS)
            if not views:
                if not writer.wait_for_room(need):
                    return
                continue
            try:
                size = self._host.read(views)
            except BlockingIOError:
                self._may_read = False
                return
            except OSError:  # it closed, and left some of ours unread
                self._host_left()
                size = 0
            if not size:
                self._host_done = True
                break
            writer.commit(VM_PKT_DATA_INBAND, size, data_header)
            self._to_guest_bytes += size
            if size < sum(map(len, views)):
                self._may_read = False  # it had no more; and if it has by now, it tells at once
        if self._host_done:
            self._end_at = writer.position
            self._told_guest = io.send(data_header(0))

    # Ends.

    def _linger(self, before: tuple[int, int]) -> None:
        """Watch a guest that sends no more: a closed socket looks the same as one that only listens."""
        io = self._io
        if io is None:
            return
        now = (self._to_guest_bytes, io.writer.consumed)
        if now == before and not self._told_guest and (self._may_read or self._host_done):
            self.end()
        else:
            self._drop_timer()
            self._timer = self._call_later(self._linger_seconds, self.guard.run, self._linger, now)

    def _guest_has_all(self) -> bool:
        """Whether the guest has read all before the empty packet, and has shown by a packet that it is there.

        Linux leaves the empty packet where it is.
        """
        io = self._io
        return io is not None and io.reader.packets > 0 and self._has_read(io)

    def _has_read(self, io: ChannelIo) -> bool:
        return io.writer.consumed in (self._end_at, io.writer.position)

    def _gone(self) -> None:
        """Look at a guest whose host program has gone: it may be as slow to read as it likes."""
        io = self._io
        if io is None:
            return
        if self._told_guest and self._has_read(io):
            self.end()
        else:
            self._timer = self._call_later(GONE_SECONDS, self.guard.run, self._gone)

    def _drop_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def end(self, why: str = "") -> None:
        """Let go of the socket and the channel, whose data the guest may still read. Idempotent."""
        if self._ended:
            return
        self._ended = True
        self._drop_timer()
        self._turns.forget(self)
        self._watched.remove()
        left, self._host.left = self._host.left, b""
        if left and not self._host.gone:
            self._on_left(self._host.sock, left)
        else:
            self._host.sock.close()
        if self._io is not None:
            self._io.flush()
        self._final = self.counters
        self._io = None
        self._on_ended(self, why)

    # Telling.

    @property
    def counters(self) -> Counters:
        """What it moved so far."""
        if self._final is not None:
            return self._final
        moved = (self._to_guest_bytes, self._to_host_bytes)
        io = self._io
        if io is None:
            return Counters(*moved, wakes=self._wakes)
        return Counters(*moved, io.writer.packets, io.reader.packets, io.signals, self._wakes)

    def describe(self) -> str:
        """One line for dumps."""
        if self._io is None:
            return f"{self._offer.name}: offered"
        ends = [
            text
            for text, true in (
                ("the guest sends no more", self._guest_done),
                ("the host sends no more", self._host_done),
                ("the host reads no more", self._host.gone),
                (f"{len(self._host.left)} bytes wait for the host", bool(self._host.left)),
                ("the guest's ring is full", self._may_read and not self._host_done),
            )
            if true
        ]
        counters = ", ".join(f"{name} {value}" for name, value in self.counters._asdict().items())
        return f"{self._offer.name}: {'; '.join([counters, *ends])}"
