"""Rings: packets arrive as sent, signals come when due and not more, hostile peers only break the ring."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_ends import PAGE, ends

from hvkvm.abi import ring as layout
from hvkvm.abi.ring import GpaRange, Packet, TransferRange
from hvkvm.memory.guest import GuestMemory
from hvkvm.vmbus.channel_io import ChannelIo
from hvkvm.vmbus.ring_reader import RingReader
from hvkvm.vmbus.ring_writer import RingWriter

LAYOUTS = {"neighbours": [10, 11, 12], "scattered": [20, 9, 31], "backwards": [30, 29, 28], "single": [5, 6]}


@pytest.mark.parametrize("pfns", LAYOUTS.values(), ids=LAYOUTS)
def test_packets_of_every_size_survive_every_wrap(memory: GuestMemory, pfns: list[int]) -> None:
    writer, reader = ends(memory, pfns)
    random = Random(1)
    for number in range(3000):
        payload = random.randbytes(random.randrange(0, 900))
        assert writer.put(layout.VM_PKT_DATA_INBAND, payload, trans_id=number, flags=1)
        writer.flush()
        packet = reader.get()
        assert packet is not None
        assert packet.payload == payload + bytes(-len(payload) % 8)
        assert (packet.trans_id, packet.wants_completion) == (number, True)
        reader.publish()
    assert reader.get() is None
    assert not reader.broken


def test_views_of_a_raw_packet_are_the_payload(memory: GuestMemory) -> None:
    writer, reader = ends(memory, LAYOUTS["scattered"])
    random = Random(2)
    for _ in range(500):
        payload = random.randbytes(8 * random.randrange(1, 100))
        writer.put(layout.VM_PKT_DATA_INBAND, payload)
        writer.flush()
        packet = reader.get_raw()
        assert packet is not None
        assert b"".join(packet.views) == payload
        reader.publish()


@settings(deadline=None)
@given(
    st.lists(st.lists(st.binary(max_size=200), max_size=40), max_size=20), st.sampled_from(sorted(LAYOUTS))
)
def test_a_batch_is_as_many_packets_as_have_room(
    memory: GuestMemory, batches: list[list[bytes]], name: str
) -> None:
    together, reader = ends(memory, LAYOUTS[name])
    single, _reader = ends(memory, [50 + n for n in range(len(LAYOUTS[name]))])
    for number, batch in enumerate(batches):
        wanted = [(number << 8 | at, payload) for at, payload in enumerate(batch)]
        count = together.put_all(layout.VM_PKT_COMP, wanted)
        fitted = 0
        for trans_id, payload in wanted:
            if not single.put(layout.VM_PKT_COMP, payload, trans_id=trans_id):
                break
            fitted += 1
        assert (count, together.position) == (fitted, single.position)
        together.flush()
        single.flush()
        for trans_id, payload in wanted[:count] if number % 2 else wanted[: count // 2]:
            packet = reader.get()
            assert packet is not None
            assert (packet.trans_id, packet.payload[: len(payload)]) == (trans_id, payload)
        while reader.get() is not None:
            pass
        reader.publish()
        single.words[layout.WORD_READ_INDEX] = single.words[layout.WORD_WRITE_INDEX]
    assert not reader.broken
    assert together.packets == single.packets
    together.words[layout.WORD_READ_INDEX] = 3
    assert together.put_all(layout.VM_PKT_COMP, [(1, b"")]) == 0
    assert together.broken


@settings(deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=700), st.none()), max_size=60))
def test_a_ring_is_a_bounded_queue(memory: GuestMemory, steps: list[bytes | None]) -> None:
    """Bytes put a packet, None takes one; what comes out is what went in, in order, and never overfull."""
    writer, reader = ends(memory, [40, 42])
    inside: list[bytes] = []
    used = 0
    for step in steps:
        if step is None:
            packet = reader.get()
            assert (packet is None) == (not inside)
            if packet is not None:
                expected = inside.pop(0)
                assert packet.payload[: len(expected)] == expected
                used -= len(packet.payload) + 24
            reader.publish()
            continue
        need = -(-len(step) // 8) * 8 + 24
        fits = need < PAGE - used
        assert writer.put(layout.VM_PKT_DATA_INBAND, step) == fits
        writer.flush()
        if fits:
            inside.append(step)
            used += need
    assert not reader.broken
    assert not writer.broken


def test_a_consumer_is_signalled_once_a_batch_and_only_if_it_found_the_ring_empty(
    memory: GuestMemory,
) -> None:
    writer, reader = ends(memory, [10, 11])
    for _ in range(3):
        writer.put(6, b"x" * 8)
    assert writer.flush()
    assert not writer.flush()  # nothing new
    writer.put(6, b"x" * 8)
    assert not writer.flush()  # it has not read the first batch: it will see this one
    while reader.get():
        pass
    reader.publish()
    reader.mask()
    writer.put(6, b"x" * 8)
    assert not writer.flush()
    assert reader.unmask()  # so it must look again by itself
    assert reader.get() is not None
    reader.publish()
    assert not reader.unmask()
    writer.put(6, b"x" * 8)
    assert writer.flush()


def test_a_producer_is_signalled_when_what_it_waits_for_fits(memory: GuestMemory) -> None:
    writer, reader = ends(memory, [10, 11])
    while writer.put(6, bytes(488)):  # 512 bytes each; 7 fit, an 8th would fill the ring
        pass
    writer.flush()
    assert writer.packets == 7
    assert writer.words[layout.WORD_PENDING_SEND_SZ] == 512
    assert not reader.publish()  # nothing read, no signal
    reader.get()
    assert reader.publish()  # from 512 free, which is not enough, to 1024
    reader.get()
    assert not reader.publish()  # there was enough before
    assert writer.put(6, bytes(488))
    assert writer.words[layout.WORD_PENDING_SEND_SZ] == 0


def test_no_hope_is_given_while_it_does_not_fit(memory: GuestMemory) -> None:
    writer, reader = ends(memory, [10, 11])
    while writer.put(6, bytes(8)):
        pass
    writer.put(6, bytes(2000))
    writer.flush()
    told = 0
    for _ in range(100):
        assert reader.get()
        told += reader.publish()
        if told:
            break
    free = 4096 - (writer.words[0] - writer.words[1]) % 4096
    assert told == 1
    assert 2024 < free <= 2024 + 32


def test_a_packet_that_never_fits_is_the_callers_mistake(memory: GuestMemory) -> None:
    writer, _ = ends(memory, [10, 11])
    with pytest.raises(ValueError, match="never fits"):
        writer.put(6, bytes(4096))


@pytest.mark.parametrize("index", [4096, 4, 0xFFFFFFF8, 4100, 1 << 31])
@pytest.mark.parametrize("word", [layout.WORD_WRITE_INDEX, layout.WORD_READ_INDEX])
def test_s61_indices_out_of_range_break_the_ring(memory: GuestMemory, word: int, index: int) -> None:
    writer, reader = ends(memory, [10, 11])
    writer.words[word] = index
    if word == layout.WORD_WRITE_INDEX:
        assert reader.get() is None
        assert "write index" in reader.broken
        assert not reader.publish()
        writer.words[word] = 0
        assert reader.get() is None  # broken for good
    else:
        assert not writer.put(6, b"")
        assert "read index" in writer.broken
        assert not writer.flush()


DESCRIPTORS = {
    "data before the descriptor's end": (6, 1, 3, 0, 0),
    "data behind the packet": (6, 4, 3, 0, 0),
    "longer than what is there": (6, 2, 200, 0, 0),
    "longest": (6, 2, 0xFFFF, 0, 0),
    "empty": (6, 0, 0, 0, 0),
}


@pytest.mark.parametrize("name", DESCRIPTORS)
def test_s61_descriptors_that_lie_break_the_ring(memory: GuestMemory, name: str) -> None:
    writer, reader = ends(memory, [10, 11])
    writer.put(6, bytes(8))
    writer.flush()
    memory.write(11 * PAGE, layout.descriptor.pack(*DESCRIPTORS[name]))
    assert reader.get() is None
    assert reader.broken
    assert reader.get_raw() is None


def test_s61_less_than_a_packet_breaks_the_ring(memory: GuestMemory) -> None:
    writer, reader = ends(memory, [10, 11])
    writer.words[layout.WORD_WRITE_INDEX] = 16
    assert reader.get() is None
    assert "less than a packet" in reader.broken


def test_s61_indices_are_read_again_only_behind_what_was_seen(memory: GuestMemory) -> None:
    writer, reader = ends(memory, [10, 11])
    for number in range(3):
        writer.put(6, b"", trans_id=number)
    writer.flush()
    first = reader.get()
    assert first is not None
    writer.words[layout.WORD_WRITE_INDEX] = 0xDEAD0000  # the guest takes it back
    rest = [reader.get(), reader.get()]
    assert [packet.trans_id for packet in rest if packet] == [1, 2]
    assert reader.get() is None
    assert reader.broken


@settings(deadline=None, max_examples=300)
@given(st.binary(min_size=64, max_size=512), st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFF))
def test_no_bytes_of_a_guest_raise(memory: GuestMemory, junk: bytes, write: int, read: int) -> None:
    writer, reader = ends(memory, [10, 11])
    memory.write(11 * PAGE, junk)
    reader.words[layout.WORD_WRITE_INDEX] = write
    reader.words[layout.WORD_PENDING_SEND_SZ] = read
    for _ in range(100):
        packet = reader.get()
        if packet is None:
            break
        layout.parse_gpa_direct(packet, 1 << 20)
        layout.parse_transfer_pages(packet, 0xCAFE, 1 << 20)
        reader.publish()
    else:
        pytest.fail("a ring of 4096 bytes holds no 100 packets")
    writer.words[layout.WORD_READ_INDEX] = read
    writer.put(6, b"abc")
    writer.flush()


def test_gpa_direct_and_transfer_pages_survive(memory: GuestMemory) -> None:
    writer, reader = ends(memory, [10, 11])
    ranges = [GpaRange(5000, 100, (7, 9)), GpaRange(1, 4095, (3,))]
    moves = [TransferRange(64, 0), TransferRange(10, 4086)]
    writer.put(layout.VM_PKT_DATA_USING_GPA_DIRECT, b"request!", header=layout.gpa_direct_header(ranges))
    writer.put(layout.VM_PKT_DATA_USING_XFER_PAGES, b"", header=layout.transfer_page_header(0xCAFE, moves))
    writer.flush()
    direct, transfer = reader.get(), reader.get()
    assert direct is not None
    assert transfer is not None
    assert direct.payload == b"request!"
    assert layout.parse_gpa_direct(direct, 5001) == ranges
    assert layout.parse_gpa_direct(direct, 5000) is None  # more than the device takes
    assert layout.parse_transfer_pages(transfer, 0xCAFE, 4096) == moves
    assert layout.parse_transfer_pages(transfer, 0xCAFE, 4095) is None
    assert layout.parse_transfer_pages(transfer, 1, 4096) is None


@pytest.mark.parametrize("count", [0, 2, 0x20000001, 0xFFFFFFFF])
def test_s61_range_counts_are_held_against_the_length(count: int) -> None:
    header = bytearray(layout.gpa_direct_header([GpaRange(8, 0, (1,))]))
    header[4:8] = count.to_bytes(4, "little")
    assert layout.parse_gpa_direct(Packet(9, 0, 0, bytes(header), b""), 1 << 20) is None
    header = bytearray(layout.transfer_page_header(1, [TransferRange(8, 0)]))
    header[4:8] = count.to_bytes(4, "little")
    assert layout.parse_transfer_pages(Packet(7, 0, 0, bytes(header), b""), 1, 1 << 20) is None


def pair(memory: GuestMemory) -> tuple[ChannelIo, ChannelIo, list[str]]:
    """Two ends of one channel, and the log of what each tells."""
    to_host, to_guest = [50, 51], [60, 61]
    guest_writer, host_reader = ends(memory, to_host)
    host_writer, guest_reader = ends(memory, to_guest)
    log: list[str] = []

    def end(name: str, reader: RingReader, writer: RingWriter) -> ChannelIo:
        return ChannelIo(
            reader,
            writer,
            lambda: log.append(f"{name} signals"),
            lambda reason: log.append(f"{name} broken: {reason}"),
            lambda: log.append(f"{name} again"),
        )

    return end("host", host_reader, host_writer), end("guest", guest_reader, guest_writer), log


def test_a_drain_answers_all_with_one_signal(memory: GuestMemory) -> None:
    host, guest, log = pair(memory)
    with guest:
        for number in range(20):
            guest.send(b"ping", trans_id=number, flags=1)
    assert log == ["guest signals"]
    log.clear()
    assert host.drain(host.complete) == 20
    assert log == ["host signals"]
    answers: list[Packet] = []
    assert guest.drain(answers.append) == 20
    assert [packet.trans_id for packet in answers] == list(range(20))
    assert all(packet.type == layout.VM_PKT_COMP for packet in answers)


def test_a_budget_keeps_one_guest_from_holding_the_loop(memory: GuestMemory) -> None:
    host, guest, log = pair(memory)
    for _ in range(10):
        guest.send(b"")
    log.clear()
    seen: list[Packet] = []
    assert host.drain(seen.append, budget=4) == 4
    assert log == ["host again"]
    assert host.reader.words[layout.WORD_INTERRUPT_MASK] == 1
    assert host.drain(seen.append) == 6
    assert host.reader.words[layout.WORD_INTERRUPT_MASK] == 0


def test_a_broken_ring_is_told_once_and_then_left_alone(memory: GuestMemory) -> None:
    host, guest, log = pair(memory)
    guest.send(b"good")
    guest.writer.words[layout.WORD_WRITE_INDEX] = 3
    seen: list[Packet] = []
    for _ in range(3):
        host.drain(seen.append)
    assert not host.send(b"x")
    assert [line for line in log if "broken" in line] == [
        "host broken: write index 0x3 in a ring of 0x1000 bytes"
    ]


def test_what_comes_while_signals_are_masked_is_not_left(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest writes between our last look and the unmasking: it will not signal, so we must look again."""
    host, guest, log = pair(memory)
    guest.send(b"first")
    log.clear()
    late = [b"second", b"third"]
    rest = RingReader.rest

    def rest_late(reader: RingReader) -> tuple[bool, bool]:
        if reader is host.reader and late:
            guest.send(late.pop())
        return rest(reader)

    monkeypatch.setattr(RingReader, "rest", rest_late)
    assert host.drain(lambda packet: None) == 3
    assert log == []
    assert host.reader.words[layout.WORD_INTERRUPT_MASK] == 0


