"""fw_cfg with files and DMA, as firmware uses it; and descriptors that mean harm."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.abi import fw_cfg as keys
from hvkvm.devices.port.bus import PortBus
from hvkvm.devices.port.fw_cfg import FirmwareFwCfg
from hvkvm.errors import GuestMemoryError

SIZE = 0x4000
DESCRIPTOR = 0x100


class Ram:
    """Guest memory as far as fw_cfg knows it."""

    def __init__(self) -> None:
        self.bytes = bytearray(b"\xee" * SIZE)

    def contains(self, gpa: int, n: int) -> bool:
        return gpa >= 0 and n >= 0 and gpa + n <= SIZE

    def _check(self, gpa: int, n: int) -> None:
        if not self.contains(gpa, n):
            raise GuestMemoryError(gpa, n)

    def read(self, gpa: int, n: int) -> bytes:
        self._check(gpa, n)
        return bytes(self.bytes[gpa : gpa + n])

    def write(self, gpa: int, data: Any) -> None:
        self._check(gpa, len(data))
        self.bytes[gpa : gpa + len(data)] = data

    def zero(self, gpa: int, n: int) -> None:
        self.write(gpa, bytes(n))


class Firmware:
    """The guest's end."""

    def __init__(self) -> None:
        self.ram = Ram()
        self.bus = PortBus()
        self.device = FirmwareFwCfg(2, 1 << 30, self.ram)
        self.device.attach(self.bus)

    def dma(self, control: int, length: int = 0, address: int = 0, at: int = DESCRIPTOR) -> int:
        """Run one descriptor; the control word that it leaves."""
        if self.ram.contains(at, 16):
            self.ram.write(at, struct.pack(">IIQ", control, length, address))
        for port, word in ((0x514, at >> 32), (0x518, at & 0xFFFFFFFF)):
            self.bus.write(port, 4, int.from_bytes(struct.pack(">I", word), "little"))
        return int.from_bytes(self.ram.bytes[DESCRIPTOR : DESCRIPTOR + 4], "big")

    def item(self, key: int, length: int) -> bytes:
        control = key << 16 | keys.FW_CFG_DMA_CTL_SELECT | keys.FW_CFG_DMA_CTL_READ
        assert self.dma(control, length, 0x1000) == 0
        return self.ram.read(0x1000, length)

    def files(self) -> dict[str, tuple[int, int]]:
        count = int.from_bytes(self.item(keys.FW_CFG_FILE_DIR, 4), "big")
        raw = self.item(keys.FW_CFG_FILE_DIR, 4 + 64 * count)[4:]
        entries = [keys.FILE_ENTRY.unpack_from(raw, 64 * index) for index in range(count)]
        return {name.rstrip(b"\0").decode(): (size, key) for size, key, _reserved, name in entries}


@pytest.fixture
def firmware() -> Firmware:
    return Firmware()


def test_the_interface_says_that_it_has_dma(firmware: Firmware) -> None:
    assert firmware.item(keys.FW_CFG_SIGNATURE, 4) == b"QEMU"
    assert firmware.item(keys.FW_CFG_ID, 4) == b"\x03\0\0\0"
    halves = [firmware.bus.read(port, 4).to_bytes(4, "little") for port in (0x514, 0x518)]
    assert b"".join(halves) == b"QEMU CFG"


def test_files_are_found_by_name_in_order(firmware: Firmware) -> None:
    firmware.device.add_file("etc/z", b"last")
    firmware.device.add_file("bootorder", b"/pci@i0cf8\n\0")
    found = firmware.files()
    assert list(found) == ["bootorder", "etc/z"]
    for name, content in (("etc/z", b"last"), ("bootorder", b"/pci@i0cf8\n\0")):
        size, key = found[name]
        assert firmware.item(key, size) == content


def test_a_file_may_be_made_when_it_is_asked_for(firmware: Firmware) -> None:
    made: list[int] = []

    def content() -> bytes:
        made.append(1)
        return bytes([len(made)]) * 3

    firmware.device.add_file("etc/late", content, 3)
    assert made == []
    _size, key = firmware.files()["etc/late"]
    assert [firmware.item(key, 3), firmware.item(key, 3)] == [b"\1\1\1", b"\2\2\2"]


