"""What an NBD server sends arrives whole, however it is cut, and in few system calls."""

from __future__ import annotations

import socket
import threading
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from disk_asker import SECONDS, page_buffer
from nbd_liar import take

from hvkvm.block.nbd import wire
from hvkvm.block.nbd.connection import Connection
from hvkvm.block.nbd.handshake import Export
from hvkvm.block.nbd.incoming import AHEAD, Incoming

AT_ONCE = 8
SIZE = 4096


class CountedSocket(socket.socket):
    """Counts the calls that receive."""

    calls = 0

    def recv_into(self, *arguments: Any, **named: Any) -> int:
        self.calls += 1
        return super().recv_into(*arguments, **named)

    def recvmsg_into(self, *arguments: Any, **named: Any) -> Any:
        self.calls += 1
        return super().recvmsg_into(*arguments, **named)


def pair() -> tuple[CountedSocket, socket.socket]:
    """Ours, and the server's end."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(SECONDS)
    return CountedSocket(fileno=ours.detach()), theirs


def answer(kind: int, cookie: int, offset: int, data: bytes) -> bytes:
    if kind == wire.CMD_WRITE:
        return wire.simple_reply.pack(wire.SIMPLE_MAGIC, 0, cookie)
    head = wire.structured_head.pack(
        wire.STRUCTURED_MAGIC, wire.REPLY_FLAG_DONE, wire.REPLY_OFFSET_DATA, cookie
    )
    return head + (8 + len(data)).to_bytes(4, "big") + offset.to_bytes(8, "big") + data


@pytest.mark.parametrize("kind", [wire.CMD_READ, wire.CMD_WRITE])
def test_replies_that_come_together_take_about_a_call_each(kind: int) -> None:
    ours, theirs = pair()
    connection = Connection(ours, Export(1 << 20, 0, 1, 1 << 20, True), "counted")
    buffers = [page_buffer(SIZE) for _ in range(AT_ONCE)]
    data = [bytes([number]) * SIZE for number in range(AT_ONCE)]

    def ask(number: int) -> None:
        room = {"fill": [buffers[number]]} if kind == wire.CMD_READ else {}
        connection.call(kind, number * SIZE, SIZE, **room)  # type: ignore[arg-type]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(AT_ONCE)]
    for thread in threads:
        thread.start()
    answers = []
    for _ in threads:
        head = wire.request.unpack(take(theirs, wire.request.size))
        _magic, _flags, asked, cookie, offset, _length = head
        answers.append(answer(asked, cookie, offset, data[offset // SIZE]))
    theirs.sendall(b"".join(answers))
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()
    if kind == wire.CMD_READ:
        assert [bytes(one) for one in buffers] == data
    # Four a read and one a write, when each part was asked for by itself. One waits for what comes next.
    assert ours.calls <= (2 * AT_ONCE if kind == wire.CMD_READ else 4)
    connection.close()
    theirs.close()


def test_a_stream_cut_anywhere_is_the_same_stream() -> None:
    random = Random(1)
    ours, theirs = pair()
    whole = random.randbytes(1 << 20)

    def send() -> None:
        at = 0
        while at < len(whole):
            n = random.choice((1, 15, 300, SIZE, AHEAD, 70_000))
            theirs.sendall(whole[at : at + n])
            at += n

    sender = threading.Thread(target=send)
    sender.start()
    incoming, asked, at = Incoming(ours), Random(2), 0
    while at < len(whole):
        left = len(whole) - at
        if asked.random() < 0.5:
            n = min(left, asked.choice((1, 4, 16, 28, 4102, AHEAD)))
            assert incoming.take(n) == whole[at : at + n]
        else:
            n = min(left, asked.choice((1, 512, SIZE, 3 * AHEAD, 100_000)))
            cuts = sorted([0, n, *(asked.randrange(n + 1) for _ in range(asked.choice((0, 1, 5, 1100))))])
            parts = [memoryview(bytearray(end - start)) for start, end in pairwise(cuts)]
            incoming.fill(parts, n)
            assert b"".join(parts) == whole[at : at + n]
        at += n
    sender.join(SECONDS)
    theirs.close()
    with pytest.raises(OSError, match="the server closed"):
        incoming.take(1)
    with pytest.raises(OSError, match="the server closed"):
        incoming.fill([page_buffer(1)], 1)
    ours.close()
