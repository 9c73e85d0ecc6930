"""Drivers of virtio that mean harm: rings, descriptors and registers of every kind."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nvme_guest import MIB, ram
from saved_mutations import extremes
from virtio_guest import (
    AVAILABLE,
    DATA,
    DESCRIPTORS,
    EVENT_IDX,
    HEADERS,
    INDIRECT,
    SIZE,
    STATUS,
    TABLE,
    USED,
    VirtioGuest,
)

from hvkvm.abi import pci, virtio
from hvkvm.devices.pci.msix import PBA_OFFSET
from hvkvm.devices.pci.virtio import function as places
from hvkvm.devices.pci.virtio.intake import BUDGET
from hvkvm.devices.pci.virtio.registers import QueueState
from hvkvm.devices.pci.virtio.ring import Place, Ring
from hvkvm.devices.pci.virtio.saved import VirtioState
from hvkvm.devices.pci.virtio.transport import MAX_IN_FLIGHT
from hvkvm.errors import GuestMemoryError
from hvkvm.state import codec

NEEDS_RESET = virtio.VIRTIO_CONFIG_S_NEEDS_RESET
FLUSH = virtio.VIRTIO_BLK_T_FLUSH


@pytest.fixture
def guest(routes: Any) -> Iterator[VirtioGuest]:
    made = VirtioGuest(routes)
    made.enable()
    yield made
    made.close()


def broken(guest: VirtioGuest) -> bool:
    guest.loop.settle()
    return bool(guest.reg(STATUS, 1) & NEEDS_RESET)


def recovers(guest: VirtioGuest) -> None:
    """A driver that resets it finds it as good as new."""
    guest.disk.held = False
    guest.enable()
    assert guest.do(FLUSH, 0, 0) == 0


DESCRIPTOR_LISTS = {
    "outside RAM": [(1 << 40, 512, 0, 0)],
    "across the end of RAM": [(2 * MIB - 8, 16, 0, 0)],
    "wraps": [((1 << 64) - 8, 16, 0, 0)],
    "next beyond the table": [(HEADERS, 16, 1, SIZE)],
    "a circle": [(HEADERS, 16, 1, 1), (HEADERS, 16, 1, 0)],
    "its own next": [(HEADERS, 16, 1, 0)],
    "to read behind to write": [(HEADERS, 16, 3, 1), (HEADERS, 16, 0, 0)],
    "indirect with next": [(TABLE, 32, 5, 1), (HEADERS, 16, 0, 0)],
    "indirect of odd length": [(TABLE, 17, 4, 0)],
    "indirect of none": [(TABLE, 0, 4, 0)],
    "indirect too long": [(TABLE, 16 * (SIZE + 1), 4, 0)],
    "indirect outside RAM": [(1 << 40, 32, 4, 0)],
}


@pytest.mark.parametrize("descriptors", DESCRIPTOR_LISTS.values(), ids=DESCRIPTOR_LISTS.keys())
def test_chains_that_cannot_be(guest: VirtioGuest, descriptors: list[tuple[int, int, int, int]]) -> None:
    for index, one in enumerate(descriptors):
        guest.memory.write(DESCRIPTORS + 16 * index, virtio.vring_desc.pack(*one))
    guest.offer()
    assert broken(guest)
    assert guest.device.inspect()["broken"]
    assert guest.disk.seen == []
    recovers(guest)


def test_an_indirect_table_in_one(guest: VirtioGuest) -> None:
    guest.memory.write(DESCRIPTORS, virtio.vring_desc.pack(TABLE, 16, 4, 0))
    guest.memory.write(TABLE, virtio.vring_desc.pack(TABLE, 16, 4, 0))
    guest.offer()
    assert broken(guest)
    recovers(guest)


def test_more_chains_than_entries(guest: VirtioGuest) -> None:
    guest.memory.write(AVAILABLE + 2, struct.pack("<H", SIZE + 1))
    guest.device.write(places.NOTIFY, 2, 0)
    assert broken(guest)
    recovers(guest)


def test_a_head_beyond_the_table(guest: VirtioGuest) -> None:
    guest.offer(SIZE)
    assert broken(guest)
    recovers(guest)


@pytest.mark.parametrize("lengths", [(0, 1), (15, 1), (16, 0)])
def test_requests_without_header_or_status(guest: VirtioGuest, lengths: tuple[int, int]) -> None:
    guest.header(FLUSH)
    guest.lay([(HEADERS, lengths[0], False), (HEADERS + 16, lengths[1], True)])
    guest.offer()
    guest.loop.settle()
    assert guest.used() == [(0, lengths[1])]
    assert guest.disk.seen == []


def test_one_chain_offered_without_end_is_bounded(guest: VirtioGuest) -> None:
    """The driver need not wait for what it has offered, and offers the same chain again."""
    guest.disk.held = True
    guest.header(FLUSH)
    guest.lay([(HEADERS, 16, False), (HEADERS + 16, 1, True)])
    for _ in range(2 * MAX_IN_FLIGHT // SIZE):
        for _ in range(SIZE):
            guest.offer(ring=False)
        guest.device.write(places.NOTIFY, 2, 0)
        guest.loop.settle()
    assert len(guest.disk.waiting) <= MAX_IN_FLIGHT
    recovers_after = guest.disk
    recovers_after.held = False
    recovers_after.release()
    guest.loop.settle()
    recovers(guest)


def test_a_turn_is_bounded_and_there_is_one_pending(routes: Any) -> None:
    guest = VirtioGuest(routes, 0)
    guest.enable()
    for _ in range(1000):
        guest.device.write(places.NOTIFY, 2, 0)
    assert len(guest.loop.soon) == 1
    guest.close()
    assert BUDGET <= MAX_IN_FLIGHT


@pytest.mark.parametrize(
    "place",
    [
        Place(8, 1 << 40, AVAILABLE, USED),
        Place(8, DESCRIPTORS, 2 * MIB - 2, USED),
        Place(8, DESCRIPTORS, AVAILABLE, (1 << 64) - 4),
    ],
)
def test_a_ring_outside_ram(place: Place) -> None:
    memory = ram()
    with pytest.raises(GuestMemoryError):
        Ring(memory, place, event_idx=True)
    memory.close()


@pytest.mark.parametrize(
    "place",
    [
        Place(0, DESCRIPTORS, AVAILABLE, USED),
        Place(3, DESCRIPTORS, AVAILABLE, USED),
        Place(65536, DESCRIPTORS, AVAILABLE, USED),
        Place(8, DESCRIPTORS + 8, AVAILABLE, USED),
        Place(8, DESCRIPTORS, AVAILABLE + 1, USED),
        Place(8, DESCRIPTORS, AVAILABLE, USED + 2),
    ],
)
def test_a_ring_that_is_none(place: Place) -> None:
    memory = ram()
    with pytest.raises(ValueError, match="virtqueue"):
        Ring(memory, place, event_idx=True)
    memory.close()


def test_a_saved_one_is_not_believed(guest: VirtioGuest) -> None:
    guest.device.stop(lambda: None)
    guest.loop.settle()
    state = guest.device.save()
    for queue in (
        QueueState(0, 0, True, 0, 0, 0),
        QueueState(512, 0, True, 0, 0, 0),
        QueueState(8, 0, True, 1 << 50, 0, 0),
        QueueState(8, 0, True, 1, 0, 0),
    ):
        with pytest.raises(ValueError, match="virtqueue"):
            guest.device.load(state._replace(queues=(queue,)))
    with pytest.raises(ValueError, match="number of queues"):
        guest.device.load(state._replace(queues=()))
    guest.device.load(state._replace(status=-1, driver_features=1 << 99, isr=1 << 40, selects=(-1, -1, -1)))
    read_all(guest)


def read_all(guest: VirtioGuest) -> None:
    """What has registers in the BAR, and the configuration space."""
    for area in range(0, places.BAR.size, PBA_OFFSET):
        for offset in range(area, area + 64, 4):
            guest.device.read(offset, 4)
    for offset in range(0, pci.PCI_CFG_SPACE_SIZE, 4):
        guest.device.function.read(offset, 4)


def test_no_saved_number_harms(guest: VirtioGuest, routes: Any) -> None:
    """Loaded or refused: then every register can be read, and interrupts go where there are vectors."""
    function = guest.device.function
    function.write(function.capability_offsets[pci.PCI_CAP_ID_MSIX] + 2, 2, pci.PCI_MSIX_FLAGS_ENABLE)
    guest.enable(vector=1)
    guest.device.stop(lambda: None)
    guest.loop.settle()
    config, state = function.save(), codec.plain(guest.device.save())
    loaded = 0
    for tree in extremes(state):
        again = VirtioGuest(routes, memory=guest.memory)
        again.device.stop(lambda: None)
        again.loop.settle()
        again.device.function.load(config)
        with suppress(ValueError):
            again.device.load(codec.restored(VirtioState, tree, "test"))
            loaded += 1
        again.device.start()
        again.loop.settle()
        read_all(again)
        again.device.inspect()
        again.device.close()
    assert loaded >= 50


REGISTER = st.tuples(
    st.sampled_from(("w", "w", "w", "r")),
    st.one_of(st.integers(0, 60), st.integers(0, places.BAR.size - 8)),
    st.sampled_from((1, 2, 4, 8)),
    st.one_of(
        st.sampled_from((0, 1, 2, 4, 8, 0xF, 0xFFFF, DESCRIPTORS, AVAILABLE, USED, 1 << 40)),
        st.integers(0, (1 << 64) - 1),
    ),
)


@settings(max_examples=200, deadline=None)
@given(steps=st.lists(REGISTER, max_size=60), settle=st.integers(1, 7))
def test_no_sequence_of_accesses_harms(
    new_routes: type[Any], steps: list[tuple[str, int, int, int]], settle: int
) -> None:
    guest = VirtioGuest(new_routes())
    guest.enable()
    for count, (what, offset, size, value) in enumerate(steps):
        if what == "w":
            guest.device.write(offset, size, value & (1 << 8 * size) - 1)
        else:
            guest.device.read(offset, size)
        if not count % settle:
            guest.loop.settle()
    guest.loop.settle()
    guest.device.inspect()
    recovers(guest)
    guest.close()


WORDS = st.one_of(st.integers(0, 9), st.sampled_from((0xFFFF, 0x8000)), st.integers(0, 0xFFFF))
DESCRIPTOR = st.tuples(
    st.sampled_from((HEADERS, DATA, TABLE, USED, AVAILABLE, DESCRIPTORS, 1 << 40, 2 * MIB - 5)),
    st.sampled_from((0, 1, 16, 17, 512, 48, 16 * SIZE, 0xFFFFFFFF)),
    st.integers(0, 7),
    st.integers(0, SIZE),
)


@settings(max_examples=300, deadline=None)
@given(
    tables=st.lists(DESCRIPTOR, min_size=2 * SIZE, max_size=2 * SIZE),
    rings=st.lists(st.lists(WORDS, min_size=SIZE, max_size=SIZE), min_size=1, max_size=4),
    headers=st.lists(st.tuples(st.integers(0, 14), st.integers(0, 1 << 64)), min_size=1, max_size=4),
    features=st.sampled_from((0, EVENT_IDX, INDIRECT, EVENT_IDX | INDIRECT)),
)
def test_no_ring_harms(
    new_routes: type[Any],
    tables: list[tuple[int, int, int, int]],
    rings: list[list[int]],
    headers: list[tuple[int, int]],
    features: int,
) -> None:
    """Every chain is given back, or the device asks for a reset; and it works again after one."""
    guest = VirtioGuest(new_routes(), features)
    guest.enable()
    for at, one in enumerate(tables):
        guest.memory.write(
            (DESCRIPTORS if at < SIZE else TABLE) + 16 * (at % SIZE), virtio.vring_desc.pack(*one)
        )
    for count, heads in enumerate(rings):
        kind, sector = headers[count % len(headers)]
        guest.header(kind, sector & (1 << 64) - 1)
        for head in heads:
            guest.offer(head, ring=False)
        guest.device.write(places.NOTIFY, 2, 0)
        guest.loop.settle()
    assert guest.device.inspect()["in_flight"] == 0
    guest.device.function.write(pci.PCI_COMMAND, 2, pci.PCI_COMMAND_MASTER | pci.PCI_COMMAND_MEMORY)
    recovers(guest)
    guest.close()
