"""NBD: with qemu-nbd and nbdkit as servers, with one that dies, and with one that lies."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
from disk_asker import SECONDS, Asker, page_buffer, read
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nbd_servers import qemu_nbd, serving

from hvkvm.block.image import ImageOptions
from hvkvm.block.nbd import handshake, wire
from hvkvm.block.nbd import image as nbd_image
from hvkvm.block.nbd.handshake import Address, Export, parse_address
from hvkvm.block.nbd.image import NbdImage
from hvkvm.block.open_image import open_image
from hvkvm.block.request import Op, PeerGone, Request, Result, Status
from hvkvm.errors import ImageError

MIB = 1 << 20


def scribble(image: NbdImage, model: bytearray, random: Random, steps: int) -> None:
    for _ in range(steps):
        offset = random.randrange(len(model) // 512) * 512
        n = min(random.choice((512, 4096, 65536, MIB)), len(model) - offset)
        kind = random.random()
        if kind < 0.5:
            data = random.randbytes(n)
            image.writev(offset, [memoryview(data[:100]), memoryview(data[100:])], fua=random.random() < 0.2)
            model[offset : offset + n] = data
        elif kind < 0.65:
            image.write_zeroes(offset, n, may_unmap=random.random() < 0.5)
            model[offset : offset + n] = bytes(n)
        elif kind < 0.75:
            image.flush()
        else:
            assert read(image, offset, n) == model[offset : offset + n]


def test_qemu_nbd_brings_qcow2(tmp_path: Path) -> None:
    file, path = tmp_path / "disk.qcow2", tmp_path / "socket"
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(file), "8M"], check=True, timeout=SECONDS)
    model = bytearray(8 * MIB)
    with serving(qemu_nbd(file, path, "-x", "disk one", form="qcow2"), path):
        image = open_image(f"nbd:unix:{path}:exportname=disk one")
        assert isinstance(image, NbdImage)
        assert image.export.structured
        scribble(image, model, Random(1), 150)
        image.discard(0, MIB)
        image.flush()
        view = page_buffer(MIB)
        image.readv(0, [view])
        assert bytes(view) in (bytes(MIB), bytes(model[:MIB]))
        assert read(image, MIB, 7 * MIB) == model[MIB:]
        image.close()
        with pytest.raises(ImageError, match="it has no export of that name"):
            open_image(f"nbd:unix:{path}:exportname=disk two")


def test_nbdkit_with_simple_replies_over_tcp(tmp_path: Path) -> None:
    if shutil.which("nbdkit") is None:
        pytest.skip("nbdkit is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pid = tmp_path / "pid"
    command = ["nbdkit", "-f", "--no-sr", "-i", "127.0.0.1", "-p", str(port), "-P", str(pid), "memory", "4M"]
    with serving(command, pid):
        image = NbdImage(parse_address(f"nbd:127.0.0.1:{port}"), ImageOptions())
        assert not image.export.structured
        model = bytearray(4 * MIB)
        scribble(image, model, Random(2), 100)
        assert read(image, 0, 4 * MIB) == model
        image.close()


def test_a_read_only_export_is_not_written(tmp_path: Path) -> None:
    file, path = tmp_path / "disk.raw", tmp_path / "socket"
    file.write_bytes(bytes(MIB))
    with serving(qemu_nbd(file, path, "-r"), path):
        with pytest.raises(ImageError, match="say readonly=on"):
            open_image(f"nbd:unix:{path}")
        open_image(f"nbd:unix:{path}", ImageOptions(read_only=True)).close()
        snapshot = open_image(f"nbd:unix:{path}", ImageOptions(snapshot=True))
        snapshot.writev(4096, [page_buffer(512, b"x")])
        assert read(snapshot, 4096, 512) == b"x" * 512
        snapshot.close()


def test_requests_in_flight_survive_a_server_that_dies(tmp_path: Path, asker: Asker) -> None:
    file, path = tmp_path / "disk.raw", tmp_path / "socket"
    data = Random(4).randbytes(MIB)
    file.write_bytes(data)
    with serving(qemu_nbd(file, path), path) as first:
        image = NbdImage(Address(path=str(path)), ImageOptions())
        disk = asker.disk(image, width=6)
        reads = [(Op.READ, number * 4096, page_buffer(4096), {}) for number in range(200)]
        assert asker.ask(disk, Op.WRITE, 0, page_buffer(4096, data[:4096])).status is Status.OK
        first.send_signal(signal.SIGSTOP)  # what it is asked from now on stays in flight
        results: list[object] = []
        thread = threading.Thread(target=lambda: results.extend(asker.ask_all(disk, reads * 20)))
        thread.start()
        end = time.monotonic() + SECONDS
        while len(asker.workers.running()) < 6:
            assert time.monotonic() < end, disk.inspect()
            time.sleep(0.005)
        first.kill()
        first.wait()
        with serving(qemu_nbd(file, path), path):
            thread.join(SECONDS)
            assert len(results) == 4000
            assert all(result.status is Status.OK for result in results)  # type: ignore[attr-defined]
            assert all(bytes(view) == data[at : at + 4096] for _op, at, view, _more in reads)
            assert image.reconnects == 1
            # The write before was not flushed, and its server is gone: that is said once.
            result = asker.ask(disk, Op.FLUSH)
            assert result.status is Status.ERROR
            assert "may be lost" in result.detail
            assert asker.ask(disk, Op.FLUSH).status is Status.OK


def test_a_server_that_does_not_come_back_is_gone(tmp_path: Path, asker: Asker) -> None:
    file, path = tmp_path / "disk.raw", tmp_path / "socket"
    file.write_bytes(bytes(MIB))
    with serving(qemu_nbd(file, path), path) as server:
        image = NbdImage(Address(path=str(path)), ImageOptions(), reconnect_seconds=0.2)
        disk = asker.disk(image)
        server.kill()
        server.wait()
        for op, data in ((Op.READ, page_buffer(512)), (Op.WRITE, page_buffer(512)), (Op.FLUSH, None)):
            result = asker.ask(disk, op, 0, data)
            assert result.status is Status.GONE, result


def test_closing_ends_a_wait_for_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = threading.Event()

    def try_again(address: Address) -> tuple[socket.socket, Export]:
        tried.set()
        return handshake.connect(address)

    file, path = tmp_path / "disk.raw", tmp_path / "socket"
    file.write_bytes(bytes(MIB))
    with serving(qemu_nbd(file, path), path) as server:
        image = NbdImage(Address(path=str(path)), ImageOptions(), reconnect_seconds=SECONDS)
        server.kill()
        server.wait()
        monkeypatch.setattr("hvkvm.block.nbd.image.connect", try_again)
        closer = threading.Thread(target=lambda: (tried.wait(SECONDS), image.close()))
        closer.start()
        with pytest.raises(PeerGone, match=r": closed$"):
            image.readv(0, [page_buffer(512)])
        closer.join()


@pytest.mark.parametrize(
    "text", ["nbd:", "nbd:unix:", "nbd:host", "nbd:host:0", "nbd:host:x", "nbd::1", "nbd:h:70000"]
)
def test_bad_addresses(text: str) -> None:
    with pytest.raises(ImageError, match="say nbd:unix:PATH or nbd:HOST:PORT"):
        parse_address(text)


def test_good_addresses() -> None:
    assert parse_address("nbd:unix:/a/b:exportname=c") == Address(path="/a/b", export="c")
    assert parse_address("nbd:[::1]:10809") == Address(host="::1", port=10809)
    assert str(parse_address("nbd:host:1:exportname=x")) == "nbd:host:1:exportname=x"
    with pytest.raises(PeerGone, match="is the server running"):
        open_image("nbd:unix:/nowhere/at/all")


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


def test_an_export_may_have_a_name_that_is_no_text(tmp_path: Path) -> None:
    asked = []

    def talk(connection: socket.socket) -> None:
        connection.sendall(wire.greeting.pack(wire.NBDMAGIC, wire.IHAVEOPT, 3))
        take(connection, 4 + wire.option.size)
        connection.sendall(reply(wire.OPT_STRUCTURED_REPLY, wire.REP_ERROR + 1))
        _magic, _option, length = wire.option.unpack(take(connection, wire.option.size))
        asked.append(take(connection, length))
        connection.sendall(reply(wire.OPT_GO, wire.REP_ERROR + 6))

    liar = Liar(tmp_path / "liar", talk)
    try:
        with pytest.raises(ImageError):
            open_image(os.fsdecode(b"nbd:unix:%b:exportname=d\xff" % os.fsencode(tmp_path / "liar")))
    finally:
        liar.close()
    assert asked[0].startswith(b"\0\0\0\x02d\xff")


def test_a_server_that_never_answers_does_not_keep_a_disk_from_closing(tmp_path: Path, asker: Asker) -> None:
    asked = threading.Event()

    def talk(connection: socket.socket) -> None:
        shake_hands(connection)
        take(connection, wire.request.size)
        asked.set()
        while connection.recv(4096):
            pass

    liar = Liar(tmp_path / "liar", talk)
    try:
        image = NbdImage(Address(path=str(tmp_path / "liar")), ImageOptions())
        disk = asker.disk(image, hang_seconds=0.1)
        results: list[Result] = []
        asker.submit(disk, [Request(Op.READ, 0, [page_buffer(512)], results.append)])
        assert asked.wait(SECONDS)
        (closed,) = asker.wait(disk.close)
        assert [result.status for result in results] == [Status.GONE]
        assert closed.status is Status.GONE
    finally:
        liar.close()


def test_a_server_that_says_a_byte_now_and_then_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake, "SECONDS", 0.3)

    def talk(connection: socket.socket) -> None:
        stream = wire.greeting.pack(wire.NBDMAGIC, wire.IHAVEOPT, 3)
        stream += reply(wire.OPT_STRUCTURED_REPLY, wire.REP_ACK)
        stream += 60 * reply(wire.OPT_GO, wire.REP_INFO, bytes(64))
        for byte in stream:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)

    liar = Liar(tmp_path / "liar", talk)
    try:
        with pytest.raises(PeerGone, match=r"timed out: no NBD server has answered .*; see that one listens"):
            NbdImage(Address(path=str(tmp_path / "liar")), ImageOptions())
    finally:
        liar.close()


def test_a_reply_without_end_is_nonsense(tmp_path: Path) -> None:
    def talk(connection: socket.socket) -> None:
        shake_hands(connection)
        request = wire.request.unpack(take(connection, wire.request.size))
        head = wire.structured_head.pack(wire.STRUCTURED_MAGIC, 0, wire.REPLY_NONE, request[3])
        while True:  # until nobody takes it any more
            connection.sendall((head + bytes(4)) * 100)

    liar = Liar(tmp_path / "liar", talk)
    try:
        image = NbdImage(Address(path=str(tmp_path / "liar")), ImageOptions(), reconnect_seconds=0.0)
        with pytest.raises(PeerGone, match="chunks for one request"):
            image.readv(0, [page_buffer(512)])
        image.close()
    finally:
        liar.close()


def test_a_request_in_flight_is_sent_again_after_a_resize(tmp_path: Path) -> None:
    clients = 0
    asked = threading.Event()

    def talk(connection: socket.socket) -> None:
        nonlocal clients
        clients += 1
        shake_hands(connection, size=clients * MIB, structured=False)
        while request := wire.request.unpack(take(connection, wire.request.size)):
            _magic, _flags, kind, cookie, _offset, length = request
            if kind != wire.CMD_READ:
                return
            asked.set()
            if clients > 1:
                connection.sendall(wire.simple_reply.pack(wire.SIMPLE_MAGIC, 0, cookie) + b"r" * length)

    liar = Liar(tmp_path / "liar", talk)
    try:
        image = NbdImage(Address(path=str(tmp_path / "liar")), ImageOptions())
        view = page_buffer(512)
        reader = threading.Thread(target=lambda: image.readv(0, [view]))
        reader.start()
        assert asked.wait(SECONDS)
        image.resize(2 * MIB)
        reader.join(SECONDS)
        assert bytes(view) == b"r" * 512
        assert (image.size, image.reconnects, clients) == (2 * MIB, 1, 2)
        image.close()
    finally:
        liar.close()


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


@pytest.mark.parametrize("zeroes", [False, True], ids=["write", "write zeroes"])
def test_a_server_that_dies_between_two_pieces_of_a_write_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zeroes: bool
) -> None:
    monkeypatch.setattr("hvkvm.block.nbd.image.MAX_LENGTH", Forgetful.PIECE)
    server = Forgetful(tmp_path / "server", dies_behind=1)
    server.stable[:] = b"x" * len(server.stable)
    try:
        image = NbdImage(Address(path=str(tmp_path / "server")), ImageOptions())
        if zeroes:
            image.write_zeroes(0, 2 * Forgetful.PIECE)
        else:
            image.writev(0, [page_buffer(2 * Forgetful.PIECE, b"w")])
        assert image.reconnects == 1
        with pytest.raises(OSError, match="may be lost"):
            image.flush()
        assert server.stable[0] == ord("x")  # and rightly
        image.flush()
        image.close()
    finally:
        server.close()


def test_a_stable_write_fails_whose_first_piece_went_with_the_server(tmp_path: Path) -> None:
    server = Forgetful(tmp_path / "server", dies_behind=1)
    try:
        image = NbdImage(Address(path=str(tmp_path / "server")), ImageOptions())
        with pytest.raises(OSError, match="may be lost"):
            image.writev(0, [page_buffer(2 * Forgetful.PIECE, b"w")], fua=True)
        image.close()
    finally:
        server.close()


def test_a_write_that_is_counted_after_its_server_has_gone_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread may have connected again since it was acknowledged."""
    server = Forgetful(tmp_path / "server", dies_behind=1)
    try:
        image = NbdImage(Address(path=str(tmp_path / "server")), ImageOptions())
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
        image.close()
    finally:
        server.close()


