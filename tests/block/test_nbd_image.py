"""What an NBD image asks of its server for each operation, by what the server says that it can."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest
from disk_asker import page_buffer

from hvkvm.block.image import ImageOptions
from hvkvm.block.nbd import image as nbd_image
from hvkvm.block.nbd import wire
from hvkvm.block.nbd.handshake import Address, Export
from hvkvm.block.nbd.image import MAX_LENGTH, NbdImage
from hvkvm.errors import ImageError

MIB = 1 << 20
ALL = wire.HAS_FLAGS | wire.SEND_FLUSH | wire.SEND_FUA | wire.SEND_TRIM | wire.SEND_WRITE_ZEROES
Asked = tuple[int, int, int, int]
"""Kind, offset, length and flags."""


class Server:
    """Notes each request, keeps what is written, and answers all as done."""

    def __init__(self) -> None:
        self.export = Export(8 * MIB, ALL, 1, MIB, True)
        self.asked: list[Asked] = []
        self.data = bytearray(b"\xa5" * (8 * MIB))
        self.sockets: list[socket.socket] = []

    def connect(self, _address: Address) -> tuple[socket.socket, Export]:
        ours, theirs = socket.socketpair()
        theirs.close()
        self.sockets.append(ours)
        return ours, self.export

    def take(self) -> list[Asked]:
        """What was asked since this was called last."""
        asked, self.asked = self.asked, []
        return asked


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()

    class Connection:
        def __init__(self, sock: socket.socket, _export: Export, _name: str) -> None:
            self._sock = sock

        def call(
            self,
            kind: int,
            offset: int,
            length: int,
            *,
            flags: int = 0,
            send: Any = (),
            fill: Any = (),
            **_: Any,
        ) -> None:
            server.asked.append((kind, offset, length, flags))
            for view in fill:
                view[:] = server.data[offset : offset + len(view)]
                offset += len(view)
            for view in send:
                server.data[offset : offset + len(view)] = view
                offset += len(view)

        def close(self) -> None:
            self._sock.close()

    monkeypatch.setattr(nbd_image, "connect", server.connect)
    monkeypatch.setattr(nbd_image, "Connection", Connection)
    return server


@pytest.fixture
def opened(server: Server, request: pytest.FixtureRequest) -> Callable[..., NbdImage]:
    def opened(flags: int = ALL, maximum: int = MIB, **options: Any) -> NbdImage:
        server.export = server.export._replace(flags=flags, maximum=maximum)
        image = NbdImage(Address(path="there"), ImageOptions(**options))
        request.addfinalizer(image.close)
        return image

    return opened


def test_data_goes_in_pieces_that_the_server_takes(server: Server, opened: Callable[..., NbdImage]) -> None:
    image = opened(maximum=4096)
    data = bytes(range(250)) * 40
    assert image.writev(512, [memoryview(data[:100]), memoryview(data[100:])]) == 10000
    pieces = [(512, 4096), (4608, 4096), (8704, 1808)]
    assert server.take() == [(wire.CMD_WRITE, at, n, 0) for at, n in pieces]
    view = page_buffer(10000)
    assert image.readv(512, [view[:5000], view[5000:]]) == 10000
    assert bytes(view) == data
    assert server.take() == [(wire.CMD_READ, at, n, 0) for at, n in pieces]


@pytest.mark.parametrize("can", [wire.SEND_FUA, 0])
def test_a_stable_write_is_one_by_its_flag_or_a_flush(
    server: Server, opened: Callable[..., NbdImage], can: int
) -> None:
    image = opened(wire.HAS_FLAGS | wire.SEND_FLUSH | can)
    image.writev(0, [page_buffer(512)], fua=True)
    if can:
        assert server.take() == [(wire.CMD_WRITE, 0, 512, wire.CMD_FLAG_FUA)]
    else:
        assert server.take() == [(wire.CMD_WRITE, 0, 512, 0), (wire.CMD_FLUSH, 0, 0, 0)]
    image.writev(0, [page_buffer(512)])
    assert server.take() == [(wire.CMD_WRITE, 0, 512, 0)]


def test_only_what_is_written_is_flushed_where_the_server_can(
    server: Server, opened: Callable[..., NbdImage]
) -> None:
    for flags, read_only, asked in (
        (ALL, False, [(wire.CMD_FLUSH, 0, 0, 0)]),
        (ALL, True, []),
        (wire.HAS_FLAGS, False, []),
    ):
        opened(flags, read_only=read_only).flush()
        assert server.take() == asked


@pytest.mark.parametrize("length", [4096, MAX_LENGTH, 2 * MAX_LENGTH + 4096])
def test_space_is_given_back_only_where_that_is_allowed(
    server: Server, opened: Callable[..., NbdImage], length: int
) -> None:
    parts = [(at, min(MAX_LENGTH, length - at)) for at in range(0, length, MAX_LENGTH)]
    for flags, discard, trims in (
        (ALL, True, True),
        (ALL, False, False),
        (ALL & ~wire.SEND_TRIM, True, False),
    ):
        opened(flags, discard=discard).discard(512, length)
        assert server.take() == [(wire.CMD_TRIM, 512 + at, n, 0) for at, n in parts if trims]
    for discard, may_unmap in ((True, True), (True, False), (False, True)):
        opened(discard=discard).write_zeroes(512, length, may_unmap=may_unmap)
        kept = 0 if discard and may_unmap else wire.CMD_FLAG_NO_HOLE
        assert server.take() == [(wire.CMD_WRITE_ZEROES, 512 + at, n, kept) for at, n in parts]


def test_a_server_without_zeros_is_sent_some(server: Server, opened: Callable[..., NbdImage]) -> None:
    opened(ALL & ~wire.SEND_WRITE_ZEROES).write_zeroes(512, 2 * MIB + 512)
    assert [(kind, at, n) for kind, at, n, _flags in server.take()] == [
        (wire.CMD_WRITE, 512, MIB),
        (wire.CMD_WRITE, 512 + MIB, MIB),
        (wire.CMD_WRITE, 512 + 2 * MIB, 512),
    ]
    assert server.data[:512] == b"\xa5" * 512
    assert server.data[512 : 2 * MIB + 1024] == bytes(2 * MIB + 512)
    assert server.data[2 * MIB + 1024 :] == b"\xa5" * (6 * MIB - 1024)


def test_an_export_that_is_refused_is_let_go(server: Server, opened: Callable[..., NbdImage]) -> None:
    with pytest.raises(ImageError, match="its server lets nobody write; say readonly=on"):
        opened(ALL | wire.READ_ONLY)
    assert server.sockets[-1].fileno() == -1
    assert opened(ALL | wire.READ_ONLY, read_only=True).read_only
    server.export = server.export._replace(minimum=4096)
    with pytest.raises(ImageError, match="takes no less than 4096 at once: sector=512 does not fit"):
        opened(sector_size=512)
    assert opened().sector_size == 4096
    server.export = server.export._replace(size=8 * MIB + 100)
    with pytest.raises(ImageError, match="sectors of 512 or 4096 bytes do not fit"):
        opened()


def test_a_size_is_the_servers_and_nothing_else_may_change(
    server: Server, opened: Callable[..., NbdImage]
) -> None:
    image = opened()
    with pytest.raises(ImageError, match=f"has {8 * MIB} bytes, not {9 * MIB}; resize it at its server"):
        image.resize(9 * MIB)
    server.export = server.export._replace(size=9 * MIB)
    image.resize(9 * MIB)
    assert (image.size, image.reconnects) == (9 * MIB, 2)
    server.export = server.export._replace(size=10 * MIB, flags=wire.HAS_FLAGS)
    with pytest.raises(ImageError, match="came back with another export"):
        image.resize(10 * MIB)
    assert server.sockets[-1].fileno() == -1
    assert image.size == 9 * MIB
