"""The host's end of a wire to a Linux guest: a TCP server, UDP echoes, frames as they are."""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from linux_guest import SECONDS

from hvkvm.net.wire import Wire

DATAGRAM_TRIES = 20
SOL_PACKET, PACKET_AUXDATA, TP_STATUS_VLAN_VALID = 263, 8, 1 << 4
"""linux/if_packet.h: what a raw socket tells beside a frame."""


def echo(address: tuple[str, int], sizes: list[int], sock: socket.socket | None = None) -> None:
    """UDP there and back with checksums, in these sizes, to one who sends back all that comes."""
    with sock or socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(2)
        for size in sizes:
            data = os.urandom(size)
            for _ in range(DATAGRAM_TRIES):  # the guest's program may not be there yet
                sock.sendto(data, address)
                with suppress(TimeoutError):
                    if sock.recv(65536) == data:
                        break
            else:
                raise AssertionError(f"no echo of {size} bytes by UDP")


class Peer:
    """A TCP server on the host for one connection, which `serve(socket)` has."""

    def __init__(self, host: str, serve: Callable[[socket.socket], Any]) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._server = socket.create_server((host, 0), family=family)
        self._server.settimeout(SECONDS)
        self.port = self._server.getsockname()[1]
        self._results: list[Any] = []
        self._thread = threading.Thread(target=self._run, args=(serve,))
        self._thread.start()

    def _run(self, serve: Callable[[socket.socket], Any]) -> None:
        try:
            sock, _address = self._server.accept()
            with sock:
                sock.settimeout(SECONDS)
                self._results.append(serve(sock))
        except OSError as error:
            self._results.append(error)

    def result(self) -> Any:
        """What `serve` returned, when it has."""
        self._thread.join()
        found = self._results[0]
        if isinstance(found, OSError):
            raise found
        return found

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        # Closing alone does not wake who waits in accept.
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join(SECONDS)
        self._server.close()


def received(sock: socket.socket) -> str:
    """The MD5 of all that comes."""
    digest = hashlib.md5()
    while data := sock.recv(1 << 18):
        digest.update(data)
    return digest.hexdigest()


class RawTap:
    """Hears the frames on the host's end of a wire, with their VLAN tags, and sends some."""

    def __init__(self, wire: Wire) -> None:
        self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self._sock.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        self._sock.bind((wire.inspect()["interface"], 3))
        self._sock.setblocking(False)

    def heard(self) -> list[tuple[int, bytes]]:
        """What was heard since the last look: each frame without its tag, and the VLAN of that, or 0."""
        found = []
        with suppress(BlockingIOError):
            while True:
                frame, control, _flags, _address = self._sock.recvmsg(65536, 256)
                vlan = 0
                for level, kind, data in control:
                    if level == SOL_PACKET and kind == PACKET_AUXDATA:
                        status, *_rest, tci, _tpid = struct.unpack("IIIHHHH", data[:20])
                        vlan = tci & 0xFFF if status & TP_STATUS_VLAN_VALID else 0
                found.append((vlan, frame))
        return found

    def send(self, frame: bytes) -> None:
        """A frame for the guest."""
        self._sock.send(frame)

    def ask(self, vlan: int, address: str, of: str) -> None:
        """An ARP request from `of` in a VLAN: who has `address`?"""
        mac = bytes.fromhex("02000000aaaa")
        question = bytes.fromhex("0001080006040001") + mac + socket.inet_aton(of)
        question += bytes(6) + socket.inet_aton(address)
        self.send(b"\xff" * 6 + mac + struct.pack(">HHH", 0x8100, vlan, 0x0806) + question)

    def __enter__(self) -> RawTap:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()
