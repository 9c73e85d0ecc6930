"""The streams of a guest command over vsock: see `machine.command`.

Four connections that the guest makes, one for each stream. What is held or full
waits in the sockets, and behind them in the rings and in the guest's pipes.

Owner: the I/O loop, for all but construction and `close`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Protocol

from hvkvm.abi import guest_command as abi
from hvkvm.errors import Stopped, is_temporary
from hvkvm.machine.command_way import Lines
from hvkvm.runtime.protocols import Deferrer, TimedWatcher
from hvkvm.runtime.socket_watch import READ, SocketWatch, Watched

if TYPE_CHECKING:
    from hvkvm.backends.host_input import HostInput
    from hvkvm.devices.synth.vsock import Vsock

PIECE = 1 << 16
CONTROL_PIECE = 256
"""Bytes of control a turn: a guest says one line at a time, and each may have an answer."""
TURN = 4
"""So many pieces before others have their turn."""
_ROUNDS = 4
"""Rounds of the loop in which what a doorbell announced has come from a ring to its socket."""
_OUTPUTS = {abi.VSOCK_OUTPUT: "out", abi.VSOCK_ERROR: "err"}


class Loop(TimedWatcher, Deferrer, Protocol):
    """What is needed of the I/O loop."""


class _Stream:
    """One connection, and the guest's former one of its kind."""

    def __init__(self) -> None:
        self.sock: socket.socket | None = None
        self.watched: Watched | None = None

    def close(self) -> None:
        sock, self.sock = self.sock, None
        if sock is not None:
            if self.watched is not None:
                self.watched.remove()
            sock.close()


