"""A Unix socket on the I/O loop that takes JSON lines: one request object, one reply object each.

A request is an object with a text "do" and an "id" if the client wants one
back. The reply is {"ok": true, "result": ...} or {"ok": false, "kind": ...,
"error": one line}. What a request means is the handler's; this file knows
lines, and keeps every client inside its bounds: so many connections, so many
bytes a line, one request at a time, so long for taking a reply.

Owner: the I/O loop; `close` on any other thread once the loop has ended.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from json import dumps, loads
from typing import TYPE_CHECKING, Any

from hvkvm.errors import Stopped, is_temporary
from hvkvm.runtime.acceptor import Acceptor
from hvkvm.runtime.socket_watch import SocketWatch, Watched

if TYPE_CHECKING:
    from socket import socket

    from hvkvm.runtime.io_loop import Handle, IoLoop
    from hvkvm.runtime.timers import Timer

MAX_CONNECTIONS = 16
MAX_LINE = 1 << 16
"""Bytes of a request, and of what a client may send ahead of the reply it waits for."""
MAX_REPLY = 1 << 22
READ_SECONDS = 10.0
"""How long a client may leave a reply lying before it is dropped."""
TURN = 8
"""Requests of one client before others have theirs."""

Handler = Callable[[dict[str, Any], "Answer"], object]
"""handle(request, answer): answers now or later, once. Whatever it raises is answered as an error."""


class Answer:
    """The reply that a request waits for. The first of `ok` and `fail` counts."""

    __slots__ = ("_client", "_id", "done", "timer")

    def __init__(self, client: _Client, ident: object) -> None:
        self._client = client
        self._id = ident
        self.done = False
        self.timer: Timer | None = None
        """Cancelled with the answer."""

    @property
    def wanted(self) -> bool:
        """Whether somebody still waits."""
        return not self.done and not self._client.closed

    def ok(self, result: object = None) -> None:
        """It was done."""
        self._reply({"ok": True, "result": result})

    def fail(self, kind: str, text: str) -> None:
        """It was not: `kind` is one of those in docs/control.md, `text` one line for people."""
        self._reply({"ok": False, "kind": kind, "error": text})

    def _reply(self, reply: dict[str, object]) -> None:
        if self.done:
            return
        self.done = True
        if self.timer is not None:
            self.timer.cancel()
        if self._id is not None:
            reply["id"] = self._id
        self._client.answered(reply)


class _Client:
    """One connection."""

    def __init__(self, server: ControlSocket, sock: socket) -> None:
        self.closed = False
        self._server = server
        self._sock = sock
        self._in = bytearray()
        self._out = bytearray()
        self._busy: Answer | None = None
        self._turning = False
        self._last = False  # nothing more is read; closed when the last reply is out
        self._writable: Watched | None = None
        self._patience: Timer | None = None
        self._reader: Handle | None = server.loop.add_reader(sock.fileno(), self._read)

    def _read(self) -> None:
        try:
            data = self._sock.recv(MAX_LINE)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if not data:
            if self._hung_up():
                self.close()  # it takes no replies either
                return
            if self._in.strip():
                self._in += b"\n"  # the last request may lack it
                self._turn()
            self._end()
            return
        self._in += data
        self._turn()
        if len(self._in) > MAX_LINE and not self.closed:
            self._in.clear()
            answer, self._busy = self._busy, None
            if answer is not None:
                answer.done = True  # its reply would come behind the complaint
            self._complain(f"more than {MAX_LINE} bytes without a newline or ahead of a reply")
            self._end()

    def _hung_up(self) -> bool:
        """Whether the client has closed its end, not only ended its requests."""
        poller = select.poll()
        poller.register(self._sock.fileno(), 0)
        return any(events & (select.POLLHUP | select.POLLERR) for _fd, events in poller.poll(0))

    def _end(self) -> None:
        """No more requests: what was asked is still answered."""
        self._last = True
        if self._reader is not None:
            self._reader.remove()
            self._reader = None
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._last and self._busy is None and not self._out and b"\n" not in self._in:
            self.close()

    def _turn(self) -> None:
        """Take requests that are here, one after another's reply, and not too many at once."""
        if self._turning:
            return
        self._turning = True
        try:
            for _ in range(TURN):
                if self.closed or self._busy is not None or self._out:
                    return
                line, newline, rest = self._in.partition(b"\n")
                if not newline:
                    return
                self._in = rest
                if len(line) > MAX_LINE:
                    self._complain(f"a request of more than {MAX_LINE} bytes")
                elif line.strip():
                    self._request(bytes(line))
        finally:
            self._turning = False
        self._server.soon(self._go_on)

    def _go_on(self) -> None:
        self._turn()
        self._close_if_done()

    def _request(self, line: bytes) -> None:
        if self._hung_up():  # it gave up while this process stood still, and wants it no more
            self.close()
            return
        try:
            request = loads(line)
        except (ValueError, RecursionError) as error:
            self._complain(f"not a JSON object on one line: {error}")
            return
        if not isinstance(request, dict) or not isinstance(request.get("do"), str):
            self._complain('a request is an object with a text "do", such as {"do": "info"}')
            return
        ident = request.get("id")
        answer = self._busy = Answer(self, ident if isinstance(ident, str | int | None) else None)
        try:
            self._server.handle(request, answer)
        except Exception as error:
            # An operator's request must not end the guest, even if it finds a mistake of ours.
            answer.fail("internal", f"{request['do'][:40]}: {type(error).__name__}: {error}")

    def _complain(self, text: str) -> None:
        self._send({"ok": False, "kind": "usage", "error": text})

    def answered(self, reply: dict[str, object]) -> None:
        """The request under way has its reply; when that is out the next one is looked at."""
        self._busy = None
        self._send(reply)

    def _send(self, reply: dict[str, object]) -> None:
        if self.closed:
            return
        try:
            data = dumps(reply)
            why = f"a reply of {len(data)} bytes" if len(data) >= MAX_REPLY else ""
        except (TypeError, ValueError, RecursionError) as error:
            why = str(error)
        if why:
            data = dumps({"ok": False, "kind": "internal", "error": why, "id": reply.get("id")})
        self._out += data.encode() + b"\n"
        self._write()

    def _write(self) -> None:
        refused: OSError | None = None
        try:
            sent = self._sock.send(self._out)
        except OSError as error:
            if not is_temporary(error):
                self.close()
                return
            sent, refused = 0, error
        del self._out[:sent]
        if sent:
            self._be_patient(None)
        if self._out:
            self._wait_for_room(refused)
        else:
            self._stop_writing()
            if not self._turning:
                self._server.soon(self._go_on)

    def _wait_for_room(self, refused: OSError | None) -> None:
        try:
            if self._patience is None:
                self._be_patient(self._server.loop.call_later(READ_SECONDS, self.close))
            if self._writable is None:
                self._writable = self._server.watch.add(self._sock.fileno(), lambda _mask: self._write())
            self._writable.arm_to_send(refused)
        except (OSError, Stopped):
            self.close()

    def _be_patient(self, timer: Timer | None) -> None:
        before, self._patience = self._patience, timer
        if before is not None:
            before.cancel()

    def _stop_writing(self) -> None:
        writable, self._writable = self._writable, None
        if writable is not None:
            writable.remove()

    def close(self) -> None:
        """Idempotent; what is under way goes on, and its answer goes nowhere."""
        if self.closed:
            return
        self.closed = True
        if self._busy is not None and self._busy.timer is not None:
            self._busy.timer.cancel()  # else what it asked stays for as long as it was to wait
        self._be_patient(None)
        self._stop_writing()
        if self._reader is not None:
            self._reader.remove()
            self._reader = None
        self._sock.close()
        self._server.clients.discard(self)


