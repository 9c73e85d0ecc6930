"""The general-purpose event block, and the line that it shares with PM1."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.abi import board
from hvkvm.devices.port.acpi_gpe import AcpiGpeBlock, GpeState, SharedLine
from hvkvm.devices.port.bus import PortBus


def block() -> tuple[PortBus, AcpiGpeBlock, list[bool]]:
    levels: list[bool] = []
    bus, gpe = PortBus(), AcpiGpeBlock(levels.append)
    gpe.attach(bus)
    return bus, gpe, levels


@pytest.mark.parametrize("enabled_first", [True, False])
def test_an_event_raises_the_sci_until_its_status_is_cleared(enabled_first: bool) -> None:
    bus, gpe, levels = block()
    steps = [lambda: bus.write(board.GPE0_PORT + 2, 2, 1), lambda: gpe.raise_event(board.GPE_GENERATION)]
    for step in steps if enabled_first else reversed(steps):
        assert not any(levels)
        step()
    assert levels[-1]
    assert bus.read(board.GPE0_PORT, 4) == 0x10001
    bus.write(board.GPE0_PORT, 2, 0xFFFE)
    assert levels[-1], "a zero clears nothing"
    bus.write(board.GPE0_PORT, 1, 1)
    assert not levels[-1]
    assert bus.read(board.GPE0_PORT, 4) == 0x10000


def test_a_saved_event_is_pending_where_it_goes_on() -> None:
    _bus, gpe, _levels = block()
    gpe.load(GpeState(0xFFFF, 0xFFFF))
    assert gpe.save() == GpeState(board.GPE0_EVENTS, board.GPE0_EVENTS), "no event that is not there"
    other_bus, other, levels = block()
    other.load(gpe.save())
    assert levels == [True]
    other.reset()
    assert (levels[-1], other_bus.read(board.GPE0_PORT, 4)) == (False, 0)


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 3), st.sampled_from((1, 2, 4)), st.integers(0, 0xFFFFFFFF))
    )
)
def test_any_accesses_leave_it_in_order(accesses: list[tuple[bool, int, int, int]]) -> None:
    bus, gpe, _levels = block()
    for is_write, offset, size, value in accesses:
        if is_write:
            bus.write(board.GPE0_PORT + offset, size, value & (1 << 8 * size) - 1)
        else:
            assert 0 <= bus.read(board.GPE0_PORT + offset, size) < 1 << 8 * size
        status, enable = gpe.save()
        assert not (status | enable) & ~board.GPE0_EVENTS


def test_a_shared_line_is_high_while_anybody_wants_it() -> None:
    levels: list[bool] = []
    line = SharedLine(levels.append)
    one, two = line.add(), line.add()
    one(True)
    two(True)
    one(False)
    two(False)
    assert levels == [True, True, True, False]
