"""An export of an NBD server as a disk: qemu-nbd and nbdkit bring formats and places that are none of ours.

When the connection ends, the image connects again, for `RECONNECT_SECONDS` at most. Every request of NBD
may be carried out twice without harm, so those that were in flight are sent again. What was written before
and not flushed may be lost with the server: the next flush fails and says so, as one after a failed write
does, and does not claim what nobody knows. Each piece of a write counts by itself, since a server may go
away between two of them. A server that does not come back makes requests fail as GONE.
"""

from __future__ import annotations

import errno
import threading
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING

from hvkvm.block.buffers import Buffers, Cutter, size_of, zeros
from hvkvm.block.image import Extent, ImageOptions
from hvkvm.block.nbd import wire
from hvkvm.block.nbd.connection import Connection, Lost
from hvkvm.block.nbd.handshake import Address, Export, connect
from hvkvm.block.request import PeerGone
from hvkvm.errors import HostExhausted, ImageError

if TYPE_CHECKING:
    import socket

RECONNECT_SECONDS = 30.0
SETTLE_SECONDS = 10.0
"""So long a server is given to make stable what it has, before it is left for its other size."""
FIRST_PAUSE = 0.05
LONGEST_PAUSE = 2.0
MAX_LENGTH = 1 << 30
"""Bytes that one request trims or zeroes at most; the protocol has 32 bits for them."""


