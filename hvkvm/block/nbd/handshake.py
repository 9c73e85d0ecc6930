"""How an export of an NBD server is opened: fixed newstyle, structured replies where the server has them."""

from __future__ import annotations

import os
import socket
from time import monotonic

from hvkvm.block.nbd import wire
from hvkvm.block.request import PeerGone
from hvkvm.errors import ImageError
from hvkvm.tuples import NamedTuple

SECONDS = 10.0
"""A server that has not opened the export by then is none, whether it says nothing or a byte now and then."""


class Address(NamedTuple):
    """Where an export is: a Unix socket's `path`, or `host` and `port`."""

    path: str = ""
    host: str = ""
    port: int = 0
    export: str = ""

    def __str__(self) -> str:
        place = f"unix:{self.path}" if self.path else f"{self.host}:{self.port}"
        return f"nbd:{place}" + (f":exportname={self.export}" if self.export else "")


class Export(NamedTuple):
    """What the server says of it; sizes in bytes."""

    size: int
    flags: int
    minimum: int
    maximum: int
    structured: bool


def parse_address(text: str) -> Address:
    """QEMU's spelling: nbd:unix:PATH, nbd:HOST:PORT, each with :exportname=NAME behind it. ImageError."""
    place, _, export = text.removeprefix("nbd:").partition(":exportname=")
    if place.startswith("unix:") and len(place) > len("unix:"):
        return Address(path=place.removeprefix("unix:"), export=export)
    host, _, port = place.rpartition(":")
    if not host or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ImageError(f"{text}: say nbd:unix:PATH or nbd:HOST:PORT, with :exportname=NAME if it has one")
    return Address(host=host.removeprefix("[").removesuffix("]"), port=int(port), export=export)


def connect(address: Address) -> tuple[socket.socket, Export]:
    """A socket in the transmission phase. PeerGone if nobody is there, ImageError if it will not."""
    try:
        if address.path:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(SECONDS)
            try:
                sock.connect(address.path)
            except BaseException:
                sock.close()
                raise
        else:
            sock = socket.create_connection((address.host, address.port), SECONDS)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise PeerGone(f"{address}: {why}; is the server running?") from None
    try:
        export = _negotiate(_Talk(sock, monotonic() + SECONDS), address)
        sock.settimeout(None)
    except TimeoutError:
        sock.close()
        raise PeerGone(
            f"{address}: timed out: no NBD server has answered within {SECONDS:g} s; see that one listens"
            " there, and that it serves one more client (qemu-nbd --shared=2)"
        ) from None
    except OSError as error:
        sock.close()
        raise PeerGone(f"{address}: {error.strerror or error}") from None
    except BaseException:
        sock.close()
        raise
    return sock, export


def receive_some(sock: socket.socket, view: memoryview) -> int:
    """Fill some of `view`: how much. OSError when the server closes."""
    got = sock.recv_into(view)
    if not got:
        raise ConnectionResetError("the server closed the connection")
    return got


class _Talk(NamedTuple):
    """The handshake's socket, and until when it may take."""

    sock: socket.socket
    until: float

    def send(self, data: bytes) -> None:
        """All of it. OSError."""
        self.sock.settimeout(self._left())
        self.sock.sendall(data)

    def receive(self, n: int) -> bytes:
        """Exactly `n` bytes. OSError."""
        data = bytearray(n)
        view = memoryview(data)
        while view:
            self.sock.settimeout(self._left())
            view = view[receive_some(self.sock, view) :]
        return bytes(data)

    def _left(self) -> float:
        left = self.until - monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        return left


def _negotiate(talk: _Talk, address: Address) -> Export:
    magic, kind, flags = wire.greeting.unpack(talk.receive(wire.greeting.size))
    if magic != wire.NBDMAGIC:
        raise ImageError(f"{address}: that is no NBD server")
    if kind != wire.IHAVEOPT or not flags & wire.FLAG_FIXED_NEWSTYLE:
        raise ImageError(f"{address}: its server speaks only the old handshake; use qemu-nbd or nbdkit")
    no_zeroes = flags & wire.FLAG_NO_ZEROES
    talk.send((wire.FLAG_FIXED_NEWSTYLE | no_zeroes).to_bytes(4, "big"))
    structured = _ask(talk, address, wire.OPT_STRUCTURED_REPLY, b"")[0] == wire.REP_ACK
    name = os.fsencode(address.export)  # as the command line has it, text or not
    wanted = wire.INFO_BLOCK_SIZE.to_bytes(2, "big")
    data = len(name).to_bytes(4, "big") + name + (1).to_bytes(2, "big") + wanted
    size = transmission = 0
    minimum, maximum = 1, wire.MAX_PAYLOAD
    told = False
    kind, answer = _ask(talk, address, wire.OPT_GO, data)
    for _ in range(64):
        if kind == wire.REP_ACK:
            break
        if kind & wire.REP_ERROR:
            why = wire.REP_ERRORS.get(kind, f"error {kind:#x}")
            raise ImageError(f"{address}: the server will not open export '{address.export}': {why}")
        if kind == wire.REP_INFO and len(answer) >= wire.info_export.size and answer[:2] == b"\0\0":
            _type, size, transmission = wire.info_export.unpack_from(answer)
            told = True
        elif kind == wire.REP_INFO and len(answer) >= wire.info_block_size.size and answer[:2] == wanted:
            _type, minimum, _preferred, maximum = wire.info_block_size.unpack_from(answer)
        kind, answer = _answer(talk, address, wire.OPT_GO)
    else:
        raise ImageError(f"{address}: its server tells without end")
    if not told or size >= 1 << 63:
        raise ImageError(f"{address}: its server does not say how large the export is")
    maximum = min(maximum or wire.MAX_PAYLOAD, wire.MAX_PAYLOAD)
    return Export(size, transmission, max(1, minimum), maximum, structured)


def _ask(talk: _Talk, address: Address, option: int, data: bytes) -> tuple[int, bytes]:
    talk.send(wire.option.pack(wire.IHAVEOPT, option, len(data)) + data)
    return _answer(talk, address, option)


def _answer(talk: _Talk, address: Address, option: int) -> tuple[int, bytes]:
    magic, asked, kind, length = wire.option_reply.unpack(talk.receive(wire.option_reply.size))
    if magic != wire.REPLY_MAGIC or asked != option or length > wire.MAX_REPLY:
        raise ImageError(f"{address}: its server answers nonsense")
    return kind, talk.receive(length)
