"""A driver whose every access to a PCI device a guest's vCPU makes: configuration space, and BAR 0."""

from __future__ import annotations

from typing import Any

from guest_agent import ABI
from guest_machine import Guest

from hvkvm.abi import pci

BAR = 0xC0000000
"""Where BAR 0 is placed."""


class PciDriver:
    """The driver of the device in `slot`, on the guest's first vCPU; its BAR is `bar`."""

    def __init__(self, guest: Guest, slot: int = 2) -> None:
        self.guest = guest
        self.slot = slot
        self.bar = BAR + (slot - 2) * (1 << 20)

    @property
    def cpu(self) -> Any:
        return self.guest[0]

    def config(self, offset: int, value: int | None = None, size: int = 4) -> int:
        """Configuration space of the slot."""
        self.cpu.do("OUT", 0xCF8, 4, 1 << 31 | self.slot << 11 | offset & 0xFC)
        port = 0xCFC + (offset & 3)
        if value is None:
            return int(self.cpu.do("IN", port, size).value)
        self.cpu.do("OUT", port, size, value)
        return value

    def reg(self, offset: int, value: int | None = None, size: int = 4) -> int:
        """A register in BAR 0."""
        if value is None:
            return int(self.cpu.do("READ", self.bar + offset, size).value)
        self.cpu.do("WRITE", self.bar + offset, size, value)
        return value

    def use_msix(self, table: int, vectors: int) -> None:
        """Have so many vectors, whose table is there in the BAR, send the agent's own doorbell."""
        for vector in range(vectors):
            for offset, value in ((0, 0xFEE00000), (4, 0), (8, ABI["DOORBELL_VECTOR"]), (12, 0)):
                self.reg(table + pci.PCI_MSIX_ENTRY_SIZE * vector + offset, value)
        assert self.guest.machine.pci is not None
        function = self.guest.machine.pci.bus.devices[self.slot].function
        at = function.capability_offsets[pci.PCI_CAP_ID_MSIX] + pci.PCI_MSIX_FLAGS
        self.config(at, pci.PCI_MSIX_FLAGS_ENABLE, 2)
