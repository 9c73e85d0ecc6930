"""The entry state, asked of a real vCPU by small guests that report their registers through a port."""

from __future__ import annotations

import itertools
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import kernel_images as ki
import pytest

from hvkvm.abi import board
from hvkvm.abi.kvm import KVM_EXIT_INTR, KVM_EXIT_IO
from hvkvm.boot import entry as boot_entry
from hvkvm.boot.entry import Mode

if TYPE_CHECKING:
    from hvkvm.kvm.system import Kvm

MIB = 1 << 20
REPORT, DONE = 0x99, 0xF4
RAM = 64 * MIB
CR0_BITS = 1 << 31 | 1  # PG and PE
CR4_PAE = 1 << 5

# Each `report` is one 32-bit OUT. The stack, the GDT and the tables are used, not only looked at.
COMMON = f"""
.macro report from:vararg
    mov \\from, %eax
    out %eax, ${REPORT}
.endm
"""

PROTECTED = (
    COMMON
    + f"""
.code32
    out %eax, ${REPORT}
    report %ebx
    report %cr0
    report %cr4
    pushf
    pop %eax
    out %eax, ${REPORT}
    report %cs
    report %ds
    report %es
    report %ss
    ljmp $0x10, $1f
1:  mov $0x18, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    report (%ebx)
    report 16(%ebx)
    report 20(%ebx)
    out %al, ${DONE}
"""
)

LONG = (
    COMMON
    + f"""
.code64
    report %esi
    mov %cr0, %rax
    out %eax, ${REPORT}
    mov %cr3, %rax
    out %eax, ${REPORT}
    mov %cr4, %rax
    out %eax, ${REPORT}
    pushfq
    pop %rax
    out %eax, ${REPORT}
    mov $0xc0000080, %ecx
    rdmsr
    out %eax, ${REPORT}
    mov %cs, %eax
    out %eax, ${REPORT}
    mov %ds, %eax
    out %eax, ${REPORT}
    mov %ss, %eax
    out %eax, ${REPORT}
    pushq $0x10
    lea 1f(%rip), %rax
    pushq %rax
    lretq
1:  mov $0x18, %eax
    mov %eax, %ds
    mov %eax, %ss
    report 0x202(%rsi)
    mov 0x228(%rsi), %ebx
    report (%rbx)
    mov ${RAM - 4}, %ebx
    movl $0x12345678, (%rbx)
    report (%rbx)
    mov 0x70(%rsi), %rbx
    report (%rbx)
    out %al, ${DONE}
"""
)


def assembled(folder: Path, source: str, at: int) -> bytes:
    """The flat code of `source`, linked at `at`."""
    for tool, package in (("as", "binutils"), ("ld", "binutils")):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (package {package})")
    (folder / "s.s").write_text(source)
    subprocess.run(["as", "--64", "-o", "s.o", "s.s"], cwd=folder, check=True)
    link = ["ld", "--oformat", "binary", f"-Ttext={at:#x}", "-e", "0", "-o", "s.bin", "s.o"]
    subprocess.run(link, cwd=folder, check=True)
    return (folder / "s.bin").read_bytes()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVKVM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    from hvkvm.kvm.system import Kvm

    with Kvm() as system:
        yield system


def reports(kvm: Kvm, tmp_path: Path, content: bytes, **options: object) -> list[int]:
    """Boot `content` on one vCPU; the values that it reported until it was done."""
    from hvkvm.memory.guest import GuestMemory

    seen: list[int] = []
    with kvm.create_vm() as vm:
        vm.set_identity_map_addr(board.IDENTITY_MAP_ADDRESS)
        vm.set_tss_addr(board.TSS_ADDRESS)
        with GuestMemory(vm, RAM) as memory:
            vcpu = vm.create_vcpu(0)
            vcpu.set_cpuid2(kvm.supported_cpuid())
            # What an earlier guest may have left must not shine through.
            dirty = vcpu.regs()
            dirty.rax, dirty.rdi, dirty.r15 = 1, 2, 3
            vcpu.set_regs(dirty)
            ki.load(memory, tmp_path / "k", content, **options).apply(vcpu)
            state = vcpu.regs()
            assert (state.rdi, state.r15, state.rflags) == (0, 0, 2)
            for _ in range(100):
                reason = vcpu.enter()
                if reason == KVM_EXIT_INTR:
                    continue
                assert reason == KVM_EXIT_IO, f"exit {reason} at {vcpu.regs().rip:#x} after {seen}"
                io = vcpu.run.io
                if io.port == DONE:
                    return seen
                assert (io.port, io.size) == (REPORT, 4)
                seen.append(struct.unpack("<I", vcpu.io_data(io.data_offset, 4))[0])
    raise AssertionError(f"the guest is not done after {seen}")


