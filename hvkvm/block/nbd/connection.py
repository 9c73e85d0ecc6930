"""One connection to an NBD server: any number of requests in flight, each answered or lost with it.

A caller sends its request and waits; one thread takes the replies, data straight into the caller's buffers.
A thread of its own, because callers that all send while nobody receives would wait for the server for ever
once it waits for them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading

from hvkvm.block.buffers import IOV_MAX, Buffers, Cutter, clear, size_of
from hvkvm.block.nbd import wire
from hvkvm.block.nbd.handshake import Export
from hvkvm.block.nbd.incoming import Incoming
from hvkvm.runtime.kick import block_signals
from hvkvm.runtime.thread_start import start_thread

MORE_CHUNKS = 64
LEAST_CHUNK = 512
"""A reply has no more chunks than one for so many bytes, and MORE_CHUNKS: without end they would keep a
processor busy."""


class Lost(Exception):
    """The connection ended before the request was answered: whether it was carried out is not known."""


class _Pending:
    """A request in flight. `buffers` are touched by the receiving thread until `done` is released, once.

    A lock, since an Event has two of them and a list, all made and taken for one wait.
    """

    __slots__ = ("buffers", "chunks", "done", "error", "filled", "lost", "offset", "text")

    def __init__(self, offset: int, buffers: Buffers) -> None:
        self.offset = offset
        self.buffers = buffers
        self.done = threading.Lock()
        self.done.acquire()
        self.error = 0
        self.text = ""
        self.lost = ""
        self.filled = 0
        self.chunks = 0


class Connection:
    """A negotiated socket, which it owns. Any thread may call."""

    def __init__(self, sock: socket.socket, export: Export, name: str) -> None:
        """HostExhausted, and then the socket is closed."""
        self.export = export
        self._sock = sock
        self._incoming = Incoming(sock)
        self._pending: dict[int, _Pending] = {}
        self._cookie = 0
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._lost = ""
        self._thread = threading.Thread(target=self._receive, name=name, daemon=True)
        try:
            start_thread(self._thread)
        except BaseException:
            sock.close()
            raise

    @property
    def lost(self) -> str:
        """Why it ended; empty while it has not."""
        return self._lost

    def call(
        self,
        kind: int,
        offset: int,
        length: int,
        *,
        flags: int = 0,
        send: Buffers = (),
        fill: Buffers = (),
        seconds: float | None = None,
    ) -> None:
        """One request, and its answer. Lost; OSError with the server's error.

        A server that has not answered in `seconds` is waited for no more, by anybody.
        """
        pending = _Pending(offset, fill)
        with self._lock:
            if self._lost:
                raise Lost(self._lost)
            self._cookie += 1
            cookie = self._cookie
            self._pending[cookie] = pending
        head = wire.request.pack(wire.REQUEST_MAGIC, flags, kind, cookie, offset, length)
        try:
            with self._sending:
                _send(self._sock, [memoryview(head), *send])
        except OSError as error:
            self.end(f"sending failed: {error.strerror or error}")
        if not pending.done.acquire(timeout=-1 if seconds is None else seconds):
            self.end(f"no answer within {seconds:g} s")
            pending.done.acquire()
        if pending.lost:
            raise Lost(pending.lost)
        if pending.error:
            number = pending.error if pending.error in wire.ERRNOS else wire.EIO
            raise OSError(number, pending.text or f"the server says: {os.strerror(number)}")

    def close(self) -> None:
        """Say goodbye and end; what is in flight is lost. Idempotent."""
        # Without waiting, for a sender that the server keeps waiting, or for room to send.
        if not self._lost and self._sending.acquire(blocking=False):
            with contextlib.suppress(OSError):
                goodbye = wire.request.pack(wire.REQUEST_MAGIC, 0, wire.CMD_DISC, 0, 0, 0)
                self._sock.send(goodbye, socket.MSG_DONTWAIT)
            self._sending.release()
        self.end("closed")
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def end(self, why: str) -> None:
        """Nothing is sent any more, and the receiving thread comes to its end: what is in flight is lost."""
        with self._lock, contextlib.suppress(OSError):
            self._lost = self._lost or why
            self._sock.shutdown(socket.SHUT_RDWR)

    # The receiving thread.

    def _receive(self) -> None:
        block_signals()
        why = ""
        try:
            while True:
                self._one_reply()
        except OSError as error:
            why = error.strerror or str(error)
        except _Nonsense as error:
            why = f"its server answers nonsense: {error}"
        except BaseException as error:
            why = f"{type(error).__name__}: {error}"
        with self._lock:
            self._lost = self._lost or why
            pending = list(self._pending.values())
            self._pending.clear()
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)  # so nobody waits in a send
        # Its number may be another file's right after, which nobody may send to or shut down in its place.
        with self._sending, self._lock:
            self._sock.close()
        # Only now, when nobody here touches a buffer any more.
        for one in pending:
            one.lost = self._lost
            one.done.release()

    def _one_reply(self) -> None:
        head = self._incoming.take(wire.simple_reply.size)
        magic = int.from_bytes(head[:4], "big")
        if magic == wire.SIMPLE_MAGIC:
            _magic, error, cookie = wire.simple_reply.unpack(head)
            pending = self._of(cookie)
            pending.error = error
            if not error:
                self._fill(pending, 0, size_of(pending.buffers))
            self._finish(cookie, pending)
        elif magic == wire.STRUCTURED_MAGIC and self.export.structured:
            _magic, flags, kind, cookie = wire.structured_head.unpack(head)
            length = int.from_bytes(self._incoming.take(4), "big")
            pending = self._of(cookie)
            pending.chunks += 1
            if pending.chunks > MORE_CHUNKS + size_of(pending.buffers) // LEAST_CHUNK:
                raise _Nonsense(f"{pending.chunks} chunks for one request")
            self._chunk(pending, kind, length)
            if flags & wire.REPLY_FLAG_DONE:
                if not pending.error and pending.filled < size_of(pending.buffers):
                    raise _Nonsense("a read with data missing")
                self._finish(cookie, pending)
        else:
            raise _Nonsense(f"magic {magic:#x}")

    def _chunk(self, pending: _Pending, kind: int, length: int) -> None:
        if kind & wire.REPLY_IS_ERROR:
            if not wire.error_chunk.size <= length <= wire.error_chunk.size + wire.MAX_ERROR_TEXT:
                raise _Nonsense("an error of that length")
            data = self._incoming.take(length)
            error, text = wire.error_chunk.unpack_from(data)
            pending.error = error or wire.EIO
            pending.text = data[wire.error_chunk.size :][:text].decode(errors="replace")
        elif kind == wire.REPLY_OFFSET_DATA and length > 8:
            offset = int.from_bytes(self._incoming.take(8), "big")
            self._fill(pending, offset - pending.offset, length - 8)
        elif kind == wire.REPLY_OFFSET_HOLE and length == wire.offset_hole.size:
            offset, n = wire.offset_hole.unpack(self._incoming.take(length))
            clear(self._part(pending, offset - pending.offset, n))
        elif kind != wire.REPLY_NONE or length:
            raise _Nonsense(f"a chunk of type {kind} and {length} bytes")

    def _part(self, pending: _Pending, at: int, n: int) -> list[memoryview]:
        if at < 0 or at + n > size_of(pending.buffers):
            raise _Nonsense("data that was not asked for")
        pending.filled += n
        cutter = Cutter(pending.buffers)
        cutter.take(at)
        return cutter.take(n)

    def _fill(self, pending: _Pending, at: int, n: int) -> None:
        self._incoming.fill(self._part(pending, at, n), n)

    def _of(self, cookie: int) -> _Pending:
        with self._lock:
            pending = self._pending.get(cookie)
        if pending is None:
            raise _Nonsense("a reply to nothing that was asked")
        return pending

    def _finish(self, cookie: int, pending: _Pending) -> None:
        with self._lock:
            del self._pending[cookie]
        pending.done.release()


class _Nonsense(Exception):
    """The server broke the protocol."""


def _send(sock: socket.socket, buffers: list[memoryview]) -> None:
    left = size_of(buffers)
    while left:
        sent = sock.sendmsg(buffers[:IOV_MAX])
        left -= sent
        if left:
            rest = Cutter(buffers)
            rest.take(sent)
            buffers = rest.take(left)
