"""Taking the vmlinux out of a bzImage, and keeping it."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import pwd
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.boot import cache, vmlinux

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


def test_a_kept_file_that_a_crash_emptied_is_made_again(tmp_path: Path) -> None:
    """Its name can be on the disk before its bytes are: every run refused it then."""
    source = tmp_path / "bzImage"
    source.write_bytes(bzimage(gzip.compress(ELF)))
    for _time in range(2):
        found = vmlinux.extract(source, tmp_path / "cache")
        assert found is not None
        assert found.read_bytes() == ELF
        found.write_bytes(b"")


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


@pytest.mark.skipif(shutil.which("zstd") is None, reason="the zstd tool is not installed")
def test_a_kernel_that_says_it_is_too_large_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = with_size(by_tool("zstd", "-q")(ELF))
    assert vmlinux.decompress(packed) == ELF
    monkeypatch.setattr(vmlinux, "_VMLINUX_MAX", len(ELF) - 1)
    assert vmlinux.decompress(packed) is None


@pytest.mark.parametrize(("tool", "magic"), [("zstd", b"\x28\xb5\x2f\xfd"), ("lz4", b"\x02\x21\x4c\x18")])
def test_a_tool_that_unpacks_more_than_was_said_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, magic: bytes
) -> None:
    script = tmp_path / tool
    script.write_text(f"#!/bin/sh\nhead -c {8 << 20} /dev/zero\necho > {tmp_path}/finished\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert vmlinux.decompress(with_size(magic)) is None
    assert not (tmp_path / "finished").exists()


def elf64(*segments: tuple[int, bytes, int], tail: bytes = b"symbols") -> bytes:
    """An ELF of (program header type, bytes in the file, bytes in memory) and something behind."""
    start = 64 + 56 * len(segments)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01",
        2,
        62,
        1,
        0x1000,
        64,
        0,
        0,
        64,
        56,
        len(segments),
        0,
        0,
        0,
    )
    table, body = b"", b""
    for number, (kind, data, mem_size) in enumerate(segments):
        where = start + len(body)
        table += struct.pack(
            "<IIQQQQQQ", kind, 5, where, 0, 0x100000 * (number + 1), len(data), mem_size, 0x1000
        )
        body += data
    return header + table + body + tail


def test_trailing_zeros_of_segments_are_left_to_the_loader() -> None:
    source = elf64(
        (1, b"code\0\0", 6), (4, b"note\0\0\0\0", 8), (1, b"da\0ta" + bytes(9000), 10000), (1, bytes(50), 50)
    )
    found = vmlinux.without_tails(source)
    assert len(found) == len(source)
    sizes = [struct.unpack_from("<QQ", found, 64 + 56 * number + 32) for number in range(4)]
    assert sizes == [(4, 6), (8, 8), (5, 10000), (0, 50)]
    assert found[64 + 56 * 4 :] == source[64 + 56 * 4 :]


@given(st.binary(max_size=300), st.integers(0, 80), st.integers(0, 255))
def test_broken_headers_are_left_alone_or_stay_inside(junk: bytes, at: int, value: int) -> None:
    assert vmlinux.without_tails(b"\x7fELF" + junk)[:4] == b"\x7fELF"
    broken = bytearray(elf64((1, b"code" + bytes(100), 104)))
    broken[at] = value
    found = vmlinux.without_tails(bytes(broken))
    assert len(found) == len(broken)


def test_the_kept_vmlinux_loads_the_same_memory(tmp_path: Path) -> None:
    """Fresh, and again over what a guest wrote: what the file leaves out is zero."""
    from hvkvm.boot import elf
    from hvkvm.boot.kernel_file import KernelFile
    from hvkvm.memory.guest import GuestMemory

    class NoVm:
        memory_slots = 509

        def set_user_memory_region(self, *where: int) -> None: ...

    source = elf64((1, b"code" + bytes(5000), 6000), (1, b"data" * 3000 + bytes(30000), 50000))
    (tmp_path / "bzImage").write_bytes(bzimage(gzip.compress(source)))
    (tmp_path / "vmlinux").write_bytes(source)
    kept = vmlinux.extract(tmp_path / "bzImage", tmp_path / "cache")
    assert kept is not None
    images = []
    for path in (tmp_path / "vmlinux", kept):
        with GuestMemory(NoVm(), 4 << 20) as memory:
            for _life in range(2):
                with KernelFile(path, "--kernel") as file:
                    elf.parse(file).load(memory)
                images.append(memory.read(0x100000, 0x200000))
                memory.write(0x100000, b"guest" * 1200)
                memory.write(0x200000, b"guest" * 10000)
    assert len(images) == 4
    assert len(set(images)) == 1


@pytest.mark.parametrize("home", ["", None])
def test_an_empty_home_is_none(monkeypatch: pytest.MonkeyPatch, home: str | None) -> None:
    """The folder would be one at the root, which a container's root can make."""
    monkeypatch.delenv("HVKVM_CACHE", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda _uid: SimpleNamespace(pw_dir="/home/somebody"))
    monkeypatch.delenv("HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    assert cache.root() == Path("/home/somebody/.cache/hvkvm")
    monkeypatch.setenv("HVKVM_CACHE", "")
    monkeypatch.setenv("HOME", "/h")
    assert cache.root() == Path("/h/.cache/hvkvm")
