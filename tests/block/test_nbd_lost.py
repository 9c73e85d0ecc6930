"""What an NBD server had acknowledged and not made stable when it died: each loss is told of, once."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from disk_asker import SECONDS, page_buffer
from nbd_liar import Liar, shake_hands, take

from hvkvm.block.image import ImageOptions
from hvkvm.block.nbd import image as nbd_image
from hvkvm.block.nbd import wire
from hvkvm.block.nbd.handshake import Address
from hvkvm.block.nbd.image import NbdImage
from hvkvm.block.request import PeerGone

MIB = 1 << 20


class Forgetful(Liar):
    """A server with a cache that only a flush makes stable: it dies with it behind the first `dies_behind`
    changes, and comes back, `larger`."""

    PIECE = 4096

    def __init__(self, path: Path, *, dies_behind: int, flags: int = 0x45, larger: bool = False) -> None:
        self.stable = bytearray(2 * MIB)
        self.dead = threading.Event()
        self._dies_behind = dies_behind
        self._flags = flags
        self._larger = larger
        super().__init__(path, self._serve)

    def _serve(self, connection: socket.socket) -> None:
        again = self.dead.is_set()
        size = 2 * MIB if again and self._larger else MIB
        shake_hands(connection, size=size, structured=False, flags=self._flags, maximum=self.PIECE)
        cache = bytearray(self.stable)
        changes = 0
        while True:
            head = wire.request.unpack(take(connection, wire.request.size))
            _magic, _flags, kind, cookie, offset, length = head
            if kind == wire.CMD_DISC:
                return
            if kind in (wire.CMD_WRITE, wire.CMD_WRITE_ZEROES):
                data = take(connection, length) if kind == wire.CMD_WRITE else bytes(length)
                cache[offset : offset + length] = data
                changes += 1
            elif kind == wire.CMD_FLUSH:
                self.stable[:] = cache
            connection.sendall(wire.simple_reply.pack(wire.SIMPLE_MAGIC, 0, cookie))
            if changes == self._dies_behind and not again:
                connection.close()
                self.dead.set()
                return


@contextmanager
def image_of(server: Liar, **options: float) -> Iterator[NbdImage]:
    """The image that it serves. At the end both are closed."""
    try:
        image = NbdImage(Address(path=server.listener.getsockname()), ImageOptions(), **options)
        yield image
        image.close()
    finally:
        server.close()


@pytest.mark.parametrize("zeroes", [False, True], ids=["write", "write zeroes"])
def test_a_server_that_dies_between_two_pieces_of_a_write_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zeroes: bool
) -> None:
    monkeypatch.setattr("hvkvm.block.nbd.image.MAX_LENGTH", Forgetful.PIECE)
    server = Forgetful(tmp_path / "server", dies_behind=1)
    server.stable[:] = b"x" * len(server.stable)
    with image_of(server) as image:
        if zeroes:
            image.write_zeroes(0, 2 * Forgetful.PIECE)
        else:
            image.writev(0, [page_buffer(2 * Forgetful.PIECE, b"w")])
        assert image.reconnects == 1
        with pytest.raises(OSError, match="may be lost"):
            image.flush()
        assert server.stable[0] == ord("x")  # and rightly
        image.flush()


def test_a_stable_write_fails_whose_first_piece_went_with_the_server(tmp_path: Path) -> None:
    server = Forgetful(tmp_path / "server", dies_behind=1)
    with image_of(server) as image:
        with pytest.raises(OSError, match="may be lost"):
            image.writev(0, [page_buffer(2 * Forgetful.PIECE, b"w")], fua=True)


def test_a_write_that_is_counted_after_its_server_has_gone_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread may have connected again since it was acknowledged."""
    server = Forgetful(tmp_path / "server", dies_behind=1)
    with image_of(server) as image:
        call = image._call

        def late(kind: int, *arguments: object, **more: object) -> object:
            answered = call(kind, *arguments, **more)  # type: ignore[arg-type]
            if kind == wire.CMD_WRITE:
                assert server.dead.wait(SECONDS)
                call(wire.CMD_TRIM, 0, 512)
                assert image.reconnects == 1
            return answered

        monkeypatch.setattr(image, "_call", late)
        image.writev(0, [page_buffer(512, b"w")])
        with pytest.raises(OSError, match="may be lost"):
            image.flush()


