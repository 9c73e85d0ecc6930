"""By what a disk is known that UEFI firmware can boot, and what hostile disks can do."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from disk_images import ESP, LINUX, MIB, gpt, mbr, put
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.block.boot_search import bootable
from hvkvm.block.image import ImageOptions
from hvkvm.block.raw import RawImage

Opener = Callable[..., RawImage]
SECTOR = 2048


def el_torito(sections: list[tuple[int, int, int]], platform: int = 0) -> bytearray:
    """An ISO's boot record and catalogue, with section headers of (id, platform, entries)."""
    disk = bytearray(64 * SECTOR)
    put(disk, 17 * SECTOR, b"\0CD001\1EL TORITO SPECIFICATION")
    put(disk, 17 * SECTOR + 0x47, struct.pack("<I", 20))
    put(disk, 20 * SECTOR, struct.pack("<BB", 1, platform))
    put(disk, 20 * SECTOR + 32, b"\x88")
    at = 20 * SECTOR + 64
    for kind, which, count in sections:
        put(disk, at, struct.pack("<BBH", kind, which, count))
        at += 32 * (1 + count)
    return disk


@pytest.mark.parametrize("sector", [512, 4096])
def test_gpt_with_an_efi_system_partition(opened: Opener, sector: int) -> None:
    disk = bytearray(8 * MIB)
    gpt(disk, [(LINUX, MIB, MIB), (ESP, 2 * MIB, MIB)], sector)
    assert bootable(opened(disk, sector)) == "an EFI system partition (GPT)"


def test_gpt_without_one_is_not(opened: Opener) -> None:
    disk = bytearray(8 * MIB)
    gpt(disk, [(LINUX, MIB, MIB)])
    assert bootable(opened(disk)) == ""


@pytest.mark.parametrize(
    ("kind", "flag", "words"),
    [
        (0xEF, 0, "an EFI system partition (MBR)"),
        (0x0C, 0, "a FAT partition (MBR)"),
        (0x83, 0x80, "a boot flag in its MBR"),
        (0x83, 0, ""),
    ],
)
def test_mbr(opened: Opener, kind: int, flag: int, words: str) -> None:
    disk = bytearray(8 * MIB)
    mbr(disk, [(kind, MIB, MIB)])
    disk[446] = flag
    assert bootable(opened(disk)).startswith(words)
    assert bool(bootable(opened(disk))) == bool(words)


@pytest.mark.parametrize("at", [54, 82])
def test_fat_on_the_whole_disk(opened: Opener, at: int) -> None:
    disk = bytearray(MIB)
    put(disk, 0, b"\xeb\x3c\x90")
    put(disk, at, b"FAT")
    put(disk, 510, b"\x55\xaa")
    assert bootable(opened(disk)) == "a FAT file system"


def test_el_torito(opened: Opener) -> None:
    """The first entry is for a BIOS; a section for EFI comes behind it, or the catalogue is EFI's alone."""
    assert bootable(opened(el_torito([]))) == ""
    assert bootable(opened(el_torito([(0x90, 0, 2), (0x91, 0, 1)]))) == ""
    assert bootable(opened(el_torito([(0x90, 0, 2), (0x91, 0xEF, 1)]))) == "an EFI boot image (El Torito)"
    assert bootable(opened(el_torito([], platform=0xEF))) == "an EFI boot image (El Torito)"


def test_a_catalogue_beyond_the_end(opened: Opener) -> None:
    disk = el_torito([(0x91, 0xEF, 1)])
    put(disk, 17 * SECTOR + 0x47, b"\xff\xff\xff\xff")
    assert bootable(opened(disk)) == ""


def test_nothing(opened: Opener) -> None:
    assert bootable(opened(bytes(MIB))) == ""


@given(st.binary(max_size=2048), st.binary(max_size=2048), st.binary(max_size=2048))
def test_no_bytes_raise(
    tmp_path_factory: pytest.TempPathFactory, first: bytes, record: bytes, catalogue: bytes
) -> None:
    disk = el_torito([])
    put(disk, 0, first)
    put(disk, 17 * SECTOR + 0x1F, record[: SECTOR - 0x1F])
    put(disk, 20 * SECTOR, catalogue)
    path = tmp_path_factory.getbasetemp() / "hostile"
    path.write_bytes(disk)
    image = RawImage(path, ImageOptions(read_only=True))
    try:
        bootable(image)
    finally:
        image.close()
