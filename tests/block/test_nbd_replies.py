"""Each reply that an NBD server may give, and what its caller gets; what is no reply ends the connection."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from disk_asker import SECONDS, page_buffer
from nbd_liar import take

from hvkvm.block.nbd import wire
from hvkvm.block.nbd.connection import LEAST_CHUNK, MORE_CHUNKS, Connection, Lost
from hvkvm.block.nbd.handshake import Export
from hvkvm.errors import HostExhausted

AT, SIZE = 8192, 1024
NOISE = b"\xa5" * SIZE


class Served:
    """A connection whose server is the test: `answers` has what is sent for each request, by its cookie."""

    def __init__(self, *, structured: bool = True) -> None:
        ours, self.server = socket.socketpair()
        self.server.settimeout(SECONDS)
        self.connection = Connection(ours, Export(1 << 20, 0, 1, 1 << 20, structured), "served")
        self.memory = page_buffer(SIZE, NOISE)

    def call(self, answer: Callable[[int], bytes], kind: int = wire.CMD_READ, **more: object) -> bytes:
        """Ask, with `answer` to what is asked; the memory that was to be filled, afterwards."""

        def serve() -> None:
            self.asked = wire.request.unpack(take(self.server, wire.request.size))
            self.server.sendall(answer(self.asked[3]))

        server = threading.Thread(target=serve)
        server.start()
        if kind == wire.CMD_READ:
            more["fill"] = [self.memory[:100], self.memory[100:]]
        try:
            self.connection.call(kind, AT, SIZE, **more)  # type: ignore[arg-type]
        finally:
            server.join(SECONDS)
        return bytes(self.memory)


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.connection.close()
    served.server.close()


def simple(cookie: int, error: int = 0, data: bytes = b"") -> bytes:
    return wire.simple_reply.pack(wire.SIMPLE_MAGIC, error, cookie) + data


def chunk(cookie: int, kind: int, data: bytes = b"", *, done: bool = True) -> bytes:
    head = wire.structured_head.pack(wire.STRUCTURED_MAGIC, done * wire.REPLY_FLAG_DONE, kind, cookie)
    return head + len(data).to_bytes(4, "big") + data


def data(at: int, content: bytes) -> bytes:
    return (AT + at).to_bytes(8, "big") + content


def hole(at: int, n: int) -> bytes:
    return wire.offset_hole.pack(AT + at, n)


def error(number: int, text: bytes = b"") -> bytes:
    return wire.error_chunk.pack(number, len(text)) + text


def test_data_and_holes_in_any_order_fill_the_memory(served: Served) -> None:
    def answer(cookie: int) -> bytes:
        return (
            chunk(cookie, wire.REPLY_OFFSET_DATA, data(1000, b"z" * 24), done=False)
            + chunk(cookie, wire.REPLY_OFFSET_HOLE, hole(50, 950), done=False)
            + chunk(cookie, wire.REPLY_OFFSET_DATA, data(0, b"a" * 49), done=False)
            + chunk(cookie, wire.REPLY_OFFSET_DATA, data(49, b"b"), done=False)
            + chunk(cookie, wire.REPLY_NONE)
        )

    assert served.call(answer) == b"a" * 49 + b"b" + bytes(950) + b"z" * 24
    assert served.asked == (wire.REQUEST_MAGIC, 0, wire.CMD_READ, served.asked[3], AT, SIZE)
    assert served.call(lambda cookie: simple(cookie, 0, b"s" * SIZE)) == b"s" * SIZE


@pytest.mark.parametrize("kind", [wire.CMD_READ, wire.CMD_WRITE, wire.CMD_FLUSH])
@pytest.mark.parametrize(
    ("number", "told", "text"),
    [
        (28, errno.ENOSPC, b""),
        (1, errno.EPERM, b"not you"),
        (9999, errno.EIO, b""),
        (0, errno.EIO, b"an error without a number"),
    ],
)
def test_an_error_of_the_server_is_the_request_s(
    served: Served, kind: int, number: int, told: int, text: bytes
) -> None:
    with pytest.raises(
        OSError, match=(text or f"the server says: {os.strerror(told)}".encode()).decode()
    ) as e:
        served.call(lambda cookie: chunk(cookie, wire.REPLY_IS_ERROR | 1, error(number, text)), kind)
    assert e.value.errno == told
    if number:
        with pytest.raises(OSError, match=f"the server says: {os.strerror(told)}") as e:
            served.call(lambda cookie: simple(cookie, number), kind)
        assert e.value.errno == told
    assert not served.connection.lost, "the next request goes on"
    served.call(lambda cookie: simple(cookie, 0, b"d" * SIZE))


def test_an_error_behind_some_data_is_one_of_the_whole(served: Served) -> None:
    def answer(cookie: int) -> bytes:
        return (
            chunk(cookie, wire.REPLY_OFFSET_DATA, data(0, b"d" * 512), done=False)
            + chunk(cookie, wire.REPLY_IS_ERROR | 2, error(5), done=False)
            + chunk(cookie, wire.REPLY_NONE)
        )

    with pytest.raises(OSError, match="Input/output error"):
        served.call(answer)
    assert not served.connection.lost


@pytest.mark.parametrize(
    ("why", "answer"),
    [
        ("magic", lambda cookie: bytes(16)),
        ("a reply to nothing", lambda cookie: simple(cookie + 1)),
        ("a reply to nothing", lambda cookie: chunk(cookie + 1, wire.REPLY_NONE)),
        ("data missing", lambda cookie: chunk(cookie, wire.REPLY_NONE)),
        ("data missing", lambda cookie: chunk(cookie, wire.REPLY_OFFSET_HOLE, hole(0, SIZE - 1))),
        ("not asked for", lambda cookie: chunk(cookie, wire.REPLY_OFFSET_DATA, data(1, b"d" * SIZE))),
        ("not asked for", lambda cookie: chunk(cookie, wire.REPLY_OFFSET_DATA, data(-1, b"d" * 9))),
        ("not asked for", lambda cookie: chunk(cookie, wire.REPLY_OFFSET_HOLE, hole(SIZE, 1))),
        ("a chunk of type 1 and 8", lambda cookie: chunk(cookie, wire.REPLY_OFFSET_DATA, data(0, b""))),
        ("a chunk of type 2 and 13", lambda cookie: chunk(cookie, wire.REPLY_OFFSET_HOLE, bytes(13))),
        ("a chunk of type 0 and 1", lambda cookie: chunk(cookie, wire.REPLY_NONE, b"x")),
        ("a chunk of type 9 and 0", lambda cookie: chunk(cookie, 9)),
        ("an error of that length", lambda cookie: chunk(cookie, wire.REPLY_IS_ERROR | 1, bytes(5))),
        (
            "an error of that length",
            lambda cookie: chunk(
                cookie, wire.REPLY_IS_ERROR | 1, bytes(wire.error_chunk.size + wire.MAX_ERROR_TEXT + 1)
            ),
        ),
        (
            "chunks for one request",
            lambda cookie: (
                chunk(cookie, wire.REPLY_NONE, done=False) * (MORE_CHUNKS + SIZE // LEAST_CHUNK + 1)
            ),
        ),
    ],
)
def test_what_is_no_reply_ends_the_connection(
    served: Served, why: str, answer: Callable[[int], bytes]
) -> None:
    with pytest.raises(Lost, match=why):
        served.call(answer)
    assert served.connection.lost.startswith("its server answers nonsense: ")
    with pytest.raises(Lost, match=why):
        served.connection.call(wire.CMD_FLUSH, 0, 0)


def test_as_many_chunks_as_are_allowed_and_the_longest_error(served: Served) -> None:
    most = MORE_CHUNKS + SIZE // LEAST_CHUNK

    def answer(cookie: int) -> bytes:
        return chunk(cookie, wire.REPLY_NONE, done=False) * (most - 1) + chunk(
            cookie, wire.REPLY_OFFSET_DATA, data(0, b"d" * SIZE)
        )

    assert served.call(answer) == b"d" * SIZE
    text = b"t" * wire.MAX_ERROR_TEXT
    with pytest.raises(OSError, match=text.decode()):
        served.call(lambda cookie: chunk(cookie, wire.REPLY_IS_ERROR | 1, error(5, text)))


def test_a_structured_reply_that_was_not_agreed_on_is_nonsense() -> None:
    served = Served(structured=False)
    with pytest.raises(Lost, match="nonsense: magic 0x668e33ef"):
        served.call(lambda cookie: chunk(cookie, wire.REPLY_NONE), wire.CMD_FLUSH)
    served.connection.close()
    served.server.close()


def test_who_is_waited_for_no_more_has_lost_the_connection(served: Served) -> None:
    with pytest.raises(Lost, match=r"no answer within 0.05 s"):
        served.connection.call(wire.CMD_FLUSH, 0, 0, seconds=0.05)
    assert served.connection.lost == "no answer within 0.05 s"


def test_who_cannot_send_has_lost_the_connection(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the request is sent again on another, and its guest hears of no error."""

    def broken(*_arguments: object) -> None:
        raise OSError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("hvkvm.block.nbd.connection._send", broken)
    with pytest.raises(Lost, match="sending failed: Broken pipe"):
        served.connection.call(wire.CMD_FLUSH, 0, 0)
    assert served.connection.lost == "sending failed: Broken pipe"


