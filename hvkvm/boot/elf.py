"""Reads the ELF headers of a kernel image and puts its segments into guest RAM.

Called by `vmlinux`-style, PVH and multiboot loaders. Bytes are hostile: every
offset is checked against the file and every address against the layout; only
BootError escapes. The thread that loads owns it. Source: the ELF-64 object file
format; Xen's public/elfnote.h for the PVH note.
"""

from __future__ import annotations

import struct

from hvkvm.abi.elf import (
    EI_NIDENT,
    ELF32_EHDR,
    ELF32_PHDR,
    ELF64_EHDR,
    ELF64_PHDR,
    ELF_NHDR,
    ELFCLASS32,
    ELFCLASS64,
    ELFDATA2LSB,
    EM_386,
    EM_X86_64,
    ET_DYN,
    ET_EXEC,
    PT_INTERP,
    PT_LOAD,
    PT_NOTE,
    Ehdr,
    Phdr,
    phdr32,
)
from hvkvm.boot.kernel_file import KernelFile
from hvkvm.boot.layout import GuestRam, Layout
from hvkvm.tuples import NamedTuple

XEN_ELFNOTE_PHYS32_ENTRY = 18

_MAX_HEADERS = 128  # a kernel has about five
_MAX_NOTES = 1 << 20

_MACHINES = {
    2: "SPARC",
    8: "MIPS",
    20: "PowerPC",
    21: "64-bit PowerPC",
    22: "s390",
    40: "32-bit Arm",
    50: "Itanium",
    183: "64-bit Arm (aarch64)",
    243: "RISC-V",
    258: "LoongArch",
}
_TYPES = {1: "an object file", 4: "a core dump"}


class Segment(NamedTuple):
    """One program header; `offset` and `file_size` in the file, `paddr` and `mem_size` in guest RAM."""

    type: int
    offset: int
    paddr: int
    vaddr: int
    file_size: int
    mem_size: int
    align: int


class ElfImage(NamedTuple):
    """A parsed x86 executable: `bits` is 32 or 64, `entry` its e_entry as it stands."""

    file: KernelFile
    bits: int
    entry: int
    segments: tuple[Segment, ...]

    def load_segments(self) -> list[Segment]:
        """The PT_LOAD segments that take memory."""
        return [segment for segment in self.segments if segment.type == PT_LOAD and segment.mem_size]

    def pvh_entry(self) -> int | None:
        """The 32-bit physical entry point in the Xen PHYS32_ENTRY note, None without one."""
        for segment in self.segments:
            if segment.type == PT_NOTE:
                size = min(segment.file_size, _MAX_NOTES)
                notes = self.file.read(segment.offset, size, "the ELF note segment")
                entry = _find_pvh_note(notes, 8 if segment.align == 8 else 4)
                if entry is not None:
                    return entry
        return None

    def entry_is_loaded(self, entry: int) -> bool:
        """Whether the physical address `entry` lies in bytes that come from the file."""
        return any(
            segment.paddr <= entry < segment.paddr + segment.file_size for segment in self.load_segments()
        )

    def is_linked_as_a_kernel(self) -> bool:
        """Whether something runs in the upper half of the address space, where Linux does and no program."""
        return any(segment.vaddr >> 63 for segment in self.load_segments())

    def claim(self, layout: Layout) -> None:
        """Check that every segment fits; raises BootError, has written nothing yet."""
        for number, segment in enumerate(self.load_segments()):
            layout.claim(segment.paddr, segment.mem_size, f"ELF segment {number}")

    def load(self, memory: GuestRam) -> None:
        """Copy the claimed segments to their physical addresses and clear what the file leaves out."""
        for number, segment in enumerate(self.load_segments()):
            self.file.copy_to(
                memory, segment.paddr, segment.offset, segment.file_size, f"ELF segment {number}"
            )
            rest = segment.mem_size - segment.file_size
            if rest:
                memory.clear(segment.paddr + segment.file_size, rest)


def parse(file: KernelFile) -> ElfImage:
    """Parse the ELF headers of `file`; BootError when it is not an x86 executable that can be loaded."""
    ident = file.read(0, EI_NIDENT, "the ELF header")
    elf_class, data = ident[4], ident[5]
    if elf_class not in (ELFCLASS32, ELFCLASS64) or data not in (1, 2):
        raise file.error("starts like an ELF file but its header is broken", "build it again")
    order = "<" if data == ELFDATA2LSB else ">"
    kind, machine = struct.unpack(order + "HH", file.read(EI_NIDENT, 4, "the ELF header"))
    if machine not in (EM_386, EM_X86_64) or data != ELFDATA2LSB:
        name = _MACHINES.get(machine, f"machine number {machine}")
        raise file.error(f"is an ELF file for {name}, not for x86", "give an x86-64 kernel")
    if kind not in (ET_EXEC, ET_DYN):
        name = _TYPES.get(kind, f"of ELF type {kind}")
        raise file.error(f"is {name}, not an executable", "link it, or give the kernel it belongs to")
    layout = ELF64_EHDR if elf_class == ELFCLASS64 else ELF32_EHDR
    header = Ehdr(*layout.unpack(file.read(0, layout.size, "the ELF header")))
    segments = _program_headers(file, elf_class, header)
    if any(segment.type == PT_INTERP for segment in segments):
        raise file.error("is a program that runs under an operating system", "give a kernel")
    image = ElfImage(file, 64 if elf_class == ELFCLASS64 else 32, header.e_entry, segments)
    if not image.load_segments():
        raise file.error("is an ELF file with nothing to load", "give the linked kernel, not its symbols")
    return image


def _program_headers(file: KernelFile, elf_class: int, header: Ehdr) -> tuple[Segment, ...]:
    least = (ELF64_PHDR if elf_class == ELFCLASS64 else ELF32_PHDR).size
    size, count = header.e_phentsize, header.e_phnum
    if count > _MAX_HEADERS or (count and size < least):
        raise file.error(f"has {count} ELF program headers of {size} bytes: broken", "build it again")
    raw = file.read(header.e_phoff, size * count, "the ELF program header table")
    segments = []
    for at in range(0, size * count, size or 1):
        found = Phdr(*ELF64_PHDR.unpack_from(raw, at)) if elf_class == ELFCLASS64 else phdr32(raw, at)
        if found.p_type == PT_LOAD and found.p_filesz > found.p_memsz:
            raise file.error("has an ELF segment larger in the file than in memory: broken", "build it again")
        segments.append(
            Segment(
                found.p_type,
                found.p_offset,
                found.p_paddr,
                found.p_vaddr,
                found.p_filesz,
                found.p_memsz,
                found.p_align,
            )
        )
    return tuple(segments)


def _find_pvh_note(notes: bytes, align: int) -> int | None:
    at = 0
    while at + ELF_NHDR.size <= len(notes):
        name_size, desc_size, kind = ELF_NHDR.unpack_from(notes, at)
        name_at = at + ELF_NHDR.size
        desc_at = name_at + -(-name_size // align) * align
        name = notes[name_at : name_at + name_size]
        desc = notes[desc_at : desc_at + desc_size]
        if kind == XEN_ELFNOTE_PHYS32_ENTRY and name == b"Xen\0" and len(desc) == desc_size:
            if desc_size == 8:
                return int(struct.unpack("<Q", desc)[0])
            if desc_size == 4:
                return int(struct.unpack("<I", desc)[0])
        at = desc_at + -(-desc_size // align) * align
    return None