def test_a_flush_leaves_to_the_next_what_was_lost_since_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Forgetful(tmp_path / "server", dies_behind=1)
    try:
        image = NbdImage(Address(path=str(tmp_path / "server")), ImageOptions())
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
        image.close()
    finally:
        server.close()


@pytest.mark.parametrize("dies", [True, False], ids=["dead", "alive"])
def test_a_resize_tells_what_went_with_the_server_and_flushes_one_that_is_there(
    tmp_path: Path, dies: bool
) -> None:
    server = Forgetful(tmp_path / "server", dies_behind=1 if dies else 2, larger=True)
    try:
        image = NbdImage(Address(path=str(tmp_path / "server")), ImageOptions())
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
        image.close()
    finally:
        server.close()


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
    try:
        image = NbdImage(Address(path=str(tmp_path / "server")), ImageOptions(), reconnect_seconds=0.2)
        image.writev(0, [page_buffer(512, b"w")])
        image.resize(MIB)
        assert asked.is_set()
        with pytest.raises(OSError, match="may be lost"):
            image.flush()
        image.close()
    finally:
        liar.close()


def test_a_socket_is_not_closed_under_who_sends(tmp_path: Path) -> None:
    """Its number may be another file's right after."""
    file, path = tmp_path / "disk.raw", tmp_path / "socket"
    file.write_bytes(bytes(MIB))
    with serving(qemu_nbd(file, path), path):
        image = NbdImage(Address(path=str(path)), ImageOptions())
        connection = image._connection
        with connection._sending:
            connection.end("a test")
            connection._thread.join(0.2)
            assert connection._thread.is_alive()
            assert connection._sock.fileno() >= 0
        connection._thread.join(SECONDS)
        assert connection._sock.fileno() == -1
        image.close()


