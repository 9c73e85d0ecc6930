"""The memory map: what every guest is told about its RAM."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.abi import board
from hvkvm.boot import e820

PAGE = 4096
sizes = st.one_of(
    st.integers(1 << 8, 1 << 27),  # 1 MiB to 512 GiB
    st.sampled_from([0xC0000, 0xC0001, 0xBFFFF, 0x100, 0x200]),  # around 3 GiB, and the smallest
).map(lambda pages: pages * PAGE)


@given(sizes)
def test_map_is_sorted_without_overlap(size: int) -> None:
    entries = e820.memory_map(size)
    for entry, following in itertools.pairwise(entries):
        assert entry.size > 0
        assert entry.end <= following.address


@given(sizes)
def test_map_covers_all_ram_but_the_vga_hole(size: int) -> None:
    spans = [(0, min(size, board.RAM_LOW_LIMIT))]
    if size > board.RAM_LOW_LIMIT:
        spans.append((board.RAM_HIGH_BASE, board.ram_end(size)))
    for start, end in spans:
        at = start
        for entry in e820.memory_map(size):
            if entry.end <= at or entry.address >= end:
                continue
            assert entry.address == at or (at, entry.address) == (0xA0000, board.ACPI_AREA_ADDRESS)
            at = entry.end
        assert at == end


@given(sizes)
def test_no_ram_is_offered_outside_ram_or_over_the_tables(size: int) -> None:
    tables = range(board.ACPI_AREA_ADDRESS, board.ACPI_AREA_ADDRESS + board.ACPI_AREA_SIZE)
    for entry in e820.memory_map(size):
        if entry.type != e820.E820_TYPE_RAM:
            continue
        low = entry.end <= min(size, board.RAM_LOW_LIMIT)
        high = entry.address == board.RAM_HIGH_BASE and entry.end == board.ram_end(size)
        assert low or high
        assert entry.end <= tables.start or entry.address >= tables.stop


@given(sizes)
def test_mmio_windows_lie_outside_ram_and_kvms_pages(size: int) -> None:
    low = (board.MMIO_LOW_BASE, board.MMIO_LOW_BASE + board.MMIO_LOW_SIZE)
    base = board.mmio_high_base(size)
    for entry in e820.memory_map(size):
        assert entry.end <= low[0] or entry.address >= low[1]
        assert entry.end <= base
    assert base % board.MMIO_HIGH_ALIGN == 0
    assert low[1] <= board.IOAPIC_ADDRESS


@pytest.mark.parametrize("size", [64 << 20, 8 << 30])
def test_three_encodings_say_the_same(size: int) -> None:
    entries = e820.memory_map(size)
    expected = [(entry.address, entry.size, entry.type) for entry in entries]
    assert list(struct.iter_unpack("<QQI", e820.boot_params_table(entries))) == expected
    assert list(struct.iter_unpack("<QQII", e820.pvh_table(entries))) == [(*row, 0) for row in expected]
    assert list(struct.iter_unpack("<IQQI", e820.multiboot_table(entries))) == [
        (20, *row) for row in expected
    ]
