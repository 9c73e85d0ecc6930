"""A table that is taken at once is what a walk of its descriptors would have found, whatever is in it."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nvme_guest import FakeDisk, Loop, ram
from virtio_guest import AVAILABLE, DESCRIPTORS, TABLE, USED

from hvkvm.abi import virtio
from hvkvm.devices.pci.virtio import ring as rings
from hvkvm.devices.pci.virtio.blk import VirtioBlk
from hvkvm.devices.pci.virtio.ring import Broken, Chain, Place, Ring
from hvkvm.memory.guest import GuestMemory
from hvkvm.memory.page_vector import LEAST_PAGES

QUEUE = 256
HEADER, STATUS = 0x70000, 0x70010
NEXT, WRITE, INDIRECT = virtio.VRING_DESC_F_NEXT, virtio.VRING_DESC_F_WRITE, virtio.VRING_DESC_F_INDIRECT
Found = tuple[list[tuple[int, int]], list[tuple[int, int]]]


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    made = ram()
    yield made
    made.close()


def table_of(pieces: Sequence[tuple[int, int]], *, writable: bool) -> bytearray:
    """As Linux's driver lays it."""
    flags = NEXT | (WRITE if writable else 0)
    entries = [(HEADER, 16, NEXT), *((at, n, flags) for at, n in pieces), (STATUS, 1, WRITE)]
    raw = (virtio.vring_desc.pack(*entry, (index + 1) % len(entries)) for index, entry in enumerate(entries))
    return bytearray(b"".join(raw))


def taken(memory: GuestMemory, table: bytes) -> Chain:
    """What a ring makes of it. Broken."""
    memory.write(TABLE, table)
    memory.write(DESCRIPTORS, virtio.vring_desc.pack(TABLE, len(table), INDIRECT, 0))
    memory.write(AVAILABLE, struct.pack("<HHH", 0, 1, 0))
    ring = Ring(memory, Place(QUEUE, DESCRIPTORS, AVAILABLE, USED), event_idx=False)
    chain = ring.take()
    assert chain is not None
    return chain


def places(views: list[memoryview]) -> list[tuple[int, int]]:
    return [(ctypes.addressof(ctypes.c_char.from_buffer(view)), len(view)) for view in views]


def found(memory: GuestMemory, table: bytes) -> Found | str:
    """Where its buffers lie, or what is wrong with it."""
    try:
        chain = taken(memory, table)
    except Broken as error:
        return str(error)
    chain.spread()
    return places(chain.readable), places(chain.writable)