def test_a_host_without_a_thread_for_it_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is one error where it stays so. No socket is left open."""
    file, path = tmp_path / "disk.raw", tmp_path / "socket"
    file.write_bytes(b"x" * MIB)
    refusals = 0
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with serving(qemu_nbd(file, path), path):
        before = len(os.listdir("/proc/self/fd"))
        refusals = 1
        with pytest.raises(PeerGone, match=r"^nbd:unix:.*: no thread for .*raise `ulimit -u`"):
            NbdImage(Address(path=str(path)), ImageOptions())
        assert len(os.listdir("/proc/self/fd")) == before
        image = NbdImage(Address(path=str(path)), ImageOptions())
        image._connection.end("a test")
        refusals = 2
        assert read(image, 0, 512) == b"x" * 512
        assert (refusals, image.reconnects) == (0, 1)
        image.close()
        assert len(os.listdir("/proc/self/fd")) == before


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_server_that_lies_in_the_handshake_is_one_error(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "liar"
    good = [
        wire.greeting.pack(wire.NBDMAGIC, wire.IHAVEOPT, 3),
        reply(wire.OPT_STRUCTURED_REPLY, wire.REP_ACK),
        reply(wire.OPT_GO, wire.REP_INFO, wire.info_export.pack(0, MIB, 0x6D)),
        reply(wire.OPT_GO, wire.REP_ACK),
    ]
    stream = bytearray(b"".join(good))
    for _ in range(data.draw(st.integers(1, 4))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(stream)))
    stream = stream[: cut if data.draw(st.booleans()) else len(stream)]

    def talk(connection: socket.socket) -> None:
        connection.sendall(stream)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass

    liar = Liar(path, talk)
    try:
        with suppress(ImageError):
            NbdImage(Address(path=str(path)), ImageOptions(), reconnect_seconds=0.0).close()
    finally:
        liar.close()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_server_that_lies_in_its_replies_never_harms_other_memory(
    tmp_path: Path, data: st.DataObject
) -> None:
    """The buffers of a request are filled with its data or not at all; what lies around them stays."""
    path = tmp_path / "liar"
    chunk = st.one_of(
        st.builds(
            lambda kind, flags, body, by, n: (
                wire.structured_head.pack(wire.STRUCTURED_MAGIC, flags, kind, 1 + by)
                + struct.pack(">I", n if n is not None else len(body))
                + body
            ),
            st.sampled_from((0, 1, 2, 3, 0x8001, 0x8002)),
            st.sampled_from((0, 1)),
            st.one_of(
                st.binary(max_size=40),
                st.builds(
                    lambda at, n: struct.pack(">Q", at) + bytes([7]) * n,
                    st.integers(0, 2048),
                    st.integers(0, 1024),
                ),
                st.builds(
                    lambda at, n: struct.pack(">QI", at, n), st.integers(0, 2048), st.integers(0, 2048)
                ),
            ),
            st.sampled_from((0, 0, 0, 1)),
            st.one_of(st.none(), st.none(), st.integers(0, 1 << 32 - 1).map(lambda n: n & 0xFFFFFFFF)),
        ),
        st.builds(
            lambda error, body, by: wire.simple_reply.pack(wire.SIMPLE_MAGIC, error, 1 + by) + body,
            st.sampled_from((0, 5, 28, 1 << 31)),
            st.binary(max_size=1500),
            st.sampled_from((0, 0, 1)),
        ),
        st.binary(min_size=1, max_size=60),
    )
    stream = b"".join(data.draw(st.lists(chunk, min_size=1, max_size=4)))

    def talk(connection: socket.socket) -> None:
        shake_hands(connection)
        take(connection, wire.request.size)
        connection.sendall(stream)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass

    liar = Liar(path, talk)
    memory = page_buffer(4096, b"\xaa")
    try:
        image = NbdImage(Address(path=str(path)), ImageOptions(), reconnect_seconds=0.0)
        with suppress(OSError, ImageError):
            image.readv(1024, [memory[1024:1536], memory[2048:2560]])
        image.close()
    finally:
        liar.close()
    around = bytes(memory[:1024]) + bytes(memory[1536:2048]) + bytes(memory[2560:])
    assert around == b"\xaa" * len(around)