def test_reading_goes_on_where_it_was_and_ends_in_zeros(firmware: Firmware) -> None:
    firmware.device.add_file("etc/abc", b"abcdef")
    _size, key = firmware.files()["etc/abc"]
    select = key << 16 | keys.FW_CFG_DMA_CTL_SELECT
    assert firmware.dma(select | keys.FW_CFG_DMA_CTL_SKIP, 2) == 0
    assert firmware.dma(keys.FW_CFG_DMA_CTL_READ, 3, 0x2000) == 0
    assert firmware.dma(keys.FW_CFG_DMA_CTL_READ, 3, 0x2003) == 0
    assert firmware.ram.read(0x2000, 7) == b"cdef\0\0\xee"
    saved = firmware.device.save()
    firmware.device.reset()
    firmware.device.load(saved)
    assert firmware.device.save() == saved


def test_what_cannot_be_is_an_error(firmware: Firmware) -> None:
    assert firmware.dma(keys.FW_CFG_DMA_CTL_READ, 0x10, SIZE - 8) == keys.FW_CFG_DMA_CTL_ERROR
    assert firmware.dma(keys.FW_CFG_DMA_CTL_WRITE, 4, 0x2000) == keys.FW_CFG_DMA_CTL_ERROR
    firmware.dma(0, at=1 << 40)  # nowhere to say so
    with pytest.raises(ValueError, match="55 letters"):
        firmware.device.add_file("x" * 56, b"")


def test_a_file_may_be_written_within_its_size(firmware: Firmware) -> None:
    content = bytearray(b"abcdef")

    def write(offset: int, data: bytes) -> None:
        content[offset : offset + len(data)] = data

    firmware.device.add_writable("etc/written", 6, lambda: bytes(content), write)
    size, key = firmware.files()["etc/written"]
    select = key << 16 | keys.FW_CFG_DMA_CTL_SELECT
    firmware.ram.write(0x2000, b"123456789")
    assert firmware.dma(select | keys.FW_CFG_DMA_CTL_WRITE, 2, 0x2000) == 0
    assert firmware.dma(keys.FW_CFG_DMA_CTL_WRITE, 3, 0x2004) == 0
    assert firmware.item(key, size) == b"12567f"
    assert firmware.dma(select | keys.FW_CFG_DMA_CTL_WRITE, 7, 0x2000) == keys.FW_CFG_DMA_CTL_ERROR
    assert firmware.dma(select | keys.FW_CFG_DMA_CTL_WRITE, 6, SIZE - 5) == keys.FW_CFG_DMA_CTL_ERROR
    assert bytes(content) == b"12567f"


def test_another_vcpu_that_selects_meanwhile_makes_no_file_longer(firmware: Firmware) -> None:
    written: list[tuple[int, bytes]] = []
    firmware.device.add_file("large", bytes(0x1000))
    firmware.device.add_writable("small", 6, lambda: bytes(6), lambda *what: written.append(what))
    (_size, large), (_size, small) = (firmware.files()[name] for name in ("large", "small"))

    class Racing(dict[int, Any]):
        def get(self, key: int, default: Any = None) -> Any:
            firmware.bus.write(0x510, 2, large)
            return super().get(key, default)

    firmware.device._writers = Racing(firmware.device._writers)
    control = small << 16 | keys.FW_CFG_DMA_CTL_SELECT | keys.FW_CFG_DMA_CTL_WRITE
    firmware.dma(control, 0x1000, 0x2000)
    assert all(offset + len(data) <= 6 for offset, data in written)


words = st.integers(0, (1 << 32) - 1) | st.sampled_from((0, 1, 2, 0x1A, 0x19000A, 0x210018, 0xFFFFFFFF))
places = st.integers(0, SIZE + 16) | st.integers(0, (1 << 64) - 1)


@given(steps=st.lists(st.tuples(words, words | st.integers(0, SIZE), places, places), max_size=20))
def test_no_descriptor_reaches_beyond_ram_or_raises(steps: list[tuple[int, int, int, int]]) -> None:
    firmware = Firmware()
    firmware.device.add_file("etc/abc", b"abcdef")
    written: list[tuple[int, bytes]] = []
    firmware.device.add_writable("etc/ramfb", 28, lambda: bytes(28), lambda *what: written.append(what))
    for control, length, address, at in steps:
        firmware.dma(control, length, address, at)
        assert len(firmware.ram.bytes) == SIZE
        firmware.device.read(1, 1)
        assert all(offset >= 0 and offset + len(data) <= 28 for offset, data in written)
