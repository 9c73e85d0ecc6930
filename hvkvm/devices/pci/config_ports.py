"""0xcf8 to 0xcff: PCI configuration mechanism 1, with the reset control register amid it.

A 32-bit write to 0xcf8 names a register, and 0xcfc to 0xcff are its four bytes. Of functions that are
not there all reads give all ones. The guest's address is one register for the whole machine: two vCPUs
that use it at once must take turns, which every guest does. vCPU threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvkvm.abi import pci
from hvkvm.devices.port.reset import PciConfigPorts

if TYPE_CHECKING:
    from collections.abc import Callable

    from hvkvm.devices.pci.bus import PciBus

_DATA = pci.PCI_CONFIG_DATA - pci.PCI_CONFIG_ADDRESS


class Mechanism1(PciConfigPorts):
    """The eight ports of a machine that has a PCI bus. `bus` is set before the vCPUs run."""

    def __init__(self, on_reset: Callable[[], None]) -> None:
        super().__init__(on_reset)
        self.bus: PciBus | None = None

    def read(self, offset: int, size: int) -> int:
        """The address, the reset control register, or bytes of configuration space."""
        if offset < _DATA:
            return super().read(offset, size)
        at = self._selected(offset)
        return -1 if self.bus is None or at is None else self.bus.read(*at, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Name a register, ask for a reset, or write configuration space."""
        if offset < _DATA:
            super().write(offset, size, value)
        else:
            at = self._selected(offset)
            if self.bus is not None and at is not None:
                self.bus.write(*at, size, value)

    def _selected(self, offset: int) -> tuple[int, int, int] | None:
        """The slot, function and register that a data port leads to now; None for another bus than ours."""
        address = self.address
        if not address & pci.PCI_CONFIG_ENABLE or address >> 16 & 0xFF:
            return None
        return address >> 11 & 0x1F, address >> 8 & 7, (address & 0xFC) + offset - _DATA
