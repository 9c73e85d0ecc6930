"""Configuration space by mechanism 1, BARs that move, lines that are shared; and a guest that means harm."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.abi import pci
from hvkvm.devices.pci.board_functions import PowerManagement, host_bridge, isa_bridge
from hvkvm.devices.pci.function import Bar, Capability, Function, Identity
from hvkvm.errors import ConfigError

ON = pci.PCI_COMMAND_MEMORY | pci.PCI_COMMAND_MASTER
BAR0 = pci.PCI_BASE_ADDRESS_0
SIZES = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFFFFFF}


def test_nobody_there_reads_all_ones(board: Any) -> None:
    board.bus.add_function(0, 0, host_bridge())
    assert board.read(0, 0) == 0x12378086
    assert board.read(1, 0) == 0xFFFFFFFF
    assert board.read(0, 0, function=1) == 0xFFFFFFFF
    board.ports.write(0, 4, pci.PCI_CONFIG_ENABLE | 1 << 16)
    assert board.ports.read(4, 4) == -1, "another bus"
    board.ports.write(0, 4, 0)
    assert board.ports.read(4, 4) == -1, "not enabled"


def test_the_reset_register_lies_amid_the_address(board: Any) -> None:
    board.ports.write(0, 4, 0xFFFFFFFF)
    assert (board.ports.read(0, 4), board.resets) == (0x80FFFFFC, 0), "a 32-bit address is no reset"
    board.ports.write(1, 1, 0x06)
    assert board.resets == 1


def test_a_guest_sizes_and_places_bars(board: Any, new_device: Any) -> None:
    small, wide = Bar(0, 0x1000), Bar(2, 0x4000, wide=True, prefetchable=True)
    device = new_device(small, wide)
    slot = board.bus.plug(device)
    assert slot == pci.FIRST_FREE_SLOT
    for offset, ones in ((BAR0, 0xFFFFF000), (BAR0 + 4, 0), (BAR0 + 8, 0xFFFFC00C), (BAR0 + 12, 0xFFFFFFFF)):
        board.write(slot, offset, 0xFFFFFFFF)
        assert board.read(slot, offset) == ones
    board.write(slot, BAR0, 0xC0000000)
    board.write(slot, BAR0 + 8, 0x10000)
    board.write(slot, BAR0 + 12, 0x4)
    assert device.moves == [], "nothing is decoded before the command register says so"
    board.write(slot, pci.PCI_COMMAND, ON, size=2)
    assert device.moves == [(0, 0xC0000000), (2, 0x4_0001_0000)]
    assert board.mmio.read(0x4_0001_0008, 4) == 8
    assert board.mmio.read(0xC0000FFC, 4) == 0xFFC
    board.write(slot, BAR0, 0xD0000000)
    assert board.mmio.read(0xC0000000, 8) == (1 << 64) - 1
    board.mmio.write(0xD0000010, 2, 0x12345)
    assert device.region(small).calls[-1] == ("w", 16, 2, 0x2345)
    board.write(slot, pci.PCI_COMMAND, 0, size=2)
    assert device.moves[-2:] == [(0, None), (2, None)]
    assert board.mmio.ranges() == []


def test_what_lies_beneath_comes_up_when_the_upper_one_moves(board: Any, new_device: Any) -> None:
    first, second = new_device(Bar(0, 0x1000), name="first"), new_device(Bar(0, 0x4000), name="second")
    slots = [board.bus.plug(device) for device in (first, second)]
    for slot in slots:
        board.write(slot, BAR0, 0xC0000000)
        board.write(slot, pci.PCI_COMMAND, ON, size=2)
    board.mmio.read(0xC0000000, 4)
    board.mmio.read(0xC0001000, 4)
    assert [len(one.region(one.function.bars[0]).calls) for one in (first, second)] == [1, 1]
    board.write(slots[0], BAR0, 0xD0000000)
    board.mmio.read(0xC0000004, 4)
    assert second.region(second.function.bars[0]).calls[-1] == ("r", 4, 4)


def test_an_intx_line_is_up_while_anybody_pulls(board: Any, new_device: Any) -> None:
    slots = [board.bus.plug(new_device(), slot) for slot in (4, 8)]
    gsi = pci.gsi_of(4, 1)
    assert gsi == pci.gsi_of(8, 1)
    for slot in slots:
        board.bus.set_intx(slot, True)
    board.bus.set_intx(4, False)
    assert board.levels == {gsi: True}
    assert board.read(8, pci.PCI_STATUS, 2) & pci.PCI_STATUS_INTERRUPT
    board.write(8, pci.PCI_COMMAND, pci.PCI_COMMAND_INTX_DISABLE, size=2)
    assert board.levels == {gsi: False}
    board.write(8, pci.PCI_COMMAND, 0, size=2)
    assert board.levels == {gsi: True}
    board.bus.reset()
    assert board.levels == {gsi: False}


def test_capabilities_are_a_list_that_ends(board: Any) -> None:
    function = Function(
        Identity(1, 2, 0),
        capabilities=[
            Capability(0x11, bytes(10), b"\x00\xc0"),
            Capability(9, bytes(7)),
            Capability(9, bytes(18)),
        ],
    )
    board.bus.add_function(3, 0, function)
    at, found = board.read(3, pci.PCI_CAPABILITY_LIST, 1), []
    while at:
        found.append((at, board.read(3, at, 1)))
        at = board.read(3, at + 1, 1)
    assert found == [(0x40, 0x11), (0x4C, 9), (0x58, 9)]
    assert board.read(3, pci.PCI_STATUS, 2) & pci.PCI_STATUS_CAP_LIST


def test_pm_base_follows_the_register(board: Any) -> None:
    bases: list[int | None] = []
    board.bus.add_function(1, 3, PowerManagement(bases.append))
    board.write(1, pci.PMBA, 0xB001, function=3)
    assert bases == [None]
    board.write(1, pci.PMREGMISC, 1, size=1, function=3)
    assert (bases, board.read(1, pci.PMBA, function=3)) == ([None, 0xB000], 0xB001)
    assert PowerManagement(bases.append, power_on_base=0x600).base == 0x600


def test_slots_run_out_in_one_line(board: Any, new_device: Any) -> None:
    for _ in range(pci.FIRST_FREE_SLOT, pci.DEVICES):
        board.bus.plug(new_device())
    with pytest.raises(ConfigError, match="all 32 PCI slots"):
        board.bus.plug(new_device())


@given(
    writes=st.lists(
        st.tuples(
            st.sampled_from((0, 1, 2, 3, 4)),
            st.integers(0, 255),
            st.sampled_from((1, 2, 4)),
            st.integers(0, (1 << 32) - 1) | st.sampled_from((0, 0xFFFFFFFF, 0xC0000000, 0xFEE00000, 7)),
        ),
        max_size=40,
    )
)
def test_whatever_a_guest_writes_the_map_is_what_the_registers_say(
    new_board: Any, new_device: Any, writes: list[tuple[int, int, int, int]]
) -> None:
    board = new_board()
    board.bus.add_function(0, 0, host_bridge())
    board.bus.add_function(1, 0, isa_bridge())
    devices = [
        new_device(Bar(0, 0x1000)),
        new_device(Bar(0, 16), Bar(4, 1 << 40, wide=True)),
        new_device(Bar(5, 1 << 31)),
    ]
    for device in devices:
        board.bus.plug(device)
    identities = [board.read(slot, 0) for slot in range(5)]
    for slot, offset, size, value in writes:
        board.write(slot, offset & -size, value & SIZES[size], size)
        expected = {
            (device.function.where(bar), bar.size) for device in devices for bar in device.function.bars
        } - {(None, bar.size) for device in devices for bar in device.function.bars}
        assert {(one.gpa, one.size) for one in board.mmio.ranges()} == expected
        for gpa, length in expected:
            for at in (gpa, gpa + length - 1):
                board.mmio.read(at, 1)
    assert [board.read(slot, 0) for slot in range(5)] == identities
    saved = board.bus.save()
    board.bus.load(saved)
    assert board.bus.save() == saved
    fresh = new_board()
    fresh.bus.add_function(0, 0, host_bridge())
    fresh.bus.add_function(1, 0, isa_bridge())
    for device in devices:
        fresh.bus.plug(new_device(*device.function.bars))
    power_on = fresh.bus.save()
    fresh.bus.load(saved)
    assert fresh.bus.save() == saved
    assert sorted(one[:2] for one in fresh.mmio.ranges()) == sorted(one[:2] for one in board.mmio.ranges())
    board.bus.reset()
    assert board.bus.save() == power_on
    assert board.mmio.ranges() == []
