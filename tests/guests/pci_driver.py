"""A driver whose every access to a PCI device a guest's vCPU makes: configuration space, and BAR 0."""

from __future__ import annotations

from typing import Any

from guest_machine import Guest

BAR = 0xC0000000
"""Where BAR 0 is placed."""


class PciDriver:
    """The driver of the device in slot 2, on the guest's first vCPU."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest

    @property
    def cpu(self) -> Any:
        return self.guest[0]

    def config(self, offset: int, value: int | None = None, size: int = 4) -> int:
        """Configuration space of slot 2."""
        self.cpu.do("OUT", 0xCF8, 4, 1 << 31 | 2 << 11 | offset & 0xFC)
        port = 0xCFC + (offset & 3)
        if value is None:
            return int(self.cpu.do("IN", port, size).value)
        self.cpu.do("OUT", port, size, value)
        return value

    def reg(self, offset: int, value: int | None = None, size: int = 4) -> int:
        """A register in BAR 0."""
        if value is None:
            return int(self.cpu.do("READ", BAR + offset, size).value)
        self.cpu.do("WRITE", BAR + offset, size, value)
        return value