def test_a_flush_leaves_to_the_next_what_was_lost_since_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Forgetful(tmp_path / "server", dies_behind=1)
    with image_of(server) as image:
        call = image._call

        def meanwhile(kind: int, *arguments: object, **more: object) -> object:
            if kind == wire.CMD_FLUSH and not server.dead.is_set():
                image.writev(0, [page_buffer(512, b"w")])
                assert server.dead.wait(SECONDS)
            return call(kind, *arguments, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(image, "_call", meanwhile)
        for _ in range(2):
            with pytest.raises(OSError, match="may be lost"):
                image.flush()
        image.flush()


@pytest.mark.parametrize("dies", [True, False], ids=["dead", "alive"])
def test_a_resize_tells_what_went_with_the_server_and_flushes_one_that_is_there(
    tmp_path: Path, dies: bool
) -> None:
    server = Forgetful(tmp_path / "server", dies_behind=1 if dies else 2, larger=True)
    with image_of(server) as image:
        image.writev(0, [page_buffer(512, b"w")])
        if dies:
            assert server.dead.wait(SECONDS)
            image.resize(2 * MIB)
            with pytest.raises(OSError, match="may be lost"):
                image.flush()
        else:
            image.resize(MIB)
            assert server.stable[0] == ord("w")
        assert image.reconnects == 1
        image.flush()


def test_a_resize_waits_so_long_for_a_server_that_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked to make stable what it has, and may never answer."""
    asked = threading.Event()

    def talk(connection: socket.socket) -> None:
        shake_hands(connection, structured=False)
        *_, cookie, _at, length = wire.request.unpack(take(connection, wire.request.size))
        if not asked.is_set():
            take(connection, length)
        connection.sendall(wire.simple_reply.pack(wire.SIMPLE_MAGIC, 0, cookie))
        if asked.is_set():  # it is there again, without what it had
            return
        take(connection, wire.request.size)
        asked.set()
        while connection.recv(4096):
            pass

    liar = Liar(tmp_path / "server", talk)
    monkeypatch.setattr(nbd_image, "SETTLE_SECONDS", 0.1)
    with image_of(liar, reconnect_seconds=0.2) as image:
        image.writev(0, [page_buffer(512, b"w")])
        image.resize(MIB)
        assert asked.is_set()
        with pytest.raises(OSError, match="may be lost"):
            image.flush()


@pytest.mark.parametrize("how", ["interrupt", "close"])
def test_who_closes_while_it_connects_again_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The connection that was new then was asked, without a limit, and its server need not answer."""
    talks: list[socket.socket] = []

    def talk(connection: socket.socket) -> None:
        talks.append(connection)
        shake_hands(connection)
        if len(talks) == 1:
            take(connection, wire.request.size)  # and goes away with it
        else:
            while connection.recv(4096):
                pass  # takes all, answers nothing

    connecting, go_on = threading.Event(), threading.Event()
    heard: list[object] = []
    with image_of(Liar(tmp_path / "nbd", talk), reconnect_seconds=SECONDS) as image:
        connect = nbd_image.connect

        def slow(address: Address) -> object:
            found = connect(address)
            connecting.set()
            assert go_on.wait(SECONDS)
            return found

        monkeypatch.setattr(nbd_image, "connect", slow)

        def ask() -> None:
            try:
                image.readv(0, [page_buffer(512)])
            except PeerGone as error:
                heard.append(error)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        assert connecting.wait(SECONDS)
        getattr(image, how)()
        go_on.set()
        asking.join(SECONDS)
    assert len(heard) == 1
