"""The board's own functions: the host bridge, the ISA bridge and the power management function.

Shaped like the i440FX with its PIIX, since every firmware for virtual machines knows that one. Most of
it is identity only: firmware looks which chipset it runs on. The registers that matter are the port
base of the ACPI blocks (`PowerManagement`), which firmware programs, and the four PIRQ bytes, which keep
what is written: interrupts do not go that way here, the DSDT routes them to pins of the IOAPIC.

vCPU threads.
"""

from __future__ import annotations

from collections.abc import Callable

from hvkvm.abi import pci
from hvkvm.devices.pci.function import Function, Identity

_PAM = (0x59, bytes(7), b"\xff" * 7)
"""Which parts of 0xC0000-0xFFFFF are RAM: all, always. Firmware writes and reads it back."""
_PIRQ = (pci.PIRQ_ROUTE_CONTROL, b"\x80" * 4, b"\x8f" * 4)
_DEVACTB = (pci.DEVACTB, pci.DEVACTB_APMC_EN.to_bytes(4, "little"), bytes(4))
"""SMIs are set up already: there are none, and SeaBIOS would send itself one and wait for it."""
_PM_REVISION = 3
"""Older ones have a timer whose reads may be wrong, and guests read it three times for that."""


def host_bridge(device: int = pci.PCI_DEVICE_ID_INTEL_82441) -> Function:
    """00:00.0. Firmware takes its `device` for the whole board's name; SeaBIOS takes the subsystem's."""
    return Function(
        Identity(
            pci.PCI_VENDOR_ID_INTEL,
            device,
            pci.PCI_CLASS_BRIDGE_HOST,
            revision=2,
            subsystem_vendor=pci.PCI_VENDOR_ID_REDHAT_QUMRANET,
            subsystem=pci.PCI_SUBDEVICE_ID_QEMU,
        ),
        extra=[_PAM],
    )


def isa_bridge() -> Function:
    """00:01.0. Says that there are more functions in its slot."""
    multifunction = (pci.PCI_HEADER_TYPE, bytes([pci.PCI_HEADER_TYPE_MFD]), b"\0")
    return Function(
        Identity(pci.PCI_VENDOR_ID_INTEL, pci.PCI_DEVICE_ID_INTEL_82371SB_0, pci.PCI_CLASS_BRIDGE_ISA),
        extra=[multifunction, _PIRQ],
    )


class PowerManagement(Function):
    """00:01.3. `on_base(port)` hears where the ACPI blocks are decoded; None: nowhere."""

    def __init__(self, on_base: Callable[[int | None], object], *, power_on_base: int | None = None) -> None:
        """`power_on_base`: where the blocks are on a machine without firmware to program it."""
        base = 1 if power_on_base is None else power_on_base | 1
        enabled = pci.PMREGMISC_PMIOSE if power_on_base is not None else 0
        super().__init__(
            Identity(
                pci.PCI_VENDOR_ID_INTEL,
                pci.PCI_DEVICE_ID_INTEL_82371AB_3,
                pci.PCI_CLASS_BRIDGE_OTHER,
                revision=_PM_REVISION,
                pin=1,  # Linux says by itself that it is IRQ 9
            ),
            extra=[
                (pci.PMBA, base.to_bytes(4, "little"), pci.PMBA_MASK.to_bytes(4, "little")),
                (pci.PMREGMISC, bytes([enabled]), bytes([pci.PMREGMISC_PMIOSE])),
                _DEVACTB,
            ],
        )
        self._on_base = on_base
        self.on_write = self._written

    @property
    def base(self) -> int | None:
        """The first port of the blocks, while they are decoded."""
        base = int.from_bytes(self.config[pci.PMBA : pci.PMBA + 2], "little") & pci.PMBA_MASK
        return base if base and self.config[pci.PMREGMISC] & pci.PMREGMISC_PMIOSE else None

    def _written(self, offset: int, size: int) -> None:
        if offset < pci.PMBA + 4 or offset <= pci.PMREGMISC < offset + size:
            self._on_base(self.base)
