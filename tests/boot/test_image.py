"""What `load` says of files that are no kernel, and that nothing else ever escapes it."""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kernel_images as ki
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hvkvm.boot import image
from hvkvm.boot.entry import Entry
from hvkvm.boot.initramfs import is_static_elf
from hvkvm.errors import BootError
from hvkvm.memory.guest import GuestMemory

MIB = 1 << 20


def kernel_segment(paddr: int) -> dict[str, Any]:
    return ki.segment(paddr, ki.HALT, vaddr=ki.KERNEL_MAP + paddr % MIB)


def refused(memory: GuestMemory, path: Path, content: bytes) -> str:
    with pytest.raises(BootError) as caught:
        ki.load(memory, path, content)
    text = str(caught.value)
    assert text.startswith(f"--kernel {path}: ")
    assert "; " in text  # a reason and a remedy
    assert "\n" not in text
    return text


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with ki.ram() as ram:
        yield ram


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The fast path keeps what it takes out; not in the user's cache."""
    monkeypatch.setenv("HVKVM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is empty"),
        (b"#!/bin/sh\necho hello\n", "is a text file"),
        (gzip.compress(b"kernel", mtime=0), "is gzip data"),
        (lzma.compress(b"kernel"), "is xz data"),
        (b"\x28\xb5\x2f\xfd" + bytes(60), "is zstd data"),
        (b"070701" + b"0" * 104, "is a cpio archive"),
        (b"!<arch>\ndebian-binary   ", "is a package"),
        (b"QFI\xfb" + bytes(100), "is a qcow2 disk image"),
        (bytes(0x8001) + b"CD001", "is a CD image"),
        (bytes(510) + b"\x55\xaa" + bytes(1000), "is a boot sector"),
        (b"MZ" + bytes(0x36) + b"ARM\x64" + bytes(100), "is a Linux kernel for 64-bit Arm"),
        (b"MZ" + bytes(0x2E) + b"RISCV" + bytes(100), "is a Linux kernel for RISC-V"),
        (b"MZ\0\0zimg" + bytes(100), "is a compressed EFI kernel"),
        (b"MZ" + bytes(1000), "is an EFI or DOS program"),
        (bytes(64) + ki.multiboot_header() + bytes(64), "is a multiboot image but no ELF file"),
        (bytes(range(256)), "is not a kernel of a kind known here"),
        (b"\x7fELF", "is truncated"),
        (b"\x7fELF" + bytes(100), "its header is broken"),
        (ki.elf(64, MIB, ki.segment(MIB, ki.HALT), machine=183), "for 64-bit Arm (aarch64), not for x86"),
        (ki.elf(64, MIB, ki.segment(MIB, ki.HALT), machine=21, data=2), "for 64-bit PowerPC, not for x86"),
        (ki.elf(64, MIB, ki.segment(MIB, ki.HALT), machine=62, data=2), "not for x86"),
        (ki.elf(64, MIB, ki.segment(MIB, ki.HALT), machine=9999), "machine number 9999"),
        (ki.elf(64, MIB, ki.segment(MIB, ki.HALT), kind=1), "is an object file"),
        (ki.elf(64, MIB, ki.segment(MIB, ki.HALT), kind=4), "is a core dump"),
        (ki.elf(64, MIB), "nothing to load"),
        (ki.elf(64, MIB, ki.segment(0, b"/lib/ld.so\0", kind=ki.PT_INTERP)), "under an operating system"),
        (ki.elf(64, 4 * MIB, ki.segment(4 * MIB, ki.HALT)), "is linked to run as a program, not as a kernel"),
        (ki.elf(64, 5, kernel_segment(MIB)), "its entry point 0x5 is not in what it loads"),
        (ki.elf(32, MIB, ki.segment(MIB, ki.HALT)), "neither a PVH note nor a multiboot header"),
        (ki.elf(64, 0, kernel_segment(0)), "wants 0x0, but the first MiB belongs"),
        (
            ki.elf(64, MIB, kernel_segment(MIB), kernel_segment(MIB + 2)),
            "ELF segment 1 at 0x100002+0x4 overlaps ELF segment 0",
        ),
        (ki.elf(64, 1 << 40, kernel_segment(1 << 40)), "past the 3 GiB"),
    ],
)
def test_what_is_no_kernel_is_named(memory: GuestMemory, tmp_path: Path, content: bytes, what: str) -> None:
    assert what in refused(memory, tmp_path / "k", content)


def test_this_machines_own_programs_are_no_kernels(memory: GuestMemory) -> None:
    with pytest.raises(BootError, match="runs under an operating system"):
        image.load(memory, Path(os.path.realpath("/proc/self/exe")))


def test_a_static_program_is_no_kernel(memory: GuestMemory, tmp_path: Path) -> None:
    """It was loaded at its addresses and entered, and KVM gave up on it somewhere."""
    busybox = shutil.which("busybox-static") or shutil.which("busybox")
    if busybox is None or not is_static_elf(Path(busybox).read_bytes()):
        pytest.skip("needs a static busybox")
    with pytest.raises(
        BootError, match="is linked to run as a program, not as a kernel, and has no PVH note"
    ):
        image.load(memory, Path(busybox))