class NbdImage:
    """The export at `address`. ImageError, PeerGone."""

    format = "nbd"

    def __init__(
        self, address: Address, options: ImageOptions, *, reconnect_seconds: float = RECONNECT_SECONDS
    ) -> None:
        self.address = address
        self._reconnect_seconds = reconnect_seconds
        sock, export = connect(address)
        try:
            self.sector_size = _sector_size(address, export, options)
            if export.flags & wire.READ_ONLY and not options.read_only:
                raise ImageError(f"{address}: its server lets nobody write; say readonly=on")
        except BaseException:
            sock.close()
            raise
        self.export = export
        self.size = export.size
        self.physical_sector_size = max(4096, self.sector_size)
        self.read_only = options.read_only
        self._discard = options.discard
        self._lock = threading.Lock()
        self._connecting = threading.Lock()
        self._closing = threading.Event()
        self._connection = self._connected(sock, export)
        self.reconnects = 0
        self._written = self._flushed = self._lost = 0
        """Pieces that a server has acknowledged; those up to which a flush covers them, and up to which some
        may be lost with a server (0: none). With `_lock`."""

    def readv(self, offset: int, buffers: Buffers) -> int:
        cutter = Cutter(buffers)
        n = size_of(buffers)
        for at in range(0, n, self.export.maximum):
            parts = cutter.take(min(self.export.maximum, n - at))
            self._call(wire.CMD_READ, offset + at, size_of(parts), fill=parts)
        return n

    def readv_now(self, offset: int, buffers: Buffers) -> int:
        return -1

    def writev_now(self, offset: int, buffers: Buffers) -> int:
        return -1

    def writev(self, offset: int, buffers: Buffers, *, fua: bool = False) -> int:
        cutter = Cutter(buffers)
        n = size_of(buffers)
        flags, flush = self._stable(fua)
        for at in range(0, n, self.export.maximum):
            parts = cutter.take(min(self.export.maximum, n - at))
            self._change(wire.CMD_WRITE, offset + at, size_of(parts), flags=flags, send=parts)
        if flush:
            self.flush()
        return n

    def flush(self) -> None:
        if self.read_only or not self.export.flags & wire.SEND_FLUSH:
            return
        with self._lock:
            written = self._written
        self._call(wire.CMD_FLUSH, 0, 0)
        with self._lock:
            self._flushed = max(self._flushed, written)
            unsure = self._lost > 0
            if written >= self._lost:  # else some were acknowledged since this began: the next flush's matter
                self._lost = 0
        if unsure:
            raise OSError(errno.EIO, "the server was away, and what was written before may be lost")

    def discard(self, offset: int, length: int) -> None:
        if self._discard and self.export.flags & wire.SEND_TRIM:
            for at in range(0, length, MAX_LENGTH):
                self._call(wire.CMD_TRIM, offset + at, min(MAX_LENGTH, length - at))

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        if self.export.flags & wire.SEND_WRITE_ZEROES:
            flags = 0 if may_unmap and self._discard else wire.CMD_FLAG_NO_HOLE
            for at in range(0, length, MAX_LENGTH):
                self._change(wire.CMD_WRITE_ZEROES, offset + at, min(MAX_LENGTH, length - at), flags=flags)
            return
        for at in range(0, length, self.export.maximum):
            self.writev(offset + at, zeros(min(self.export.maximum, length - at)))

    def resize(self, size: int) -> None:
        """A server's export has the size that the server gives it: it is looked at again."""
        self._settle()
        with self._connecting:  # what is in flight waits for it, and is sent again
            self._connection.close()
            self._again(allow_growth=True)
        if self.size != size:
            raise ImageError(f"{self.address}: has {self.size} bytes, not {size}; resize it at its server")

    def extents(self, offset: int, length: int) -> list[Extent]:
        return [Extent(offset, length, True)]

    def inspect(self) -> dict[str, object]:
        return {
            "format": self.format,
            "path": str(self.address),
            "size": self.size,
            "structured_replies": self.export.structured,
            "reconnects": self.reconnects,
        }

    def interrupt(self) -> None:
        """Wait for the server no more: what is in flight ends as GONE. Any thread."""
        self._closing.set()
        self._connection.end("the disk is closed")

    def close(self) -> None:
        self._closing.set()
        self._connection.close()

    def _stable(self, fua: bool) -> tuple[int, bool]:
        """The flags for a write that is to be stable when it is done, and whether a flush must follow."""
        if fua and self.export.flags & wire.SEND_FUA:
            return wire.CMD_FLAG_FUA, False
        return 0, fua

    def _settle(self) -> None:
        """Have a server that is still there flush, so that leaving it leaves nothing that may be lost."""
        with self._lock:
            written = self._written
            if written == self._flushed or not self.export.flags & wire.SEND_FLUSH:
                return
        with suppress(Lost, OSError):
            self._connection.call(wire.CMD_FLUSH, 0, 0, seconds=SETTLE_SECONDS)
            with self._lock:
                self._flushed = max(self._flushed, written)

    def _change(self, kind: int, offset: int, length: int, *, flags: int, send: Buffers = ()) -> None:
        """One request that changes data, counted when it is acknowledged. OSError, PeerGone."""
        connection = self._call(kind, offset, length, flags=flags, send=send)
        with self._lock:
            self._written += 1
            if connection is not self._connection:  # its server went away before this was counted
                self._lost = self._written

    def _call(
        self, kind: int, offset: int, length: int, *, flags: int = 0, send: Buffers = (), fill: Buffers = ()
    ) -> Connection:
        """One request, sent again on another connection if one is lost with it; the one that has answered.

        OSError, PeerGone.
        """
        until = monotonic() + self._reconnect_seconds
        while True:
            connection = self._connection
            try:
                connection.call(kind, offset, length, flags=flags, send=send, fill=fill)
                return connection
            except Lost as error:
                # Not for ever, either, with a server that comes back each time to fail at this request.
                if self._closing.is_set() or monotonic() > until:
                    raise PeerGone(f"{self.address}: {error}") from None
                self._reconnect(connection, str(error), until)

    def _reconnect(self, lost: Connection, why: str, until: float) -> None:
        with self._connecting:
            if self._connection is not lost:
                return  # another caller has done it
            pause = FIRST_PAUSE
            while True:
                try:
                    self._again(allow_growth=False)
                    return
                except PeerGone as error:
                    if monotonic() + pause > until:
                        raise PeerGone(f"{self.address}: {why}, and then: {error}") from None
                if self._closing.wait(pause):
                    raise PeerGone(f"{self.address}: closed")
                pause = min(2 * pause, LONGEST_PAUSE)

    def _again(self, *, allow_growth: bool) -> None:
        sock, export = connect(self.address)
        same = self.export._replace(size=export.size) if allow_growth else self.export
        if export != same:
            sock.close()
            raise ImageError(f"{self.address}: its server came back with another export")
        self.export = export
        self.size = export.size
        connection = self._connected(sock, export)
        with self._lock:  # so that what a server has acknowledged is counted before, or as another one's
            if self._written > self._flushed:
                self._lost = self._written
            self._connection = connection
        self.reconnects += 1
        if self._closing.is_set():  # who closed it meanwhile has ended the connection before
            connection.end("the disk is closed")

    def _connected(self, sock: socket.socket, export: Export) -> Connection:
        """PeerGone where the host has no thread for it: another attempt may find one."""
        try:
            return Connection(sock, export, f"{self.address}")
        except HostExhausted as error:
            raise PeerGone(f"{self.address}: {error}") from None


def _sector_size(address: Address, export: Export, options: ImageOptions) -> int:
    for size in (options.sector_size,) if options.sector_size else (512, 4096):
        if export.minimum <= size and export.size % size == 0:
            return size
    wish = f"sector={options.sector_size} does" if options.sector_size else "sectors of 512 or 4096 bytes do"
    what = f"has {export.size} bytes, and takes no less than {export.minimum} at once"
    raise ImageError(f"{address}: its server {what}: {wish} not fit")
