"""The PCI side of an NVMe controller: identity, the one BAR and what is where in it, and the capabilities."""

from __future__ import annotations

from hvkvm.abi import pci
from hvkvm.devices.pci import msi, msix
from hvkvm.devices.pci.function import Bar, Function, Identity
from hvkvm.devices.pci.nvme.admin import MAX_IO_QUEUES

VECTORS = MAX_IO_QUEUES + 1
BAR = Bar(0, 0x4000)
MSIX_TABLE = 0x2000


def nvme_function() -> Function:
    """A controller that interrupts by INTA, by MSI, or by MSI-X with a vector for each queue."""
    return Function(
        Identity(
            pci.PCI_VENDOR_ID_MICROSOFT,
            pci.NVME_DEVICE_ID,
            pci.PCI_CLASS_STORAGE_EXPRESS,
            subsystem_vendor=pci.PCI_VENDOR_ID_MICROSOFT,
            subsystem=pci.NVME_DEVICE_ID,
            pin=1,
        ),
        bars=[BAR],
        capabilities=[
            msix.capability(VECTORS, 0, MSIX_TABLE, MSIX_TABLE + msix.PBA_OFFSET),
            msi.capability(),
        ],
    )
