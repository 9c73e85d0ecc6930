"""ELF kernels with a Xen PHYS32_ENTRY note: the PVH entry, 32-bit and without a BIOS.

Called by `boot.image`; the thread that loads. Source: Xen's
public/arch-x86/hvm/start_info.h and docs/misc/pvh.pandoc: flat protected mode,
EBX = struct hvm_start_info.
"""

from __future__ import annotations

import struct

from hvkvm.abi import board
from hvkvm.boot import e820, elf
from hvkvm.boot.bootparams import COMMAND_LINE_SIZE
from hvkvm.boot.entry import Entry, Mode, write_tables
from hvkvm.boot.kernel_file import Payload
from hvkvm.boot.layout import GuestRam, Layout
from hvkvm.boot.linux import check_cmdline

XEN_HVM_START_MAGIC_VALUE = 0x336EC578
_VERSION = 1  # the first with a memory map
_START_INFO_SIZE = 56
_MODLIST_AT = board.PVH_START_INFO_ADDRESS + 0x40
_MEMMAP_AT = board.PVH_START_INFO_ADDRESS + 0x80
_HIGHEST_MODULE = 0x7FFFFFFF  # the protocol names none; Linux's own limit for an initrd


def load(
    memory: GuestRam, image: elf.ElfImage, entry: int, *, initrd: Payload | None, cmdline: bytes, rsdp: int
) -> Entry:
    """Load `image` and enter it at `entry`, its PVH note's address. Raises BootError."""
    if not image.entry_is_loaded(entry):
        raise image.file.error(
            f"its PVH note names {entry:#x}, which is not in what it loads", "build it again"
        )
    # Nobody can ask a PVH kernel for its limit; nearly all are Linux, which would cut a longer line silently.
    check_cmdline(cmdline, COMMAND_LINE_SIZE - 1)
    layout = Layout(memory.size, image.file.path)
    image.claim(layout)
    modules = b""
    if initrd is not None:
        taken = layout.claim_high(initrd.size, _HIGHEST_MODULE, "the initrd", initrd.name)
        initrd.copy_to(memory, taken.gpa)
        modules = struct.pack("<QQQQ", taken.gpa, taken.size, 0, 0)
    entries = e820.memory_map(memory.size)
    start_info = struct.pack(
        "<IIIIQQQQII",
        XEN_HVM_START_MAGIC_VALUE,
        _VERSION,
        0,
        1 if modules else 0,
        _MODLIST_AT if modules else 0,
        board.COMMAND_LINE_ADDRESS,
        rsdp,
        _MEMMAP_AT,
        len(entries),
        0,
    )
    memory.write(board.PVH_START_INFO_ADDRESS, start_info)
    memory.write(_MODLIST_AT, modules)
    memory.write(_MEMMAP_AT, e820.pvh_table(entries))
    memory.write(board.COMMAND_LINE_ADDRESS, cmdline + b"\0")
    write_tables(memory, Mode.PROTECTED)
    image.load(memory)
    return Entry(Mode.PROTECTED, entry, {"rbx": board.PVH_START_INFO_ADDRESS}, "ELF kernel (PVH entry)")
