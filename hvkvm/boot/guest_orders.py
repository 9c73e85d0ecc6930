"""A program of some hundred bytes that takes what a warm guest shall run out of the host's memory.

Why: a copy of a guest must get its command, its files, the time and randomness of
its own from its host on any kernel, with no driver. Called by `boot.initramfs`,
which puts it into the guest as /bin/guest-orders. Pure function, any thread.

Used as `guest-orders >ARCHIVE`: maps the memory that `abi.guest_orders` describes
through /dev/mem; sets the clock, feeds the kernel's random numbers and has them
start anew from it (RNDADDENTROPY, RNDRESEEDCRNG: no error where a kernel refuses
them), and writes the archive to its standard output. Exit status 1 where there is
no such memory or no /dev/mem; 0 and no output while there is nothing to run.
"""

from __future__ import annotations

import struct

from hvkvm.abi import guest_orders as abi
from hvkvm.abi.board import ORDERS_ADDRESS
from hvkvm.boot import tiny_elf

SOURCE = """
    lea rdi, [rip + mem]        # open("/dev/mem", O_RDONLY)
    xor esi, esi
    mov eax, 2
    syscall
    mov r12d, eax
    mov esi, 4096               # mmap(0, 4096, PROT_READ, MAP_SHARED, mem, {address})
    mov r9d, {address}
    call map
    mov rbx, rax
    mov rcx, {magic}
    cmp [rbx], rcx
    jne fail
    mov r13, [rbx + 8]
    test r13, r13
    jz done
    xor edi, edi                # clock_settime(CLOCK_REALTIME, page + 16)
    lea rsi, [rbx + 16]
    mov eax, 227
    syscall
    lea rdi, [rip + random]     # open("/dev/urandom", O_RDWR)
    mov esi, 2
    mov eax, 2
    syscall
    mov r14d, eax
    mov edi, r14d               # ioctl(random, RNDADDENTROPY, page + 32)
    mov esi, 0x40085203
    lea rdx, [rbx + 32]
    mov eax, 16
    syscall
    mov edi, r14d               # ioctl(random, RNDRESEEDCRNG)
    mov esi, 0x5207
    mov eax, 16
    syscall
    mov rsi, r13                # mmap(0, size, PROT_READ, MAP_SHARED, mem, {address} + 4096)
    mov r9d, {archive}
    call map
    mov rbx, rax
write:
    mov edi, 1                  # write(1, archive, size)
    mov rsi, rbx
    mov rdx, r13
    mov eax, edi
    syscall
    test rax, rax
    jle fail
    add rbx, rax
    sub r13, rax
    jnz write
done:
    xor edi, edi                # exit(0)
    jmp leave
map:                            # rax = the map, of which esi and r9d are size and place
    xor edi, edi
    mov edx, 1
    mov r10d, edx
    mov r8d, r12d
    mov eax, 9
    syscall
    cmp rax, -4096
    ja fail
    ret
fail:
    mov edi, 1                  # exit(1)
leave:
    mov eax, 60
    syscall
mem:
    .asciz "/dev/mem"
random:
    .asciz "/dev/urandom"
"""
"""What `_CODE` says, in GNU assembler's intel syntax; a test holds the two together."""

_CODE = (
    "488d3dda00000031f6b8020000000f054189c4be0010000041b9{page}e8950000004889c348b9{magic}48390b0f859"
    "c0000004c8b6b084d85ed747231ff488d7310b8e30000000f05488d3d94000000be02000000b8020000000f054189c64"
    "489f7be03520840488d5320b8100000000f054489f7be07520000b8100000000f054c89ee41b9{archive}e823000000"
    "4889c3bf010000004889de4c89ea89f80f054885c07e294801c34929c575e431ffeb2231ffba010000004189d24589e0"
    "b8090000000f05483d00f0ffff7701c3bf01000000b83c0000000f052f6465762f6d656d002f6465762f7572616e646f"
    "6d00"
)


def source() -> str:
    """SOURCE with its numbers."""
    archive = ORDERS_ADDRESS + abi.ARCHIVE_OFFSET
    return SOURCE.format(address=hex(ORDERS_ADDRESS), archive=hex(archive), magic=hex(abi.MAGIC))


def code() -> bytes:
    """The machine code alone."""
    places = (struct.pack("<I", ORDERS_ADDRESS), struct.pack("<I", ORDERS_ADDRESS + abi.ARCHIVE_OFFSET))
    page, archive = (place.hex() for place in places)
    return bytes.fromhex(_CODE.format(page=page, archive=archive, magic=struct.pack("<Q", abi.MAGIC).hex()))


def program() -> bytes:
    """The static x86-64 ELF executable."""
    return tiny_elf.executable(code())
