"""A program of some hundred bytes that hands an exit status from inside a guest to the machine.

Why: distribution kernels made for guests have no /dev/port, and a busybox
cannot write an I/O port without it. Called by `boot.initramfs`, which puts it
into the guest as /bin/guest-exit. Pure function, any thread.

Used as `guest-exit STATUS`: waits until standard output's terminal has sent
everything (tcdrain), asks for the port (ioperm), writes the status there. The
machine then ends the guest. Needs CONFIG_X86_IOPL_IOPERM; without it the write
is a fault, the program dies, and the caller goes on to power off.
"""

from __future__ import annotations

import struct

from hvkvm.abi.board import GUEST_EXIT_PORT
from hvkvm.boot import tiny_elf

SOURCE = """
    mov rdi, [rsp + 16]         # argv[1]
    xor ebx, ebx
digit:
    movzx eax, byte ptr [rdi]
    sub eax, 48
    cmp eax, 9
    ja drain
    imul ebx, ebx, 10
    add ebx, eax
    inc rdi
    jmp digit
drain:
    mov edi, 1                  # ioctl(1, TCSBRK, 1) is tcdrain(1)
    mov esi, 0x5409
    mov edx, edi
    mov eax, 16
    syscall
    mov edi, {port}             # ioperm(port, 1, 1)
    mov esi, 1
    mov edx, esi
    mov eax, 173
    syscall
    mov edx, {port}
    mov eax, ebx
    out dx, al
    xor edi, edi                # exit(0)
    mov eax, 60
    syscall
"""
"""What `_CODE` says, in GNU assembler's intel syntax; a test holds the two together."""

_CODE = (
    "488b7c2410 31db"
    "0fb607 83e830 83f809 770a 6bdb0a 01c3 48ffc7 ebeb"
    "bf01000000 be09540000 89fa b810000000 0f05"
    "bf{port} be01000000 89f2 b8ad000000 0f05"
    "ba{port} 89d8 ee 31ff b83c000000 0f05"
)


def code(port: int = GUEST_EXIT_PORT) -> bytes:
    """The machine code alone; `port` is the I/O port it writes."""
    return bytes.fromhex(_CODE.format(port=struct.pack("<I", port).hex()))


def program(port: int = GUEST_EXIT_PORT) -> bytes:
    """The static x86-64 ELF executable."""
    return tiny_elf.executable(code(port))
