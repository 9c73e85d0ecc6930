"""An NBD server whose every byte a test chooses, and the handshake as it should be."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from disk_asker import SECONDS

from hvkvm.block.nbd import wire

MIB = 1 << 20


class Liar:
    """A server whose every byte the test chooses. `talk(connection)` is called once for each client."""

    def __init__(self, path: Path, talk: Callable[[socket.socket], None]) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        path.unlink(missing_ok=True)
        self.listener.bind(str(path))
        self.listener.listen()
        self._talk = talk
        self._thread = threading.Thread(target=self._main)
        self._thread.start()

    def _main(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                with connection, suppress(OSError, struct.error):
                    connection.settimeout(SECONDS)
                    self._talk(connection)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self._thread.join()


def take(connection: socket.socket, n: int) -> bytes:
    data = b""
    while len(data) < n:
        got = connection.recv(n - len(data))
        if not got:
            raise OSError("gone")
        data += got
    return data


def reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return wire.option_reply.pack(wire.REPLY_MAGIC, option, kind, len(data)) + data


def shake_hands(
    connection: socket.socket,
    *,
    size: int = MIB,
    structured: bool = True,
    flags: int = 0x6D,
    maximum: int = 0,
) -> None:
    """The handshake, as it should be."""
    connection.sendall(wire.greeting.pack(wire.NBDMAGIC, wire.IHAVEOPT, 3))
    take(connection, 4)
    take(connection, wire.option.size)
    connection.sendall(reply(wire.OPT_STRUCTURED_REPLY, wire.REP_ACK if structured else wire.REP_ERROR + 1))
    _magic, _option, length = wire.option.unpack(take(connection, wire.option.size))
    take(connection, length)
    connection.sendall(reply(wire.OPT_GO, wire.REP_INFO, wire.info_export.pack(0, size, flags)))
    if maximum:
        limits = wire.info_block_size.pack(wire.INFO_BLOCK_SIZE, 1, 4096, maximum)
        connection.sendall(reply(wire.OPT_GO, wire.REP_INFO, limits))
    connection.sendall(reply(wire.OPT_GO, wire.REP_ACK))
