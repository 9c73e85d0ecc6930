"""Plain MSI: which message a vector is, masked is pending, unmasked is sent, and routes are given back."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hvkvm.abi import pci
from hvkvm.devices.pci import msix
from hvkvm.devices.pci.function import Bar, Function, Identity
from hvkvm.devices.pci.messages import Messages
from hvkvm.devices.pci.msi import MESSAGES, Msi, capability

ENABLE = pci.PCI_MSI_FLAGS_ENABLE
FLAGS, LOW, HIGH = pci.PCI_MSI_FLAGS, pci.PCI_MSI_ADDRESS_LO, pci.PCI_MSI_ADDRESS_HI
DATA, MASK, PENDING = pci.PCI_MSI_DATA_64, pci.PCI_MSI_MASK_64, pci.PCI_MSI_PENDING_64


def make(routes: Any) -> Msi:
    function = Function(Identity(1, 2, 0), capabilities=[capability()])
    msi = Msi(function, routes)
    function.on_write = lambda _offset, _size: msi.control_written()
    return msi


def read(msi: Msi, offset: int, size: int = 4) -> int:
    return msi._function.read(msi._at + offset, size)


def write(msi: Msi, offset: int, value: int, size: int = 4) -> None:
    msi._function.write(msi._at + offset, size, value)


def switch_on(msi: Msi, log2: int = 0, address: int = 0xFEE00000, data: int = 0x40) -> None:
    """As Linux does it: address, data, then the control word."""
    write(msi, LOW, address)
    write(msi, HIGH, 0)
    write(msi, DATA, data, 2)
    write(msi, FLAGS, ENABLE | log2 << 4, 2)


def test_the_capability_says_what_there_is(routes: Any) -> None:
    msi = make(routes)
    flags = read(msi, FLAGS, 2)
    assert flags & pci.PCI_MSI_FLAGS_64BIT
    assert flags & pci.PCI_MSI_FLAGS_MASKBIT
    assert 1 << (flags >> 1 & 7) == MESSAGES
    write(msi, FLAGS, 0xFFFF, 2)
    write(msi, PENDING, 0xFFFFFFFF)
    assert (read(msi, FLAGS, 2) ^ flags, read(msi, PENDING)) == (ENABLE | pci.PCI_MSI_FLAGS_QSIZE, 0)


def test_with_one_message_all_vectors_are_that(routes: Any) -> None:
    msi = make(routes)
    msi.raise_vector(5)
    assert (routes.sent, msi.enabled) == ([], False)
    switch_on(msi)
    assert (msi.enabled, routes.sent) == (True, [(0xFEE00000, 0x40)]), "what was due comes"
    msi.raise_vector(0)
    msi.raise_vector(31)
    assert routes.sent == [(0xFEE00000, 0x40)] * 3
    assert routes.open_now == [(0xFEE00000, 0x40)]


def test_with_several_the_lowest_bits_of_the_data_tell(routes: Any) -> None:
    msi = make(routes)
    switch_on(msi, log2=2, data=0x47)
    for vector in (0, 1, 3, 6):
        msi.raise_vector(vector)
    assert [data for _address, data in routes.sent] == [0x44, 0x45, 0x47, 0x46]
    assert len(routes.open_now) == 4
    write(msi, FLAGS, 0, 2)
    msi.raise_vector(1)
    assert len(routes.sent) == 4


def test_masked_it_waits_and_shows(routes: Any) -> None:
    msi = make(routes)
    switch_on(msi, log2=1)
    write(msi, MASK, 2)
    msi.raise_vector(1)
    msi.raise_vector(1)
    assert (routes.sent, read(msi, PENDING)) == ([], 2)
    write(msi, MASK, 0)
    assert (routes.sent, read(msi, PENDING)) == ([(0xFEE00000, 0x41)], 0)
    assert len(routes.open_now) == 2, "masking and unmasking makes no new route"


def test_a_host_without_more_routes_is_asked_again_until_it_has_one(routes: Any) -> None:
    msi = make(routes)
    routes.broken = True
    switch_on(msi, log2=1)
    msi.raise_vector(0)
    for _ in range(3):
        assert (msi.failures > 0, routes.sent, len(routes.later)) == (True, [], 1)
        routes.later.pop()()
    routes.broken = False
    routes.later.pop()()
    assert (routes.sent, routes.later, len(routes.open_now)) == ([(0xFEE00000, 0x40)], [], 2)


def test_a_host_without_more_routes_costs_the_guest_its_interrupt_only(routes: Any) -> None:
    msi = make(routes)
    routes.broken = True
    switch_on(msi)
    msi.raise_vector(0)
    assert (msi.failures > 0, routes.sent) == (True, [])
    routes.broken = False
    write(msi, FLAGS, ENABLE, 2)
    assert routes.sent == [(0xFEE00000, 0x40)]


def test_none_is_asked_for_once_it_is_closed(routes: Any) -> None:
    msi = make(routes)
    routes.broken = True
    switch_on(msi)
    msi.close()
    assert (routes.later, routes.open_now) == ([], [])


def test_reset_gives_every_route_back(routes: Any) -> None:
    msi = make(routes)
    switch_on(msi, log2=5)
    assert len(routes.open_now) == MESSAGES
    write(msi, MASK, 1)
    msi.raise_vector(0)
    msi.reset()
    assert (routes.open_now, msi.save(), read(msi, PENDING)) == ([], 0, 0)


def test_switched_off_it_holds_no_route(routes: Any) -> None:
    msi = make(routes)
    switch_on(msi, log2=5)
    write(msi, FLAGS, ENABLE | 1 << 4, 2)
    assert len(routes.open_now) == 2, "those of the messages that it still has"
    write(msi, FLAGS, 0, 2)
    assert routes.open_now == []
    msi.raise_vector(0)
    write(msi, FLAGS, ENABLE, 2)
    assert routes.sent == [(0xFEE00000, 0x40)], "what came meanwhile was kept"


def test_with_msix_on_as_well_only_that_holds_routes(routes: Any) -> None:
    """Found by a storm: a function held 65 of the host's routes and descriptors, where it has 33 vectors."""
    function = Function(
        Identity(1, 2, 0), bars=[Bar(0, 0x1000)], capabilities=[capability(), msix.capability(33, 0)]
    )
    both = Messages(msix.Msix(function, 33, routes), Msi(function, routes))
    function.on_write = lambda _offset, _size: both.control_written()
    switch_on(both.msi, log2=5)
    assert len(routes.open_now) == MESSAGES
    for vector in range(33):
        both.msix.write(16 * vector, 8, 0xFEE00000)
        both.msix.write(16 * vector + 8, 8, 0x50 + vector)
    flags = function.capability_offsets[pci.PCI_CAP_ID_MSIX] + pci.PCI_MSIX_FLAGS
    both.raise_vector(3)
    function.write(flags, 2, pci.PCI_MSIX_FLAGS_ENABLE)
    assert [data for _address, data in routes.open_now] == [0x50 + vector for vector in range(33)]
    both.msi.load(0)
    assert len(routes.open_now) == 33, "nor after a restore"
    function.write(flags, 2, 0)
    assert [data for _address, data in routes.open_now] == [0x40 + message for message in range(MESSAGES)]
    both.raise_vector(3)
    assert routes.sent == [(0xFEE00000, 0x43)] * 2
    both.close()
    assert routes.open_now == []


writes = st.tuples(
    st.just("write"), st.sampled_from((FLAGS, LOW, HIGH, DATA, MASK, PENDING)), st.integers(0, 2**32 - 1)
)
raises = st.tuples(st.just("raise"), st.integers(0, 32), st.just(0))


@given(steps=st.lists(writes | raises, max_size=60))
def test_whatever_is_written_nothing_is_lost_or_doubled(
    new_routes: Any, steps: list[tuple[str, int, int]]
) -> None:
    routes = new_routes()
    msi = make(routes)
    raised = 0
    for what, number, value in steps:
        if what == "write":
            size = 2 if number in (FLAGS, DATA) else 4
            write(msi, number, value & (1 << 8 * size) - 1, size)
        else:
            raised += not read(msi, PENDING) >> (number & msi.messages - 1) & 1
            msi.raise_vector(number)
        assert len(routes.sent) + bin(read(msi, PENDING)).count("1") == raised
        assert len(routes.open_now) <= MESSAGES
    other = make(new_routes())
    other._function.load(msi._function.save())
    other.load(msi.save())
    assert (other.save(), other._function.save()) == (msi.save(), msi._function.save())
    msi.close()
    assert routes.open_now == []
