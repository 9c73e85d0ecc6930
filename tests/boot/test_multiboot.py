"""Multiboot-1, as kvm-unit-tests read it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import kernel_images as ki
import pytest

from hvkvm.abi import board
from hvkvm.boot import e820
from hvkvm.boot.entry import Mode
from hvkvm.errors import BootError
from hvkvm.memory.guest import GuestMemory

MIB = 1 << 20
INFO = board.MULTIBOOT_INFO_ADDRESS


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with ki.ram() as ram:
        yield ram


def word(memory: GuestMemory, offset: int) -> int:
    return memory.read_u32(INFO + offset)


def test_entry_state(memory: GuestMemory, tmp_path: Path) -> None:
    entry = ki.load(memory, tmp_path / "k", ki.multiboot(b"code"))
    assert (entry.mode, entry.rip) == (Mode.PROTECTED, 0x4000BC)
    assert entry.registers == {"rax": 0x2BADB002, "rbx": INFO}
    assert memory.read(0x4000BC, 4) == b"code"
    assert memory.read(0x4080B0, 4) == b"data"


def test_info(memory: GuestMemory, tmp_path: Path) -> None:
    ki.load(memory, tmp_path / "synic.flat", ki.multiboot(), cmdline="direct x")
    assert INFO >= 0x1000  # page 0 is overwritten by the AP trampoline
    assert word(memory, 0) & 1 << 6
    assert word(memory, 4) == 639  # mem_lower, KiB; Xen looks into the BIOS data area, too
    assert memory.read(0x413, 2) == (639).to_bytes(2, "little")
    assert word(memory, 8) == (memory.size - MIB) >> 10  # mem_upper, KiB from 1 MiB
    line = memory.read(word(memory, 16), 64).split(b"\0")[0]
    assert line == b"synic.flat direct x"
    assert word(memory, 20) == 0
    mmap = memory.read(word(memory, 48), word(memory, 44))
    assert mmap == e820.multiboot_table(e820.memory_map(memory.size))


def test_command_line_is_the_program_alone_without_arguments(memory: GuestMemory, tmp_path: Path) -> None:
    ki.load(memory, tmp_path / "a test.flat", ki.multiboot())
    assert memory.read(word(memory, 16), 12) == b"a_test.flat\0"


def test_initrd_becomes_the_one_module(memory: GuestMemory, tmp_path: Path) -> None:
    env = b"NR_CPUS=2\nMEMSIZE=64\n"
    (tmp_path / ("e" * 200)).write_bytes(env)
    for initrd in (env, tmp_path / ("e" * 200)):
        ki.load(memory, tmp_path / "k", ki.multiboot(), initrd=initrd)
        assert word(memory, 20) == 1
        start, end, name, _ = struct.unpack("<4I", memory.read(word(memory, 24), 16))
        assert memory.read(start, end - start) == env
        assert memory.read(name, 300).split(b"\0")[0] in (b"initrd", b"e" * 200)
        mmap = memory.read(word(memory, 48), word(memory, 44))
        assert mmap == e820.multiboot_table(e820.memory_map(memory.size))


def test_second_segments_bss_is_cleared(memory: GuestMemory, tmp_path: Path) -> None:
    memory.write(0x4080B4, b"dirt of an earlier boot")
    ki.load(memory, tmp_path / "k", ki.multiboot())
    assert memory.read(0x4080B4, 64) == bytes(64)


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_flags_that_are_honoured(memory: GuestMemory, tmp_path: Path, flags: int) -> None:
    ki.load(memory, tmp_path / "k", ki.multiboot(flags=flags))


def test_video_mode_is_refused(memory: GuestMemory, tmp_path: Path) -> None:
    with pytest.raises(BootError, match="demands features 0x4"):
        ki.load(memory, tmp_path / "k", ki.multiboot(flags=4))


def test_wrong_checksum_or_late_header_is_none(memory: GuestMemory, tmp_path: Path) -> None:
    broken = ki.elf(32, MIB, ki.segment(MIB, struct.pack("<III", 0x1BADB002, 0, 1) + ki.HALT))
    late = ki.elf(32, MIB, ki.segment(MIB, bytes(8192) + ki.multiboot_header()))
    for content in (broken, late):
        with pytest.raises(BootError, match="neither a PVH note nor a multiboot header"):
            ki.load(memory, tmp_path / "k", content)


def test_64_bit_image_names_the_conversion(memory: GuestMemory, tmp_path: Path) -> None:
    content = ki.elf(64, MIB + 12, ki.segment(MIB, ki.multiboot_header() + ki.HALT))
    with pytest.raises(BootError, match="objcopy -O elf32-i386"):
        ki.load(memory, tmp_path / "k", content)


def test_kut_needs_more_than_16_mib(tmp_path: Path) -> None:
    """kvm-unit-tests' bss ends at 0x103c030; the error names memory enough to run them."""
    content = ki.elf(32, 0x400000 + 12, ki.segment(0x400000, ki.multiboot_header() + ki.HALT, bss=0xC3C014))
    with ki.ram(16 * MIB) as small, pytest.raises(BootError, match=r"^--memory 16M: .*give at least 25M"):
        ki.load(small, tmp_path / "k", content)
    with ki.ram(25 * MIB) as enough:
        ki.load(enough, tmp_path / "k", content)