def test_it_says_goodbye(served: Served) -> None:
    served.connection.close()
    served.connection.close()
    goodbye = wire.request.unpack(take(served.server, wire.request.size))
    assert goodbye == (wire.REQUEST_MAGIC, 0, wire.CMD_DISC, 0, 0, 0)
    assert served.server.recv(1) == b""
    assert served.connection.lost == "closed"
    with pytest.raises(Lost, match="closed"):
        served.connection.call(wire.CMD_FLUSH, 0, 0)


def test_a_server_that_goes_leaves_no_caller_waiting(served: Served) -> None:
    failed = []

    def call() -> None:
        try:
            served.connection.call(wire.CMD_FLUSH, 0, 0)
        except Lost as why:
            failed.append(str(why))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for _ in callers:
        take(served.server, wire.request.size)
    served.server.close()
    for caller in callers:
        caller.join(SECONDS)
    assert failed == ["the server closed the connection"] * 3


def test_a_host_without_a_thread_for_it_keeps_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(_thread: threading.Thread) -> None:
        raise HostExhausted("no more threads")

    monkeypatch.setattr("hvkvm.block.nbd.connection.start_thread", none_left)
    ours, theirs = socket.socketpair()
    with pytest.raises(HostExhausted):
        Connection(ours, Export(1 << 20, 0, 1, 1 << 20, True), "none")
    assert ours.fileno() == -1
    theirs.close()
