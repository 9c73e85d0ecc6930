"""MSI-X: masked is pending, unmasked is sent, once; routes are made when they are needed and given back."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hvkvm.abi import pci
from hvkvm.devices.pci.function import Function, Identity
from hvkvm.devices.pci.msix import PBA_OFFSET, Msix, capability

VECTORS = 3
ENABLE, MASK_ALL = pci.PCI_MSIX_FLAGS_ENABLE, pci.PCI_MSIX_FLAGS_MASKALL


def make(routes: Any) -> Msix:
    function = Function(Identity(1, 2, 0), capabilities=[capability(VECTORS, 0)])
    msix = Msix(function, VECTORS, routes)
    function.on_write = lambda _offset, _size: msix.control_written()
    return msix


def control(msix: Msix, value: int) -> None:
    msix._function.write(msix._flags_at, 2, value)


def entry(msix: Msix, vector: int, address: int, data: int, *, masked: bool = False) -> None:
    for offset, value in ((0, address), (4, 0), (8, data), (12, int(masked))):
        msix.write(16 * vector + offset, 4, value)


def test_a_vector_is_sent_where_the_guest_said(routes: Any) -> None:
    msix = make(routes)
    entry(msix, 1, 0xFEE00000, 0x41)
    control(msix, ENABLE)
    msix.raise_vector(1)
    assert routes.sent == [(0xFEE00000, 0x41)]
    entry(msix, 1, 0xFEE01000, 0x42)
    msix.raise_vector(1)
    assert routes.sent[1:] == [(0xFEE01000, 0x42)]
    assert routes.open_now == [(0xFEE01000, 0x42)]
    assert msix.enabled


def test_masked_it_waits_and_shows(routes: Any) -> None:
    msix = make(routes)
    entry(msix, 2, 0xFEE00000, 0x50, masked=True)
    control(msix, ENABLE)
    msix.raise_vector(2)
    msix.raise_vector(2)
    assert (routes.sent, msix.read(PBA_OFFSET, 8)) == ([], 4)
    msix.write(16 * 2 + 12, 4, 0)
    assert (routes.sent, msix.read(PBA_OFFSET, 8)) == ([(0xFEE00000, 0x50)], 0)
    control(msix, ENABLE | MASK_ALL)
    msix.raise_vector(2)
    assert len(routes.sent) == 1
    control(msix, ENABLE)
    assert len(routes.sent) == 2
    assert len(routes.open_now) == 1, "masking and unmasking makes no new route"


def test_a_host_without_more_routes_costs_the_guest_its_interrupt_only(routes: Any) -> None:
    msix = make(routes)
    routes.broken = True
    entry(msix, 0, 0xFEE00000, 0x60)
    control(msix, ENABLE)
    msix.raise_vector(0)
    assert (msix.failures > 0, routes.sent) == (True, [])
    routes.broken = False
    control(msix, ENABLE)
    assert routes.sent == [(0xFEE00000, 0x60)]


def test_a_host_without_more_routes_is_asked_again_until_it_has_one(routes: Any) -> None:
    msix = make(routes)
    routes.broken = True
    entry(msix, 0, 0xFEE00000, 0x60)
    entry(msix, 1, 0xFEE00000, 0x61)
    control(msix, ENABLE)
    msix.raise_vector(0)
    for _ in range(3):
        assert (msix.failures > 0, routes.sent, len(routes.later)) == (True, [], 1)
        routes.later.pop()()
    routes.broken = False
    routes.later.pop()()
    assert (routes.sent, routes.later, len(routes.open_now)) == ([(0xFEE00000, 0x60)], [], 2)
    routes.broken = True
    entry(msix, 2, 0xFEE00000, 0x62)
    msix.close()
    assert (routes.later, routes.open_now) == ([], [])


def test_reset_gives_every_route_back(routes: Any) -> None:
    msix = make(routes)
    power_on = msix.save()
    entry(msix, 0, 0xFEE00000, 0x60)
    control(msix, ENABLE)
    msix.reset()
    assert (routes.open_now, msix.save()) == ([], power_on)


writes = st.tuples(
    st.just("write"),
    st.integers(0, 16 * VECTORS + 8),
    st.sampled_from((1, 2, 4, 8)),
    st.integers(0, 2**64 - 1),
)
controls = st.tuples(st.just("control"), st.sampled_from((0, ENABLE, MASK_ALL, ENABLE | MASK_ALL)))
raises = st.tuples(st.just("raise"), st.integers(0, VECTORS - 1))


@given(steps=st.lists(writes | controls | raises, max_size=60))
def test_whatever_is_written_nothing_is_lost_or_doubled(
    new_routes: Any, steps: list[tuple[Any, ...]]
) -> None:
    routes = new_routes()
    msix = make(routes)
    raised = 0
    for step in steps:
        if step[0] == "write":
            msix.write(step[1], step[2], step[3] & (1 << 8 * step[2]) - 1)
        elif step[0] == "control":
            control(msix, step[1])
        else:
            pending = msix.read(PBA_OFFSET, 8)
            raised += not pending >> step[1] & 1
            msix.raise_vector(step[1])
        waiting = bin(msix.read(PBA_OFFSET, 8)).count("1")
        assert len(routes.sent) + waiting == raised
        assert len(routes.open_now) <= VECTORS
    saved = msix.save()
    other = make(new_routes())
    other._function.load(msix._function.save())
    other.load(saved)
    assert other.save() == saved
    msix.close()
    assert routes.open_now == []
