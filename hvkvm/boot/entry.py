"""The register state in which the boot vCPU starts, and the tables that state points to.

A loader returns an `Entry`; `machine` applies it to vCPU 0 before it first
runs, from the thread that owns that vCPU. The other vCPUs need their memory types
alone: they wait for INIT and SIPI. Source: Linux Documentation/arch/x86/boot.rst (64-bit
boot protocol), the PVH and multiboot-1 specifications (flat protected mode).
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from hvkvm.abi import board
from hvkvm.abi.x86 import (
    EFER_LMA,
    EFER_LME,
    MTRR_DEF_TYPE_E,
    MTRR_TYPE_WRBACK,
    X86_CR0_ET,
    X86_CR0_PE,
    X86_CR0_PG,
    X86_CR4_PAE,
    X86_EFLAGS_FIXED,
    MSR_MTRRdefType,
)
from hvkvm.boot.layout import GuestRam
from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from hvkvm.abi.kvm_structs import kvm_segment
    from hvkvm.kvm.vcpu import Vcpu

CODE_SELECTOR = 0x10  # Linux's __BOOT_CS and __BOOT_DS
DATA_SELECTOR = 0x18
TSS_SELECTOR = 0x20

_CODE = 0b1011  # execute, read, accessed
_DATA = 0b0011  # read, write, accessed
_BUSY_TSS = 0b1011


_IDENTITY_GIB = 4
_PAGE = 0x1000
_PTE_PRESENT_WRITE = 0b11
_PDE_LARGE = 1 << 7


class Mode(enum.Enum):
    """What the first instruction finds: 64-bit code with RAM identity-mapped, or flat 32-bit, paging off."""

    LONG = 64
    PROTECTED = 32


class Entry(NamedTuple):
    """Where and how vCPU 0 starts; `what` says in one line what was loaded.

    `registers` are by kvm_regs name; those not named are zero.
    """

    mode: Mode
    rip: int
    registers: Mapping[str, int] = MappingProxyType({})
    what: str = "kernel"

    def apply(self, vcpu: Vcpu) -> None:
        """Set the general and special registers of `vcpu`. Raises KvmIoctlError; thread: the vCPU's owner."""
        from hvkvm.abi.kvm_structs import kvm_regs

        sregs = vcpu.sregs()
        long = self.mode is Mode.LONG
        _flat(sregs.cs, CODE_SELECTOR, _CODE)
        sregs.cs.l, sregs.cs.db = (1, 0) if long else (0, 1)
        for data in (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss):
            _flat(data, DATA_SELECTOR, _DATA)
        _system(sregs.tr, TSS_SELECTOR, limit=0x67, kind=_BUSY_TSS)
        _system(sregs.ldt, 0, limit=0, kind=2)
        sregs.ldt.present, sregs.ldt.unusable = 0, 1
        sregs.gdt.base, sregs.gdt.limit = board.GDT_ADDRESS, len(gdt(self.mode)) - 1
        sregs.idt.base, sregs.idt.limit = 0, 0
        sregs.cr0 = X86_CR0_PE | X86_CR0_ET | (X86_CR0_PG if long else 0)
        sregs.cr2 = sregs.cr8 = 0
        sregs.cr3 = board.PAGE_TABLES_ADDRESS if long else 0
        sregs.cr4 = X86_CR4_PAE if long else 0
        sregs.efer = EFER_LME | EFER_LMA if long else 0
        vcpu.set_sregs(sregs)
        regs = kvm_regs(rip=self.rip, rflags=X86_EFLAGS_FIXED, rsp=board.BOOT_STACK_ADDRESS)
        for register, value in self.registers.items():
            setattr(regs, register, value)
        vcpu.set_regs(regs)


def make_memory_cacheable(vcpu: Vcpu) -> None:
    """Turn the MTRRs of `vcpu` on, with write-back for everything; thread: the vCPU's owner.

    Firmware would have done so. Left as at power-on they are off: Linux has no /proc/mtrr then, and
    6.1 no PAT either. Every vCPU needs it, or Linux says that the CPUs are set up apart. Where the CPU
    has no MTRRs KVM may refuse, and nothing is lost. Raises KvmIoctlError for what else goes wrong.
    """
    vcpu.set_writable_msrs({MSR_MTRRdefType: MTRR_DEF_TYPE_E | MTRR_TYPE_WRBACK})


def write_tables(memory: GuestRam, mode: Mode) -> None:
    """Write what `Entry.apply` points to: the GDT, and for long mode the page tables."""
    memory.write(board.GDT_ADDRESS, gdt(mode))
    if mode is Mode.LONG:
        memory.write(board.PAGE_TABLES_ADDRESS, page_tables())


def gdt(mode: Mode) -> bytes:
    """The table whose entries equal the segments that `Entry.apply` loads."""
    code_size = 0b1010 if mode is Mode.LONG else 0b1100  # G, and L or D/B
    return struct.pack(
        "<6Q",
        0,
        0,
        _descriptor(0xFFFFF, 0x90 | _CODE, code_size),
        _descriptor(0xFFFFF, 0x90 | _DATA, 0b1100),
        _descriptor(0x67, 0x80 | _BUSY_TSS, 0),
        0,  # the upper half of a long-mode TSS descriptor
    )


def page_tables() -> bytes:
    """PML4, PDPT and page directories that map the first 4 GiB one to one in 2 MiB pages.

    All that the loaders place lies below that; 1 GiB pages would need a CPUID bit.
    """
    base = board.PAGE_TABLES_ADDRESS
    pml4 = struct.pack("<Q", base + _PAGE | _PTE_PRESENT_WRITE)
    directories = [base + (2 + index) * _PAGE | _PTE_PRESENT_WRITE for index in range(_IDENTITY_GIB)]
    pdpt = struct.pack(f"<{_IDENTITY_GIB}Q", *directories)
    large = _PTE_PRESENT_WRITE | _PDE_LARGE
    entries = struct.pack(f"<{512 * _IDENTITY_GIB}Q", *range(large, (_IDENTITY_GIB << 30) + large, 2 << 20))
    return pml4.ljust(_PAGE, b"\0") + pdpt.ljust(_PAGE, b"\0") + entries


def _descriptor(limit: int, access: int, flags: int) -> int:
    """A segment descriptor with base 0."""
    return (limit & 0xFFFF) | access << 40 | (limit >> 16) << 48 | flags << 52


def _flat(segment: kvm_segment, selector: int, kind: int) -> None:
    segment.base, segment.limit, segment.selector, segment.type = 0, 0xFFFFFFFF, selector, kind
    segment.present, segment.dpl, segment.s, segment.g, segment.avl, segment.unusable = 1, 0, 1, 1, 0, 0
    segment.l, segment.db = 0, 1


def _system(segment: kvm_segment, selector: int, *, limit: int, kind: int) -> None:
    segment.base, segment.limit, segment.selector, segment.type = 0, limit, selector, kind
    segment.present, segment.dpl, segment.s, segment.g, segment.avl, segment.unusable = 1, 0, 0, 0, 0, 0
    segment.l, segment.db = 0, 0
