"""Taking the vmlinux out of a bzImage, and keeping it."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.boot import vmlinux

ELF = b"\x7fELF" + bytes(range(256)) * 40


def bzimage(packed: bytes, setup_sectors: int = 3, version: int = 0x020F) -> bytes:
    """A boot image around `packed`, as boot.rst lays it out."""
    setup = bytearray((setup_sectors + 1) * 512)
    setup[0x1F1] = setup_sectors
    setup[0x202:0x208] = b"HdrS" + struct.pack("<H", version)
    setup[0x248:0x250] = struct.pack("<II", 100, len(packed))
    return bytes(setup) + bytes(100) + packed + b"trailing"


def with_size(packed: bytes) -> bytes:
    return packed + struct.pack("<I", len(ELF))


def by_tool(*words: str) -> Callable[[bytes], bytes]:
    def pack(data: bytes) -> bytes:
        if shutil.which(words[0]) is None:
            pytest.skip(f"the {words[0]} tool is not installed")
        return subprocess.run(words, input=data, stdout=subprocess.PIPE, check=True).stdout

    return pack


@pytest.mark.parametrize(
    "pack",
    [
        pytest.param(gzip.compress, id="gzip"),
        pytest.param(lambda data: with_size(lzma.compress(data, check=lzma.CHECK_CRC32)), id="xz"),
        pytest.param(lambda data: with_size(lzma.compress(data, format=lzma.FORMAT_ALONE)), id="lzma"),
        pytest.param(lambda data: with_size(bz2.compress(data)), id="bzip2"),
        pytest.param(lambda data: with_size(by_tool("zstd", "-q")(data)), id="zstd"),
        pytest.param(lambda data: with_size(by_tool("lz4", "-lq")(data)), id="lz4"),
        pytest.param(lambda data: data, id="none"),
    ],
)
def test_each_compression_gives_up_its_elf(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    source = tmp_path / "bzImage"
    source.write_bytes(bzimage(pack(ELF)))
    found = vmlinux.extract(source, tmp_path / "cache")
    assert found is not None
    assert found.read_bytes() == ELF


def test_second_time_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "bzImage"
    source.write_bytes(bzimage(gzip.compress(ELF)))
    first = vmlinux.extract(source, tmp_path / "cache")
    monkeypatch.setattr(vmlinux, "decompress", lambda packed: pytest.fail("decompressed again"))
    assert vmlinux.extract(source, tmp_path / "cache") == first
    copy = tmp_path / "copy"
    shutil.copy(source, copy)
    assert vmlinux.extract(copy, tmp_path / "cache") == first


def test_changed_image_is_not_mistaken_for_the_old(tmp_path: Path) -> None:
    source = tmp_path / "bzImage"
    source.write_bytes(bzimage(ELF))
    vmlinux.extract(source, tmp_path / "cache")
    other = ELF[:-1] + b"!"
    source.write_bytes(bzimage(other))
    os.utime(source, ns=(1, 1))
    found = vmlinux.extract(source, tmp_path / "cache")
    assert found is not None
    assert found.read_bytes() == other


def test_an_elf_is_its_own_vmlinux(tmp_path: Path) -> None:
    source = tmp_path / "vmlinux"
    source.write_bytes(ELF)
    assert vmlinux.extract(source, tmp_path / "cache") == source


def test_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    source = tmp_path / "bzImage"
    source.write_bytes(bzimage(ELF))
    (tmp_path / "cache").write_text("in the way")
    assert vmlinux.extract(source, tmp_path / "cache") is None


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(bytes(4096), id="zeros"),
        pytest.param(bzimage(ELF, version=0x0207), id="old protocol"),
        pytest.param(bzimage(b"MZ not a kernel"), id="no ELF inside"),
        pytest.param(bzimage(gzip.compress(ELF)[:50]), id="cut payload"),
        pytest.param(bzimage(ELF)[:3000], id="cut file"),
    ],
)
def test_what_is_no_kernel_gives_none(data: bytes, tmp_path: Path) -> None:
    source = tmp_path / "bzImage"
    source.write_bytes(data)
    assert vmlinux.extract(source, tmp_path / "cache") is None
    assert not list((tmp_path / "cache").rglob("*.partial"))


@given(st.binary(max_size=900))
def test_payload_of_random_bytes_is_a_value(data: bytes) -> None:
    assert vmlinux.payload(data) is None


@given(st.binary(min_size=0x60, max_size=0x60), st.integers(0, 255))
def test_payload_stays_inside_a_hostile_image(header: bytes, sectors: int) -> None:
    image = bytearray(bzimage(ELF))
    image[0x206:0x266] = header
    image[0x1F1] = sectors
    found = vmlinux.payload(bytes(image))
    assert found is None or found in bytes(image)


@given(st.sampled_from([b"\xfd7zXZ\0", b"\x5d\0\0", b"\x1f\x8b", b"BZh", b""]), st.binary(max_size=200))
def test_broken_payloads_give_none(magic: bytes, rest: bytes) -> None:
    assert vmlinux.decompress(magic + rest) is None or (magic + rest).startswith(b"\x7fELF")
