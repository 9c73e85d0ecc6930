"""ELF headers: the file's own, program headers and section headers (the System V ABI's object file format).

Little-endian, as x86 has them. Layouts only; who reads checks every offset against the file.
"""

from __future__ import annotations

from struct import Struct

from hvkvm.tuples import NamedTuple

ELFMAG = b"\x7fELF"
ELFCLASS32 = 1
ELFCLASS64 = 2
ELFDATA2LSB = 1
EV_CURRENT = 1
ET_EXEC = 2
ET_DYN = 3
EM_386 = 3
EM_X86_64 = 62
PT_LOAD = 1
PT_INTERP = 3
PT_NOTE = 4
PF_X = 1
PF_R = 4

ELF64_IDENT = ELFMAG + bytes((ELFCLASS64, ELFDATA2LSB))
"""How a 64-bit little-endian file begins."""
EI_NIDENT = 16

ELF32_EHDR = Struct("<16sHHIIIIIHHHHHH")
ELF64_EHDR = Struct("<16sHHIQQQIHHHHHH")
ELF32_PHDR = Struct("<IIIIIIII")
ELF64_PHDR = Struct("<IIQQQQQQ")
ELF64_SHDR = Struct("<IIQQQQIIQQ")
ELF_NHDR = Struct("<III")
"""n_namesz, n_descsz, n_type."""


class Ehdr(NamedTuple):
    """The header of the file; both classes have the same fields."""

    e_ident: bytes
    e_type: int
    e_machine: int
    e_version: int
    e_entry: int
    e_phoff: int
    e_shoff: int
    e_flags: int
    e_ehsize: int
    e_phentsize: int
    e_phnum: int
    e_shentsize: int
    e_shnum: int
    e_shstrndx: int


class Phdr(NamedTuple):
    """A program header, its fields in ELF64's order."""

    p_type: int
    p_flags: int
    p_offset: int
    p_vaddr: int
    p_paddr: int
    p_filesz: int
    p_memsz: int
    p_align: int


class Shdr(NamedTuple):
    """An ELF64 section header."""

    sh_name: int
    sh_type: int
    sh_flags: int
    sh_addr: int
    sh_offset: int
    sh_size: int
    sh_link: int
    sh_info: int
    sh_addralign: int
    sh_entsize: int


def phdr32(raw: bytes, at: int) -> Phdr:
    """The ELF32 program header at `at`, where p_flags stands behind p_memsz."""
    kind, offset, vaddr, paddr, file_size, mem_size, flags, align = ELF32_PHDR.unpack_from(raw, at)
    return Phdr(kind, flags, offset, vaddr, paddr, file_size, mem_size, align)
