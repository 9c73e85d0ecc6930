"""A static x86-64 ELF executable around some hundred bytes of machine code.

Why: a guest's init needs a few system calls that no busybox makes, and nobody
who runs a guest shall need a compiler. Pure, any thread.
"""

from __future__ import annotations

from hvkvm.abi.elf import (
    EI_NIDENT,
    ELF64_EHDR,
    ELF64_IDENT,
    ELF64_PHDR,
    EM_X86_64,
    ET_EXEC,
    EV_CURRENT,
    PF_R,
    PF_X,
    PT_LOAD,
    Ehdr,
    Phdr,
)

_LOAD_ADDRESS = 0x400000
_PAGE = 0x1000


def executable(text: bytes) -> bytes:
    """The program that starts at the first byte of `text`: one segment, the headers in it."""
    headers = ELF64_EHDR.size + ELF64_PHDR.size
    size = headers + len(text)
    header = Ehdr(
        e_ident=(ELF64_IDENT + bytes((EV_CURRENT,))).ljust(EI_NIDENT, b"\0"),
        e_type=ET_EXEC,
        e_machine=EM_X86_64,
        e_version=EV_CURRENT,
        e_entry=_LOAD_ADDRESS + headers,
        e_phoff=ELF64_EHDR.size,
        e_shoff=0,
        e_flags=0,
        e_ehsize=ELF64_EHDR.size,
        e_phentsize=ELF64_PHDR.size,
        e_phnum=1,
        e_shentsize=0,
        e_shnum=0,
        e_shstrndx=0,
    )
    segment = Phdr(PT_LOAD, PF_R | PF_X, 0, _LOAD_ADDRESS, _LOAD_ADDRESS, size, size, _PAGE)
    return ELF64_EHDR.pack(*header) + ELF64_PHDR.pack(*segment) + text
