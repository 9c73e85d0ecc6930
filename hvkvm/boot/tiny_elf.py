"""A static x86-64 ELF executable around some hundred bytes of machine code.

Why: a guest's init needs a few system calls that no busybox makes, and nobody
who runs a guest shall need a compiler. Called by `boot.guest_exit` and
`boot.guest_vsock`. Pure, any thread.
"""

from __future__ import annotations

import struct

_LOAD_ADDRESS = 0x400000
_EHDR_SIZE = 64
_PHDR_SIZE = 56


def executable(text: bytes) -> bytes:
    """The program that starts at the first byte of `text`: one segment, the headers in it."""
    size = _EHDR_SIZE + _PHDR_SIZE + len(text)
    entry = _LOAD_ADDRESS + _EHDR_SIZE + _PHDR_SIZE
    # Elf64_Ehdr: ET_EXEC, EM_X86_64, entry, program headers behind it, no sections.
    magic = b"\x7fELF\x02\x01\x01"
    sizes = (_EHDR_SIZE, _PHDR_SIZE, 1, 0, 0, 0)
    header = struct.pack("<16sHHIQQQIHHHHHH", magic, 2, 62, 1, entry, _EHDR_SIZE, 0, 0, *sizes)
    # Elf64_Phdr: PT_LOAD, readable and executable.
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _LOAD_ADDRESS, _LOAD_ADDRESS, size, size, 0x1000)
    return header + segment + text