class CommandVsock:
    """Listens on the ports of `abi.guest_command` until closed."""

    def __init__(
        self,
        io: Loop,
        vsock: Vsock,
        source: HostInput,
        took: Callable[[str, bytes], object],
        on_line: Callable[[bytes], object],
    ) -> None:
        self._io = io
        self._vsock = vsock
        self._source = source
        self._took = took
        self.lines = Lines(on_line)
        self._streams = {port: _Stream() for port in (abi.VSOCK_CONTROL, abi.VSOCK_INPUT, *_OUTPUTS)}
        self._held: set[str] = set()
        self._unsent = b""
        self._left = (b"", b"")
        self._rest: Callable[[], None] | None = None
        self._watch = SocketWatch(io)
        for port in self._streams:
            vsock.listen(port, partial(self._connected, port))

    def go_on(self, line: bytes, unsent: bytes) -> None:
        """Be where another run was that saved its guest, whose streams come when the machine goes on.

        `line` is the beginning of one of control; `unsent` is input that found no room in a socket.
        """
        self._left = line, unsent[:PIECE]

    def left(self) -> tuple[bytes, bytes]:
        """What `go_on` takes."""
        return self.lines.begun, self._unsent

    def _connected(self, port: int, sock: socket.socket) -> None:
        """The guest's init has connected one; again only if it started anew."""
        stream = self._streams[port]
        stream.close()
        sock.setblocking(False)
        ready = {
            abi.VSOCK_CONTROL: self._control_ready,
            abi.VSOCK_INPUT: lambda _mask: self._send_input(),
        }.get(port, lambda _mask: self._output_ready(port))
        try:
            stream.watched = self._watch.add(sock.fileno(), ready)
        except (OSError, Stopped):  # out of memory, or at the end: as if the host had hung up
            sock.close()
            return
        stream.sock = sock
        if port == abi.VSOCK_INPUT:
            self._unsent = self._left[1]
            if self._unsent:
                self._send_input()
            else:
                self._source.request(PIECE, self._give_input)
        else:
            if port == abi.VSOCK_CONTROL:
                self.lines.clear()
                self.lines.begin(self._left[0])
            stream.watched.arm(READ)

    # --- control ---------------------------------------------------------------------------------

    def _control_ready(self, _mask: int) -> None:
        stream = self._streams[abi.VSOCK_CONTROL]
        data = self._receive(stream, CONTROL_PIECE)
        if data and stream.watched is not None:
            stream.watched.arm(READ)
            self.lines.add(data)

    def send_control(self, line: bytes) -> None:
        """Send a line, if the guest came this way; one that does not read them loses some."""
        sock = self._streams[abi.VSOCK_CONTROL].sock
        if sock is not None:
            try:
                sock.send(line, socket.MSG_NOSIGNAL)
            except OSError:
                return

    # --- input -----------------------------------------------------------------------------------

    def _give_input(self, data: bytes) -> None:
        stream = self._streams[abi.VSOCK_INPUT]
        if data:
            self._unsent = data
            self._send_input()
        elif stream.sock is not None:
            try:
                stream.sock.shutdown(socket.SHUT_WR)
            except OSError:
                stream.close()

    def _send_input(self) -> None:
        """Send what there is, and ask for more when all is sent. Nothing to send: the guest hung up."""
        stream = self._streams[abi.VSOCK_INPUT]
        if stream.sock is None or stream.watched is None:
            return
        refused: OSError | None = None
        try:
            sent = stream.sock.send(self._unsent, socket.MSG_NOSIGNAL) if self._unsent else 0
        except OSError as error:
            if not is_temporary(error):
                stream.close()  # the command has closed its standard input
                return
            sent, refused = 0, error
        self._unsent = self._unsent[sent:]
        if self._unsent:
            stream.watched.arm_to_send(refused)
        elif sent:
            self._source.request(PIECE, self._give_input)

    # --- output ----------------------------------------------------------------------------------

    def _output_ready(self, port: int) -> None:
        stream, name = self._streams[port], _OUTPUTS[port]
        for _ in range(TURN):
            if name in self._held:
                return  # hold() goes on
            data = self._receive(stream)
            if data is None:
                return
            if not data:
                self._check_rest()
                return
            self._took(name, data)
        if stream.watched is not None:
            stream.watched.arm(READ)

    def hold(self, name: str, held: bool) -> None:
        """Stop or resume taking output. Any thread."""
        if held and self._rest is None:
            self._held.add(name)
        elif not held:
            self._held.discard(name)
            try:
                self._io.call_soon(self._resume)
            except Stopped:
                return

    def _resume(self) -> None:
        for port, name in _OUTPUTS.items():
            stream = self._streams[port]
            if stream.sock is not None and stream.watched is not None and name not in self._held:
                stream.watched.arm(READ)

    def _receive(self, stream: _Stream, most: int = PIECE) -> bytes | None:
        """What has come; b"" when the guest has closed it, None if nothing, and then the socket will tell."""
        if stream.sock is None or stream.watched is None:
            return None
        try:
            data = stream.sock.recv(most)
        except BlockingIOError:
            stream.watched.arm(READ)
            return None
        except OSError:
            data = b""
        if not data:
            stream.close()
        return data

    # --- ends ------------------------------------------------------------------------------------

    def take_rest(self, done: Callable[[], None], *, until_end: bool) -> None:
        """Take all output that there still is, held or not, then call `done()`. Once."""
        self._rest = done
        self._held.clear()
        self._resume()
        if until_end:
            self._check_rest()
        else:
            self._after_rounds(_ROUNDS)

    def _after_rounds(self, left: int) -> None:
        if left:
            self._io.call_soon(self._after_rounds, left - 1)
        elif self._rest is not None:
            self._rest()

    def _check_rest(self) -> None:
        if self._rest is not None and all(self._streams[port].sock is None for port in _OUTPUTS):
            self._rest()

    def reset(self) -> None:
        """The guest has gone, and its connections with it. It has asked for input in vain."""
        self._source.withdraw()
        for stream in self._streams.values():
            stream.close()
        self._left = (b"", b"")
        self._held.clear()

    def close(self) -> None:
        """Listen no more, hang up. After the loop. Idempotent."""
        for port in self._streams:
            self._vsock.unlisten(port)
        for stream in self._streams.values():
            stream.close()
        self._watch.close()
