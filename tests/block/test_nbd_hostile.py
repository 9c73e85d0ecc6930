"""NBD servers that lie: one error each, and no other memory is touched."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from pathlib import Path

from disk_asker import page_buffer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nbd_liar import Liar, reply, shake_hands, take

from hvkvm.block.image import ImageOptions
from hvkvm.block.nbd import wire
from hvkvm.block.nbd.handshake import Address
from hvkvm.block.nbd.image import NbdImage
from hvkvm.errors import ImageError

MIB = 1 << 20


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
