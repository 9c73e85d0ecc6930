"""PVH: the note is found, and hvm_start_info says what the kernel needs."""

from __future__ import annotations

import itertools
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


def start_info(memory: GuestMemory) -> tuple[int, ...]:
    return struct.unpack("<IIIIQQQQII", memory.read(board.PVH_START_INFO_ADDRESS, 56))


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with ki.ram() as ram:
        yield ram


@pytest.mark.parametrize(("bits", "note_size"), [(64, 4), (64, 8), (32, 4)])
def test_entry_is_the_notes(memory: GuestMemory, tmp_path: Path, bits: int, note_size: int) -> None:
    entry = ki.load(memory, tmp_path / "k", ki.pvh(b"code", bits=bits, note_size=note_size))
    assert (entry.mode, entry.rip) == (Mode.PROTECTED, MIB)
    assert entry.registers == {"rbx": board.PVH_START_INFO_ADDRESS}
    assert memory.read(MIB, 4) == b"code"


def test_start_info(memory: GuestMemory, tmp_path: Path) -> None:
    ki.load(memory, tmp_path / "k", ki.pvh(), cmdline="root=x", initrd=b"payload")
    magic, version, flags, modules, modlist, line, rsdp, memmap, entries, reserved = start_info(memory)
    assert (magic, version, flags, reserved) == (0x336EC578, 1, 0, 0)
    assert memory.read(line, 7) == b"root=x\0"
    assert memory.read(rsdp, 8) == b"RSD PTR "
    assert modules == 1
    at, size, module_line, _ = struct.unpack("<4Q", memory.read(modlist, 32))
    assert (memory.read(at, size), module_line) == (b"payload", 0)
    told = list(struct.iter_unpack("<QQII", memory.read(memmap, 24 * entries)))
    assert told == [(row.address, row.size, row.type, 0) for row in e820.memory_map(memory.size)]


def test_tables_do_not_overlap_with_a_large_memory_map(tmp_path: Path) -> None:
    with ki.ram(8 << 30) as memory:
        ki.load(memory, tmp_path / "k", ki.pvh(), initrd=b"x")
        *_, modlist, _line, _rsdp, memmap, entries, _reserved = start_info(memory)
        spans = sorted(
            [
                (board.PVH_START_INFO_ADDRESS, 56),
                (modlist, 32),
                (memmap, 24 * entries),
                (board.MULTIBOOT_INFO_ADDRESS, 0),
            ]
        )
        assert all(one + size <= other for (one, size), (other, _) in itertools.pairwise(spans))


def test_without_an_initrd_there_is_no_module(memory: GuestMemory, tmp_path: Path) -> None:
    ki.load(memory, tmp_path / "k", ki.pvh())
    assert start_info(memory)[3:5] == (0, 0)


def test_note_among_others_aligned_to_8(memory: GuestMemory, tmp_path: Path) -> None:
    notes = ki.note(b"GNU\0", 5, bytes(12), align=8) + ki.note(b"Xen\0", 18, struct.pack("<Q", MIB), align=8)
    content = ki.elf(64, 0, ki.segment(MIB, ki.HALT), ki.segment(0, notes, kind=ki.PT_NOTE, align=8))
    assert ki.load(memory, tmp_path / "k", content).rip == MIB


def test_entry_outside_the_image(memory: GuestMemory, tmp_path: Path) -> None:
    content = ki.elf(64, 0, ki.segment(MIB, ki.HALT), ki.segment(0, ki.pvh_note(0x2000), kind=ki.PT_NOTE))
    with pytest.raises(BootError, match="PVH note names 0x2000, which is not in what it loads"):
        ki.load(memory, tmp_path / "k", content)


@pytest.mark.parametrize(
    "notes",
    [
        ki.note(b"Xen\0", 18, b"\1\2"),  # neither 4 nor 8 bytes
        ki.note(b"Xen", 18, bytes(4)),
        struct.pack("<III", 4, 0xFFFFFFFF, 18) + b"Xen\0",
        struct.pack("<III", 0xFFFFFFFF, 4, 18) + b"Xen\0",
        b"\0" * 11,
    ],
)
def test_broken_note_is_no_note(memory: GuestMemory, tmp_path: Path, notes: bytes) -> None:
    kernel = ki.segment(MIB, ki.HALT, vaddr=ki.KERNEL_MAP + MIB)
    content = ki.elf(64, MIB, kernel, ki.segment(0, notes, kind=ki.PT_NOTE))
    assert ki.load(memory, tmp_path / "k", content).mode is Mode.LONG
