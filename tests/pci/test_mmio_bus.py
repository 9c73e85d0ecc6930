"""The MMIO bus: who answers where, across borders, and where nobody is."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hvkvm.abi.kvm_structs import kvm_run
from hvkvm.devices.mmio_bus import MmioBus


class Vcpu:
    """The part of kvm_run that an MMIO exit fills."""

    def __init__(self) -> None:
        self.run = kvm_run()

    def access(self, gpa: int, size: int, value: int | None = None) -> Any:
        mmio = self.run.mmio
        mmio.phys_addr, mmio.len, mmio.is_write = gpa, size, value is not None
        mmio.data[:] = list((value or 0).to_bytes(8, "little"))
        return self

    def answer(self, size: int) -> int:
        return int.from_bytes(bytes(self.run.mmio.data[:size]), "little")


class Ram:
    def __init__(self, size: int) -> None:
        self.bytes = bytearray(size)

    def read(self, offset: int, size: int) -> int:
        assert offset + size <= len(self.bytes)
        return int.from_bytes(self.bytes[offset : offset + size], "little") | 1 << 80

    def write(self, offset: int, size: int, value: int) -> None:
        self.bytes[offset : offset + size] = value.to_bytes(size, "little")


def test_an_access_reaches_its_device_or_reads_ones() -> None:
    bus, ram, vcpu = MmioBus(), Ram(0x100), Vcpu()
    bus.add(0xC0000000, 0x100, ram)
    bus.handle_mmio(vcpu.access(0xC0000010, 4, 0x11223344))
    bus.handle_mmio(vcpu.access(0xC0000012, 2))
    assert vcpu.answer(2) == 0x1122
    bus.handle_mmio(vcpu.access(0xBFFFFFF8, 8))
    assert vcpu.answer(8) == (1 << 64) - 1
    assert bus.unclaimed.count == 1
    bus.handle_mmio(vcpu.access(0xC0000100, 4, 5))
    assert bus.unclaimed.count == 2


def test_an_access_across_an_end_is_split() -> None:
    bus, ram, vcpu = MmioBus(), Ram(4), Vcpu()
    bus.add(0x1000, 4, ram)
    bus.handle_mmio(vcpu.access(0x1002, 4, 0x44332211))
    assert bytes(ram.bytes) == b"\0\0\x11\x22"
    bus.handle_mmio(vcpu.access(0xFFE, 4))
    assert vcpu.answer(4) == 0xFFFF


spots = st.tuples(st.integers(0, 40), st.integers(1, 20))


@given(ranges=st.lists(spots, max_size=8), gone=st.lists(st.integers(0, 7), max_size=8))
def test_the_first_to_come_answers(ranges: list[tuple[int, int]], gone: list[int]) -> None:
    bus = MmioBus()
    added = []
    for gpa, size in ranges:
        ram = Ram(size)
        ram.bytes[:] = bytes([len(added) + 1]) * size
        added.append(bus.add(gpa, size, ram))
    for index in gone:
        if index < len(added) and added[index] in bus.ranges():
            bus.remove(added[index])
    left = bus.ranges()
    for gpa in range(64):
        holder = next((one for one in left if one.gpa <= gpa < one.gpa + one.size), None)
        assert bus.read(gpa, 1) == (0xFF if holder is None else added.index(holder) + 1)