@pytest.mark.kvm
def test_pvh_guest_finds_its_state(kvm: Kvm, tmp_path: Path) -> None:
    code = assembled(tmp_path, PROTECTED, 2 * MIB)
    eax, ebx, cr0, cr4, flags, *selectors, magic, modlist, _ = reports(
        kvm, tmp_path, ki.pvh(code, 2 * MIB), initrd=b"x"
    )
    assert (eax, ebx) == (0, board.PVH_START_INFO_ADDRESS)
    assert (cr0 & CR0_BITS, cr4) == (1, 0)
    assert flags & 1 << 9 == 0  # interrupts off
    assert selectors == [0x10, 0x18, 0x18, 0x18]
    assert magic == 0x336EC578
    assert modlist == board.PVH_START_INFO_ADDRESS + 0x40


@pytest.mark.kvm
def test_multiboot_guest_finds_its_state(kvm: Kvm, tmp_path: Path) -> None:
    at = 0x4000B0
    code = assembled(tmp_path, PROTECTED, at + 12)
    eax, ebx, cr0, cr4, flags, *selectors, info_flags, line, modules = reports(
        kvm, tmp_path, ki.multiboot(code, at), initrd=b"x"
    )
    assert (eax, ebx) == (0x2BADB002, board.MULTIBOOT_INFO_ADDRESS)
    assert (cr0 & CR0_BITS, cr4) == (1, 0)
    assert flags & 1 << 9 == 0
    assert selectors == [0x10, 0x18, 0x18, 0x18]
    assert info_flags & 1 << 6
    assert (line, modules) == (board.COMMAND_LINE_ADDRESS, 1)


@pytest.mark.kvm
@pytest.mark.parametrize("way", ["vmlinux", "bzImage", "bzImage's vmlinux"])
def test_linux_guest_finds_its_state(kvm: Kvm, tmp_path: Path, way: str) -> None:
    at = 16 * MIB
    inside = at + ki.ENTRY_64 if way == "bzImage" else at
    code = assembled(tmp_path, LONG, inside)
    if way == "vmlinux":
        content = ki.vmlinux(code, at)
    elif way == "bzImage":
        content = ki.bzimage(bytes(ki.ENTRY_64) + code)
    else:
        content = ki.bzimage(vmlinux=ki.vmlinux(code, at))
    rsi, cr0, cr3, cr4, flags, efer, cs, ds, ss, magic, line, stored, rsdp = reports(
        kvm, tmp_path, content, cmdline="quiet"
    )
    assert rsi == board.ZERO_PAGE_ADDRESS
    assert (cr0 & CR0_BITS, cr3) == (CR0_BITS, board.PAGE_TABLES_ADDRESS)
    assert cr4 & CR4_PAE
    assert flags & 1 << 9 == 0
    assert efer & (1 << 8 | 1 << 10) == 1 << 8 | 1 << 10
    assert (cs, ds, ss) == (0x10, 0x18, 0x18)
    assert magic.to_bytes(4, "little") == b"HdrS"
    assert line.to_bytes(4, "little") == b"quie"
    assert stored == 0x12345678  # the last of RAM, through the identity map
    assert rsdp.to_bytes(4, "little") == b"RSD "


@pytest.mark.parametrize("address", [0, 0x7000, 0x1FFFFF, 0x200000, 0xFEC00123, 0xFFFFFFFF])
def test_page_tables_map_the_first_4_gib_to_themselves(address: int) -> None:
    tables = boot_entry.page_tables()
    base = board.PAGE_TABLES_ADDRESS
    assert base + len(tables) <= board.COMMAND_LINE_ADDRESS

    def entry(table: int, index: int) -> int:
        return int(struct.unpack_from("<Q", tables, table - base + 8 * index)[0])

    pdpt = entry(base, address >> 39)
    directory = entry(pdpt & ~0xFFF, address >> 30)
    page = entry(directory & ~0xFFF, address >> 21 & 511)
    assert all(row & 3 == 3 for row in (pdpt, directory, page))
    assert page & 1 << 7
    assert (page & ~0x1FFFFF) | (address & 0x1FFFFF) == address


@pytest.mark.parametrize("mode", list(Mode))
def test_fixed_low_areas_do_not_overlap(mode: Mode) -> None:
    spans = sorted(
        [
            (board.GDT_ADDRESS, len(boot_entry.gdt(mode))),
            (board.PVH_START_INFO_ADDRESS, 0x1000),
            (board.MULTIBOOT_INFO_ADDRESS, 0x1000),
            (board.ZERO_PAGE_ADDRESS, 4096),
            (board.SETUP_DATA_ADDRESS, 48),
            (board.BOOT_STACK_ADDRESS - 0x800, 0x800),
            (board.PAGE_TABLES_ADDRESS, len(boot_entry.page_tables())),
            (board.COMMAND_LINE_ADDRESS, board.COMMAND_LINE_LIMIT),
            (board.LOW_RAM_END, 0),
            (board.ACPI_AREA_ADDRESS, board.ACPI_AREA_SIZE),
            (board.KERNEL_ADDRESS, 0),
        ]
    )
    for (start, size), (following, _) in itertools.pairwise(spans):
        assert start + size <= following
    assert spans[0][0] >= 0x1000
