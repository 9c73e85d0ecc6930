"""The memory map that every loader tells the guest: one list, three encodings.

Called by the loaders (`linux`, `pvh`, `multiboot`). Pure; any thread. The
types are those of the BIOS call INT 15h AX=E820h, which boot_params, PVH and
multiboot-1 all share.
"""

from __future__ import annotations

import struct

from hvkvm.abi import board
from hvkvm.tuples import NamedTuple

E820_TYPE_RAM = 1
E820_TYPE_RESERVED = 2


class E820Entry(NamedTuple):
    """One range: `address` and `size` in bytes, `type` an E820_TYPE_*."""

    address: int
    size: int
    type: int

    @property
    def end(self) -> int:
        """The address after the last byte."""
        return self.address + self.size


def memory_map(memory_size: int) -> list[E820Entry]:
    """The map for `memory_size` bytes of RAM (at least 1 MiB): sorted, no overlap.

    RAM that holds the ACPI tables and what lies past LOW_RAM_END is reserved,
    and so is KVM's own TSS and identity map, which are no RAM at all. 0xA0000
    to ACPI_AREA_ADDRESS is RAM in this machine, but a guest expects a VGA hole
    and option ROMs there, so it is not offered.
    """
    low_end = min(memory_size, board.RAM_LOW_LIMIT)
    entries = [
        E820Entry(0, board.LOW_RAM_END, E820_TYPE_RAM),
        E820Entry(board.LOW_RAM_END, 0xA0000 - board.LOW_RAM_END, E820_TYPE_RESERVED),
        E820Entry(board.ACPI_AREA_ADDRESS, board.ACPI_AREA_SIZE, E820_TYPE_RESERVED),
    ]
    if low_end > board.KERNEL_ADDRESS:
        entries.append(E820Entry(board.KERNEL_ADDRESS, low_end - board.KERNEL_ADDRESS, E820_TYPE_RAM))
    kvm_pages = board.TSS_ADDRESS + 0x3000 - board.IDENTITY_MAP_ADDRESS
    entries.append(E820Entry(board.IDENTITY_MAP_ADDRESS, kvm_pages, E820_TYPE_RESERVED))
    if memory_size > board.RAM_LOW_LIMIT:
        entries.append(E820Entry(board.RAM_HIGH_BASE, memory_size - board.RAM_LOW_LIMIT, E820_TYPE_RAM))
    return entries


def boot_params_table(entries: list[E820Entry]) -> bytes:
    """struct boot_e820_entry[]: 20 bytes each."""
    return b"".join(struct.pack("<QQI", entry.address, entry.size, entry.type) for entry in entries)


def pvh_table(entries: list[E820Entry]) -> bytes:
    """struct hvm_memmap_table_entry[]: 24 bytes each."""
    return b"".join(struct.pack("<QQII", entry.address, entry.size, entry.type, 0) for entry in entries)


def multiboot_table(entries: list[E820Entry]) -> bytes:
    """Multiboot-1 mmap: each entry is led by its size, which does not count itself (20)."""
    return b"".join(struct.pack("<IQQI", 20, entry.address, entry.size, entry.type) for entry in entries)
