"""Multiboot-1 ELF32 images, as kvm-unit-tests are.

Called by `boot.image`; the thread that loads. Source: the Multiboot
Specification 0.6.96: flat protected mode, EAX = the loader's magic, EBX =
struct multiboot_info. The info stays out of page 0, which kvm-unit-tests
overwrite with their AP trampoline before they read it.
"""

from __future__ import annotations

import struct

from hvkvm.abi import board
from hvkvm.boot import e820, elf
from hvkvm.boot.entry import Entry, Mode, write_tables
from hvkvm.boot.kernel_file import KernelFile, Payload
from hvkvm.boot.layout import GuestRam, Layout
from hvkvm.boot.linux import check_cmdline

SEARCH_SIZE = 8192  # the header is whole inside the first 8 KiB, 4-aligned
HEADER_MAGIC = 0x1BADB002
BOOTLOADER_MAGIC = 0x2BADB002

_PAGE_ALIGN = 1 << 0
_MEMORY_INFO = 1 << 1
_AOUT_KLUDGE = 1 << 16
_MUST_UNDERSTAND = 0xFFFF

_INFO_MEMORY = 1 << 0
_INFO_CMDLINE = 1 << 2
_INFO_MODS = 1 << 3
_INFO_MEM_MAP = 1 << 6
_INFO_BOOT_LOADER_NAME = 1 << 9

_INFO_SIZE = 0x80
_MODULE_AT = board.MULTIBOOT_INFO_ADDRESS + _INFO_SIZE
_LOADER_NAME_AT = _MODULE_AT + 0x20
_MODULE_NAME_AT = _LOADER_NAME_AT + 0x20
_MMAP_AT = board.MULTIBOOT_INFO_ADDRESS + 0x200
_NAME_LIMIT = _MMAP_AT - _MODULE_NAME_AT - 1
_HIGHEST_MODULE = 0xFFFFFFFF
_BASE_MEMORY_AT = 0x413
"""The BIOS data area's word of KiB below 640 KiB."""


def find_header(head: bytes) -> int | None:
    """The flags of the multiboot header in a file's first 8 KiB, None without one."""
    for at in range(0, min(len(head), SEARCH_SIZE) - 11, 4):
        magic, flags, checksum = struct.unpack_from("<III", head, at)
        if magic == HEADER_MAGIC and not (magic + flags + checksum) & 0xFFFFFFFF:
            return int(flags)
    return None


def check_flags(file: KernelFile, flags: int) -> None:
    """Raise BootError when the image demands what this loader does not do."""
    unknown = flags & _MUST_UNDERSTAND & ~(_PAGE_ALIGN | _MEMORY_INFO)
    if unknown:
        raise file.error(
            f"its multiboot header demands features {unknown:#x} (a video mode, say)",
            "build it without them",
        )


def load(
    memory: GuestRam, image: elf.ElfImage, flags: int, *, initrd: Payload | None, cmdline: bytes
) -> Entry:
    """Load `image` by its program headers; `initrd` becomes its one module. Raises BootError.

    The command line is the image's file name, a space and `cmdline`, so that
    argv[0] is a program name as kvm-unit-tests expect.
    """
    check_flags(image.file, flags)
    if not image.entry_is_loaded(image.entry):
        raise image.file.error(f"its entry point {image.entry:#x} is not in what it loads", "build it again")
    program = image.file.path.name.replace(" ", "_").encode("utf-8", "surrogateescape")
    line = program + (b" " + cmdline if cmdline else b"")
    check_cmdline(line, board.COMMAND_LINE_LIMIT - 1)
    layout = Layout(memory.size, image.file.path)
    image.claim(layout)
    module = b""
    if initrd is not None:
        taken = layout.claim_high(initrd.size, _HIGHEST_MODULE, "the module", initrd.name)
        initrd.copy_to(memory, taken.gpa)
        module = struct.pack("<IIII", taken.gpa, taken.end, _MODULE_NAME_AT, 0)
        name = initrd.label.encode("utf-8", "surrogateescape")[:_NAME_LIMIT]
        memory.write(_MODULE_NAME_AT, name + b"\0")
    mmap = e820.multiboot_table(e820.memory_map(memory.size))
    info = struct.pack(
        "<IIIIIIIIIIIIIIIII",
        _INFO_MEMORY | _INFO_CMDLINE | _INFO_MODS | _INFO_MEM_MAP | _INFO_BOOT_LOADER_NAME,
        board.LOW_RAM_END >> 10,
        (layout.low_end - board.KERNEL_ADDRESS) >> 10,
        0,
        board.COMMAND_LINE_ADDRESS,
        1 if module else 0,
        _MODULE_AT,
        *(0, 0, 0, 0),  # symbols
        len(mmap),
        _MMAP_AT,
        *(0, 0, 0),  # drives, ROM configuration table
        _LOADER_NAME_AT,
    )
    # Xen takes the smaller of this and mem_lower, and would put its trampoline below 0.
    memory.write(_BASE_MEMORY_AT, (board.LOW_RAM_END >> 10).to_bytes(2, "little"))
    memory.write(board.MULTIBOOT_INFO_ADDRESS, info)
    memory.write(_MODULE_AT, module)
    memory.write(_LOADER_NAME_AT, b"hvkvm\0")
    memory.write(_MMAP_AT, mmap)
    memory.write(board.COMMAND_LINE_ADDRESS, line + b"\0")
    write_tables(memory, Mode.PROTECTED)
    image.load(memory)
    registers = {"rax": BOOTLOADER_MAGIC, "rbx": board.MULTIBOOT_INFO_ADDRESS}
    return Entry(Mode.PROTECTED, image.entry, registers, "multiboot image")
