"""The port bus without KVM: claims, splitting, string I/O, hostile kvm_run contents."""

from __future__ import annotations

import struct
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.abi.kvm import KVM_EXIT_IO_IN, KVM_EXIT_IO_OUT
from hvkvm.abi.kvm_structs import kvm_run
from hvkvm.devices.port.bus import MmioHole, PortBus
from hvkvm.errors import ConfigError
from hvkvm.events import BURST, limited

PAGE = 4096


class Vcpu:
    """kvm_run as KVM lays it out: the header page, then the page of port data."""

    def __init__(self) -> None:
        self.memory = bytearray(3 * PAGE)
        self.data = memoryview(self.memory)
        self.run = kvm_run.from_buffer(self.memory)

    def io(self, direction: int, size: int, port: int, count: int, data: bytes = b"") -> Vcpu:
        struct.pack_into("<BBHIQ", self.memory, 32, direction, size, port, count, PAGE)
        self.memory[PAGE : PAGE + len(data)] = data
        return self

    def answer(self, length: int) -> bytes:
        return bytes(self.memory[PAGE : PAGE + length])


class Log:
    """A device that remembers, and answers with what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.calls.append(("r", offset, size))
        return 0x0102030405060708 + offset

    def write(self, offset: int, size: int, value: int) -> None:
        self.calls.append(("w", offset, size, value))


@pytest.fixture
def bus(recorder):
    return PortBus(recorder)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_write_reaches_its_device_with_just_its_bytes(bus, size):
    device = Log()
    bus.add(0x100, 8, device)
    bus.handle_io(Vcpu().io(KVM_EXIT_IO_OUT, size, 0x102, 1, b"\x11\x22\x33\x44\x55\x66\x77\x88"))
    assert device.calls == [("w", 2, size, int.from_bytes(b"\x11\x22\x33\x44"[:size], "little"))]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_read_puts_the_devices_bytes_where_kvm_takes_them(bus, size):
    device = Log()
    bus.add(0x100, 8, device)
    vcpu = Vcpu().io(KVM_EXIT_IO_IN, size, 0x101, 1)
    bus.handle_io(vcpu)
    assert device.calls == [("r", 1, size)]
    assert vcpu.answer(size) == (0x0102030405060709).to_bytes(8, "little")[:size]


def test_one_vcpu_keeps_being_served_after_its_window_was_opened(bus):
    device = Log()
    bus.add(0x100, 1, device)
    vcpu = Vcpu()
    for value in range(5):
        bus.handle_io(vcpu.io(KVM_EXIT_IO_OUT, 1, 0x100, 1, bytes((value,))))
    assert [call[3] for call in device.calls] == [0, 1, 2, 3, 4]


def test_an_exit_handler_gets_the_vcpu_and_nothing_else_reaches_it(bus, recorder):
    seen: list[Vcpu] = []
    bus.add_exit(0xE4, 4, seen.append)
    one, two = Vcpu(), Vcpu()
    for vcpu in (one, two, one):
        bus.handle_io(vcpu.io(KVM_EXIT_IO_OUT, 4, 0xE4, 1, b"\1\2\3\4"))
    assert [id(vcpu) for vcpu in seen] == [id(one), id(two), id(one)]
    for direction, size, port, count in (
        (KVM_EXIT_IO_OUT, 1, 0xE4, 1),
        (KVM_EXIT_IO_OUT, 2, 0xE6, 1),
        (KVM_EXIT_IO_OUT, 4, 0xE2, 1),
        (KVM_EXIT_IO_OUT, 4, 0xE4, 2),
        (KVM_EXIT_IO_IN, 4, 0xE4, 1),
    ):
        bus.handle_io(one.io(direction, size, port, count))
    assert one.answer(4) == b"\xff" * 4
    assert len(seen) == 3
    assert {event.subject for event in recorder.events} <= {"port-unclaimed"}
    with pytest.raises(ConfigError, match=r"port 0xe6 belongs to .*append at 0xe4\+0x4"):
        bus.add(0xE6, 1, Log())
    with pytest.raises(ConfigError, match="port 0xe4 belongs to"):
        bus.add_exit(0xE4, 4, seen.append)


@pytest.mark.parametrize("length", [0, -1])
def test_an_empty_claim_is_refused(bus, length):
    with pytest.raises(ConfigError):
        bus.add(0x100, length, Log())


@pytest.mark.parametrize(("port", "length"), [(-1, 1), (0xFFFF, 2), (0x10000, 1)])
def test_a_claim_outside_the_ports_is_refused(bus, port, length):
    with pytest.raises(ConfigError):
        bus.add(port, length, Log())


@pytest.mark.parametrize(("port", "length"), [(0x100, 1), (0x0FF, 2), (0x103, 4), (0x0F0, 0x100)])
def test_an_overlap_is_refused_names_both_and_leaves_the_bus_as_it_was(bus, port, length):
    first, second = Log(), Log()
    bus.add(0x100, 4, first)
    with pytest.raises(ConfigError, match=r"Log at .*0x100\+0x4"):
        bus.add(port, length, second)
    for each in range(0xF0, 0x1F0):
        bus.write(each, 1, 0)
    assert len(first.calls) == 4
    assert second.calls == []


def test_a_wide_access_to_a_byte_device_comes_as_bytes(bus):
    device = Log()
    bus.add(0x100, 4, device, width=1)
    vcpu = Vcpu().io(KVM_EXIT_IO_OUT, 4, 0x100, 1, b"\x01\x02\x03\x04")
    bus.handle_io(vcpu)
    assert device.calls == [("w", i, 1, i + 1) for i in range(4)]
    bus.handle_io(vcpu.io(KVM_EXIT_IO_IN, 2, 0x101, 1))
    assert vcpu.answer(2) == b"\x09\x0a"


def test_an_access_across_two_devices_and_a_gap_is_split(bus):
    low, high = Log(), Log()
    bus.add(0x100, 1, low)
    bus.add(0x102, 1, high)
    bus.handle_io(Vcpu().io(KVM_EXIT_IO_OUT, 4, 0x100, 1, b"\xa1\xa2\xa3\xa4"))
    assert low.calls == [("w", 0, 1, 0xA1)]
    assert high.calls == [("w", 0, 1, 0xA3)]
    assert bus.read(0x100, 4) == 0xFF08FF08


@pytest.mark.parametrize("size", [1, 2, 4])
def test_an_unclaimed_read_gives_all_ones(bus, size):
    vcpu = Vcpu().io(KVM_EXIT_IO_IN, size, 0x500, 1, bytes(8))
    bus.handle_io(vcpu)
    assert vcpu.answer(8) == b"\xff" * size + bytes(8 - size)


def test_the_last_ports_do_not_wrap_into_an_error(bus):
    device = Log()
    bus.add(0xFFFF, 1, device)
    assert bus.read(0xFFFF, 4) == 0xFFFFFF08
    bus.write(0xFFFE, 4, 0x44332211)
    assert device.calls[-1] == ("w", 0, 1, 0x22)


def test_unclaimed_ports_are_reported_at_a_bounded_rate(recorder):
    bus = PortBus(limited(recorder))
    for _ in range(100_000):
        bus.write(0x500, 1, 0)
    assert bus.unclaimed.count == 100_000
    assert BURST <= len(recorder.events) <= BURST + 17


def test_expected_ports_are_not_reported(bus, recorder):
    bus.expect(range(0x3C0, 0x3E0))
    assert bus.read(0x3C1, 1) == 0xFF
    bus.write(0x3C0, 2, 0)
    assert recorder.events == []
    assert bus.unclaimed.count == 0


@pytest.mark.parametrize("size", [1, 2, 4])
def test_string_io_repeats_on_one_port(bus, size):
    device = Log()
    bus.add(0x100, 4, device)
    data = bytes(range(1, 1 + 8 * size))
    vcpu = Vcpu().io(KVM_EXIT_IO_OUT, size, 0x100, 8, data)
    bus.handle_io(vcpu)
    assert [call[3].to_bytes(size, "little") for call in device.calls] == [
        data[i : i + size] for i in range(0, len(data), size)
    ]
    bus.handle_io(vcpu.io(KVM_EXIT_IO_IN, size, 0x100, 8, bytes(64)))
    assert vcpu.answer(64) == (0x05060708).to_bytes(4, "little")[:size] * 8 + bytes(64 - 8 * size)


@given(
    direction=st.integers(0, 255),
    size=st.integers(0, 255),
    port=st.integers(0, 0xFFFF),
    count=st.integers(0, 0xFFFFFFFF),
)
def test_no_content_of_kvm_run_raises_or_leaves_the_data_page(direction, size, port, count):
    bus = PortBus()
    device = Log()
    bus.add(0x100, 8, device)
    bus.add(0xFFFE, 2, device, width=1)
    vcpu = Vcpu()
    vcpu.memory[2 * PAGE :] = b"\x5a" * PAGE
    bus.handle_io(vcpu.io(direction, size, port, count))
    assert vcpu.memory[2 * PAGE :] == b"\x5a" * PAGE
    assert len(device.calls) <= PAGE


def test_forgetting_a_vcpu_releases_its_pages(bus):
    device = Log()
    bus.add(0x100, 1, device)
    vcpu = Vcpu()
    bus.handle_io(vcpu.io(KVM_EXIT_IO_OUT, 1, 0x100, 1))
    bus.forget(vcpu)
    vcpu.run = None
    vcpu.data.release()
    vcpu.memory.clear()  # raises BufferError while anybody still looks


def test_the_mmio_hole_reads_ones_and_swallows_writes(recorder):
    hole = MmioHole(limited(recorder))
    mmio = SimpleNamespace(phys_addr=0xE0000000, len=4, is_write=0, data=[0] * 8)
    vcpu = SimpleNamespace(run=SimpleNamespace(mmio=mmio))
    hole.handle_mmio(vcpu)
    assert mmio.data == [0xFF] * 8
    mmio.is_write = 1
    for _ in range(1000):
        hole.handle_mmio(vcpu)
    assert hole.unclaimed.count == 1001
    assert len(recorder.events) < 20
