"""The tables of what only a machine with PCI has: WAET, SPCR, and HPET where it is asked for. Pure."""

from __future__ import annotations

import struct

from hvkvm.abi import board, hpet
from hvkvm.boot.acpi_table import memory_address, port_address, table

WAET_PM_TIMER_GOOD = 1 << 1
"""Windows emulated devices table. Without it Windows 8 and later distrust a timer like a PIIX4's."""

_SPCR_8259, _SPCR_IO_APIC = 1 << 0, 1 << 1
_SPCR_115200 = 7
_SPCR_VT_UTF8 = 2
"""Serial port console redirection table, revision 2 (Microsoft)."""


def waet() -> bytes:
    """What Windows need not work around: its PM timer may be read once. The RTC is not spoken of."""
    return table(b"WAET", 1, struct.pack("<I", WAET_PM_TIMER_GOOD))


def spcr() -> bytes:
    """The serial port for consoles: where Windows' Emergency Management Services look for COM1."""
    body = struct.pack("<B3x", 0)  # a whole 16550
    body += port_address(board.COM1_PORT, 8, 1)
    body += struct.pack("<BBI", _SPCR_8259 | _SPCR_IO_APIC, board.COM1_IRQ, board.COM1_IRQ)
    body += struct.pack("<BBBBB", _SPCR_115200, 0, 1, 0, _SPCR_VT_UTF8)  # no parity, 1 stop bit
    body += struct.pack("<xHHBBBIB4x", 0xFFFF, 0xFFFF, 0, 0, 0, 0, 0)  # no PCI device
    return table(b"SPCR", 2, body)


def hpet_table() -> bytes:
    """Where the HPET is. Its block id is the lower half of its identification register."""
    number, no_page_protection = 0, 0
    body = struct.pack("<I", hpet.CAPABILITIES) + memory_address(board.HPET_ADDRESS, 64)
    body += struct.pack("<BHB", number, hpet.MIN_TICK, no_page_protection)
    return table(b"HPET", 1, body)