def test_abandoning_inside_a_drain_ends_it(memory: GuestMemory) -> None:
    host, guest, log = pair(memory)
    for _ in range(3):
        guest.send(b"")
    log.clear()
    seen: list[Any] = []

    def once(packet: Packet) -> None:
        seen.append(packet)
        host.abandon()

    host.drain(once)
    assert len(seen) == 1
    assert log == []
    assert host.drain(once) == 0


@pytest.mark.parametrize("held", [False, True])
def test_lost_rings_are_neither_read_nor_written(memory: GuestMemory, held: bool) -> None:
    """Also by who does it itself, and after a rest."""
    host, guest, _log = pair(memory)
    guest.send(b"")
    if held:
        host.hold()
    host.lose()
    host.release()
    before = bytes(memory.view(0, memory.size))
    with host:
        assert host.reader.get() is None
        assert not host.writer.put(6, b"", trans_id=1)
        host.rest()
    host.reader.mask()
    assert bytes(memory.view(0, memory.size)) == before


@given(payload=st.integers(0, 9000), header=st.integers(0, 3).map(lambda n: 8 * n))
def test_what_fits_is_what_an_empty_ring_takes(memory: GuestMemory, payload: int, header: int) -> None:
    writer, _reader = ends(memory, [1, 2, 3])
    try:
        taken = writer.put(6, bytes(payload), header=bytes(header))
    except ValueError:
        taken = False
    assert writer.fits(payload, header) == taken