class ControlSocket:
    """Serves `listener`, which is non-blocking and closed with this. Build it before or while `loop` runs.

    Raises OSError, Stopped; then the listener is still the caller's.
    """

    def __init__(self, listener: socket, loop: IoLoop, handle: Handler) -> None:
        self.handle = handle
        self.loop = loop
        self.clients: set[_Client] = set()
        self.watch = SocketWatch(loop)
        self._listener = listener
        try:
            self._acceptor = Acceptor(loop, listener, self._accepted)
        except BaseException:
            self.watch.close()
            raise

    def _accepted(self, sock: socket) -> None:
        if len(self.clients) >= MAX_CONNECTIONS:
            text = f"{MAX_CONNECTIONS} clients are connected already; try again later"
            with sock:
                try:
                    sock.send(b'{"ok": false, "kind": "busy", "error": "%s"}\n' % text.encode())
                except OSError:
                    return
            return
        self.clients.add(_Client(self, sock))

    def soon(self, fn: Callable[[], object]) -> None:
        """Defer to the loop; dropped if that has ended."""
        try:
            self.loop.call_soon(fn)
        except Stopped:
            return

    def close(self) -> None:
        """Drop every client and stop listening. Idempotent."""
        self._acceptor.close()
        for client in list(self.clients):
            client.close()
        self.watch.close()
        self._listener.close()
