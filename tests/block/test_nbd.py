"""NBD: with qemu-nbd and nbdkit as servers, with one that dies, and with one that lies."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from random import Random

import pytest
from disk_asker import SECONDS, Asker, page_buffer, read
from nbd_liar import Liar, reply, shake_hands, take
from nbd_servers import qemu_nbd, serving

from hvkvm.block.image import ImageOptions
from hvkvm.block.nbd import handshake, wire
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