def walked(memory: GuestMemory, table: bytes) -> Found | str:
    """As `found`, without the quick way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rings, "whole_table", lambda *_arguments: None)
        return found(memory, table)


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("count", [LEAST_PAGES, 40, QUEUE - 2])
def test_a_large_table_is_taken_at_once(memory: GuestMemory, count: int, writable: bool) -> None:
    random = Random(count)
    pieces = [
        (0x100000 + 4096 * random.randrange(200) + random.choice((0, 512)), random.choice((512, 3584)))
        for _ in range(count)
    ]
    table = table_of(pieces, writable=writable)
    chain = taken(memory, table)
    assert chain.data is not None
    assert (chain.data_writable, chain.data.size) == (writable, sum(n for _at, n in pieces))
    assert chain.data.is_aligned(512)
    assert not chain.data.is_aligned(4096)
    assert [len(piece) for piece in chain.data] == [n for _at, n in pieces]
    assert found(memory, table) == walked(memory, table)


def test_a_small_one_is_walked(memory: GuestMemory) -> None:
    table = table_of([(0x100000 + 8192 * n, 4096) for n in range(LEAST_PAGES - 1)], writable=True)
    chain = taken(memory, table)
    assert chain.data is None
    assert chain.pieces == LEAST_PAGES + 1


EDGES = st.sampled_from(
    (0, 1, 0x70000, 0x1FF000, 0x1FFFFF, 0x200000, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 63, (1 << 64) - 1)
)


@given(st.data())
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_in_it_a_walk_would_have_found_the_same(memory: GuestMemory, data: st.DataObject) -> None:
    count = data.draw(st.integers(LEAST_PAGES, 40))
    base = data.draw(st.integers(0x100000, 0x100000 + 4096))
    table = table_of([(base + 4096 * n, 4096 - n) for n in range(count)], writable=data.draw(st.booleans()))
    for _ in range(data.draw(st.integers(0, 3))):
        index = data.draw(st.integers(0, count + 1))
        address, length, flags, link = virtio.vring_desc.unpack_from(table, 16 * index)
        change = data.draw(st.sampled_from(("address", "length", "flags", "link", "byte")))
        if change == "address":
            address = data.draw(EDGES)
        elif change == "length":
            length = data.draw(EDGES) & 0xFFFFFFFF
        elif change == "flags":
            flags = data.draw(st.integers(0, 15))
        elif change == "link":
            link = data.draw(st.integers(0, count + 3))
        virtio.vring_desc.pack_into(table, 16 * index, address, length, flags, link)
        if change == "byte":
            table[data.draw(st.integers(0, len(table) - 1))] = data.draw(st.integers(0, 255))
    assert found(memory, bytes(table)) == walked(memory, bytes(table))


def seen(memory: GuestMemory, table: bytes) -> tuple[list[bytes], list[tuple[int, int]], bool] | str:
    """What the device reads, where it writes, or what is wrong; and whether the table was taken at once."""
    at_once = []
    quick = rings.short_table

    def noted(copy: bytes) -> Any:
        made = quick(copy)
        at_once.append(made is not None)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rings, "short_table", noted)
        try:
            chain = taken(memory, table)
        except Broken as error:
            return str(error)
    return [bytes(one) for one in chain.readable], places(chain.writable), any(at_once)


@given(st.data())
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_table_of_three_is_what_a_walk_would_have_found(memory: GuestMemory, data: st.DataObject) -> None:
    memory.write(HEADER, Random(1).randbytes(17))
    table = table_of([(0x100000 + data.draw(st.integers(0, 4096)), 4096)], writable=data.draw(st.booleans()))
    changes = data.draw(st.integers(0, 2))
    for _ in range(changes):
        index = data.draw(st.integers(0, 2))
        fields = list(virtio.vring_desc.unpack_from(table, 16 * index))
        which = data.draw(st.integers(0, 3))
        fields[which] = data.draw(EDGES) & (1 << (64, 32, 4, 3)[which]) - 1
        virtio.vring_desc.pack_into(table, 16 * index, *fields)
    quick = seen(memory, bytes(table))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rings, "short_table", lambda _table: None)
        walk = seen(memory, bytes(table))
    assert walk[:2] == quick[:2]
    if not changes:
        assert quick[2]


def performed(memory: GuestMemory, disk: FakeDisk, loop: Loop, kind: int, table: bytes) -> tuple[int, int]:
    """What the device says of a request for sector 2: its status, and how many bytes are new."""
    memory.write(HEADER, virtio.virtio_blk_outhdr.pack(kind, 2) + b"\xff")
    written: list[int] = []
    VirtioBlk(disk, serial="serial").perform(taken(memory, table), written.append)
    loop.settle()
    (count,) = written
    return memory.read(STATUS, 1)[0], count


def test_a_disk_reads_and_writes_all_of_it(memory: GuestMemory) -> None:
    loop = Loop()
    disk = FakeDisk(loop)
    pieces = [(0x100000 + 8192 * n, 512) for n in range(LEAST_PAGES)]
    size = 512 * LEAST_PAGES
    for number, (at, n) in enumerate(pieces):
        memory.write(at, bytes([number]) * n)
    expected = b"".join(bytes([number]) * 512 for number in range(LEAST_PAGES))
    out, into = (bytes(table_of(pieces, writable=writable)) for writable in (False, True))
    assert performed(memory, disk, loop, virtio.VIRTIO_BLK_T_OUT, out) == (0, 1)
    assert disk.data[1024 : 1024 + size] == expected
    for at, n in pieces:
        memory.write(at, bytes(n))
    assert performed(memory, disk, loop, virtio.VIRTIO_BLK_T_IN, into) == (0, 1 + size)
    assert b"".join(memory.read(at, n) for at, n in pieces) == expected
    # What is asked for does not go with who writes the data, or is neither a read nor a write.
    assert performed(memory, disk, loop, virtio.VIRTIO_BLK_T_OUT, into) == (0, 1)
    assert performed(memory, disk, loop, virtio.VIRTIO_BLK_T_IN, out) == (0, 1)
    assert disk.data[1024 : 1024 + size] == expected
    assert performed(memory, disk, loop, virtio.VIRTIO_BLK_T_GET_ID, into)[0] == 0
    assert memory.read(pieces[0][0], 20) == b"serial".ljust(20, b"\0")
    assert performed(memory, disk, loop, virtio.VIRTIO_BLK_T_DISCARD, out)[0] == virtio.VIRTIO_BLK_S_IOERR