def test_missing_and_odd_files(memory: GuestMemory, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, what in (("none", "no such file"), ("", "is a directory"), ("fifo", "not a regular file")):
        with pytest.raises(BootError, match=what):
            image.load(memory, tmp_path / name)
    with pytest.raises(BootError, match="null"):
        image.load(memory, Path("a\0b"))
    with pytest.raises(BootError, match=r"^--initrd .*: no such file; check the path"):
        ki.load(memory, tmp_path / "k", ki.bzimage(), initrd=tmp_path / "none")


def test_odd_command_lines(memory: GuestMemory, tmp_path: Path) -> None:
    ki.load(memory, tmp_path / "k", ki.bzimage(), cmdline="raw=\udcff")  # a byte that is no UTF-8
    for cmdline in ("a\0b", "\ud800"):
        with pytest.raises(BootError, match=r"^--append: .*; remove it"):
            ki.load(memory, tmp_path / "k", ki.bzimage(), cmdline=cmdline)


@pytest.mark.parametrize("size", [4096, 0xE0000, MIB, 2 * MIB - 4096, 2 * MIB, 8 * MIB])
@pytest.mark.parametrize(
    "content",
    [ki.bzimage(), ki.vmlinux(), ki.pvh(at=4 * MIB), ki.multiboot()],
    ids=["bz", "elf", "pvh", "mb"],
)
def test_small_memory_is_named(tmp_path: Path, content: bytes, size: int) -> None:
    with ki.ram(size) as memory:
        try:
            entry = ki.load(memory, tmp_path / "k", content, initrd=b"i")
        except BootError as error:
            assert str(error).startswith("--memory ")
            assert "give at least" in str(error)
        else:
            assert entry.rip < size


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[GuestMemory, Path]]:
    with ki.ram() as ram:
        yield ram, tmp_path_factory.mktemp("hostile") / "k"


def survives(memory: GuestMemory, path: Path, content: bytes) -> None:
    """Only BootError may escape, and an Entry lies in RAM."""
    for kaslr in (True, False):
        try:
            entry = ki.load(memory, path, content, cmdline="x", initrd=b"initrd", kaslr=kaslr)
        except BootError as error:
            assert "\n" not in str(error)
        else:
            assert isinstance(entry, Entry)
            assert memory.contains(entry.rip, 1)


SEEDS: list[tuple[str, Callable[[], bytes]]] = [
    ("bzimage", ki.bzimage),
    ("bzimage with vmlinux", lambda: ki.bzimage(vmlinux=ki.vmlinux())),
    ("vmlinux", ki.vmlinux),
    ("pvh 64", ki.pvh),
    ("pvh 32", lambda: ki.pvh(bits=32)),
    ("multiboot", ki.multiboot),
]
# Where fields lie: flips elsewhere seldom matter.
edits = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 0x100), st.integers(0x1F0, 0x270), st.integers(0, 4000)),
        st.one_of(
            st.binary(min_size=1, max_size=8),
            st.sampled_from([b"\xff" * 4, b"\xff" * 8, b"\0" * 8, b"\0\0\0\x80", b"\xff\xff\xff\x7f"]),
        ),
    ),
    max_size=6,
)


@pytest.mark.parametrize("seed", [make for _, make in SEEDS], ids=[name for name, _ in SEEDS])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(edits=edits, cut=st.one_of(st.none(), st.integers(0, 4000)))
@example(edits=[], cut=None)
def test_hostile_kernel_ends_in_an_entry_or_a_boot_error(
    scratch: tuple[GuestMemory, Path],
    seed: Callable[[], bytes],
    edits: list[tuple[int, bytes]],
    cut: int | None,
) -> None:
    content = bytearray(seed())
    for at, data in edits:
        content[at : at + len(data)] = data
    survives(*scratch, bytes(content if cut is None else content[:cut]))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"\x7fELF", b"MZ", b"\x7fELF\x01\x01\x01", b"\x7fELF\x02\x01"]),
)
def test_any_bytes(scratch: tuple[GuestMemory, Path], tail: bytes, head: bytes) -> None:
    survives(*scratch, head + tail)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([1, 2, 3, 4]),
            st.one_of(st.integers(0, 80 * MIB), st.integers(0, (1 << 64) - 1)),
            st.one_of(st.integers(0, 200), st.integers(0, (1 << 64) - 1)),
            st.one_of(st.integers(0, 80 * MIB), st.integers(0, (1 << 64) - 1)),
        ),
        max_size=5,
    )
)
def test_any_program_headers(
    scratch: tuple[GuestMemory, Path], rows: list[tuple[int, int, int, int]]
) -> None:
    content = bytearray(ki.elf(64, MIB, *(ki.segment(0, b"") for _ in rows)))
    for index, (kind, paddr, file_size, mem_size) in enumerate(rows):
        struct.pack_into(
            "<IIQQQQQ", content, 64 + 56 * index, kind, 7, 0, ki.KERNEL_MAP, paddr, file_size, mem_size
        )
    survives(*scratch, bytes(content))


def test_a_file_that_shrinks_while_it_is_read(memory: GuestMemory, tmp_path: Path) -> None:
    """The size is checked first, so a shorter read is the only sign."""
    from hvkvm.boot.kernel_file import KernelFile

    path = tmp_path / "k"
    path.write_bytes(bytes(8192))
    with KernelFile(path, "--kernel") as file:
        os.truncate(path, 100)
        with pytest.raises(BootError, match="is truncated"):
            file.copy_to(memory, MIB, 0, 8192, "the kernel")
        with pytest.raises(BootError, match="is truncated"):
            file.read(0, 200, "the header")


def test_no_fd_and_no_view_is_left_behind(tmp_path: Path) -> None:
    def open_fds() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = open_fds()
    for content in (ki.bzimage(), ki.bzimage(vmlinux=ki.vmlinux()), b"text", ki.bzimage(version=0)):
        with ki.ram() as memory:
            try:
                ki.load(memory, tmp_path / "k", content, initrd=tmp_path / "k")
            except BootError:
                continue
    assert open_fds() == before
