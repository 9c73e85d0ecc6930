"""Filling and emptying a ring in place: what `get_raw`, `reserve`, `commit` and `wait_for_room` promise."""

from __future__ import annotations

from random import Random

import pytest
from ring_ends import PAGE, ends

from hvkvm.abi import ring as layout
from hvkvm.memory.guest import GuestMemory

LAYOUTS = {"neighbours": [10, 11, 12, 13], "scattered": [20, 9, 31, 15], "single": [5, 6]}


def fill(views: list[memoryview], data: bytes) -> None:
    """As readv() does."""
    for view in views:
        part = data[: len(view)]
        view[: len(part)] = part
        data = data[len(part) :]


def front(size: int) -> bytes:
    return size.to_bytes(8, "little")


@pytest.mark.parametrize("pfns", LAYOUTS.values(), ids=LAYOUTS)
def test_what_is_filled_in_place_comes_out_in_packets(memory: GuestMemory, pfns: list[int]) -> None:
    writer, reader = ends(memory, pfns)
    random = Random(1)
    sent, got = bytearray(), bytearray()
    for _ in range(2000):
        most = 8 * random.randrange(8, 200)
        views = writer.reserve(8, most, 64, 4)
        room = sum(map(len, views))
        data = random.randbytes(random.randrange(0, room + 1))
        fill(views, data)
        writer.commit(layout.VM_PKT_DATA_INBAND, len(data), front)
        writer.flush()
        sent += data
        for _ in range(random.randrange(0, 6)):
            packet = reader.get_raw(8)
            if packet is None:
                break
            size = int.from_bytes(packet.front, "little")
            payload = b"".join(packet.views)
            assert 0 < size < 1600
            assert len(payload) == -(-size // 8) * 8
            got += payload[:size]
        reader.publish()
    assert sent.startswith(got)
    assert len(got) > 100_000
    assert writer.packets >= reader.packets
    assert not reader.broken


def test_nothing_filled_in_is_nothing_sent(memory: GuestMemory) -> None:
    writer, reader = ends(memory, [10, 11])
    assert writer.reserve(8, 512, 64, 4)
    writer.commit(6, 0, front)
    assert not writer.staged
    assert not writer.flush()
    assert reader.get_raw() is None


def test_no_packet_is_begun_for_too_little(memory: GuestMemory) -> None:
    writer, _ = ends(memory, [10, 11])
    views = writer.reserve(8, 3000, 512, 4)
    # 4096 bytes, less the 8 that keep a full ring from looking empty, and 32 a packet.
    assert [len(view) for view in views] == [3000, 1024]
    writer.commit(6, 3900, front)
    assert writer.reserve(8, 3000, 512, 4) == []
    assert [len(view) for view in writer.reserve(8, 3000, 8, 4)] == [88]


def test_a_put_forgets_a_reservation(memory: GuestMemory) -> None:
    writer, reader = ends(memory, [10, 11])
    views = writer.reserve(8, 512, 64, 1)
    writer.put(6, b"put first")
    fill(views, b"lost")
    writer.commit(6, 4, front)
    writer.flush()
    packet = reader.get_raw()
    assert packet is not None
    assert reader.get_raw() is None


def test_a_front_longer_than_the_packet_is_what_there_is(memory: GuestMemory) -> None:
    writer, reader = ends(memory, [10, 11])
    writer.put(6, b"")
    writer.put(6, b"12345678")
    writer.put(6, b"1234567890", header=bytes(8))
    writer.flush()
    fronts = []
    for _ in range(3):
        packet = reader.get_raw(16)
        assert packet is not None
        assert packet.views == []
        fronts.append(packet.front)
    assert fronts == [b"", b"12345678", b"1234567890" + bytes(6)]


def test_who_waits_for_room_is_told_though_the_reader_had_read_all_it_saw(memory: GuestMemory) -> None:
    """What is staged must be published ahead of the question.

    Else: the reader empties what it sees, finds that there was room before, and
    tells nobody; and tells nobody either when it reads the rest.
    """
    writer, reader = ends(memory, [10, 11])
    writer.put(6, bytes(1000))
    writer.flush()
    writer.put(6, bytes(2000))  # staged
    assert not writer.wait_for_room(1500)
    told = 0
    while reader.get() is not None:
        told += reader.publish()
    writer.flush()
    while reader.get() is not None:
        told += reader.publish()
    assert told == 1
    assert writer.wait_for_room(1500)


def test_the_signal_for_what_was_published_early_is_not_lost(memory: GuestMemory) -> None:
    writer, _ = ends(memory, [10, 11])
    writer.put(6, bytes(2000))
    assert not writer.wait_for_room(3000)
    assert writer.flush()
    assert not writer.flush()


@pytest.mark.parametrize("index", [4096, 4, 1 << 31])
def test_s61_a_read_index_out_of_range_breaks_the_ring(memory: GuestMemory, index: int) -> None:
    writer, _ = ends(memory, [10, 11])
    writer.words[layout.WORD_READ_INDEX] = index
    assert writer.reserve(8, 512, 64, 4) == []
    assert "read index" in writer.broken
    assert not writer.wait_for_room(64)


def test_a_broken_ring_has_nothing_to_read(memory: GuestMemory) -> None:
    writer, reader = ends(memory, [10, 11])
    writer.put(6, bytes(64))
    writer.flush()
    memory.write(11 * PAGE, layout.descriptor.pack(6, 9, 3, 0, 0))
    assert reader.get_raw(8) is None
    assert reader.broken
    assert not reader.unmask()
