"""The PCI side of a virtio device: identity, the one BAR and what is where in it, and the capabilities.

The window capability (VIRTIO_PCI_CAP_PCI_CFG) lets firmware without MMIO reach the BAR by configuration
space. vCPU threads.
"""

from __future__ import annotations

from collections.abc import Callable

from hvkvm.abi import pci, virtio
from hvkvm.devices.mmio_bus import MmioDevice
from hvkvm.devices.pci import msix
from hvkvm.devices.pci.function import Bar, Capability, Function, Identity
from hvkvm.devices.pci.virtio.registers import SIZE

BAR = Bar(0, 0x8000)
COMMON, ISR, DEVICE, NOTIFY, MSIX_TABLE = 0x0000, 0x1000, 0x2000, 0x3000, 0x4000
AREA = 0x1000
NOTIFY_MULTIPLIER = 4


def _capability(kind: int, offset: int, length: int, more: bytes = b"", writable: bytes = b"") -> Capability:
    size = virtio.VIRTIO_PCI_CAP_SIZE + len(more)
    return Capability(
        pci.PCI_CAP_ID_VNDR, virtio.virtio_pci_cap.pack(size, kind, 0, offset, length) + more, writable
    )


class VirtioFunction(Function):
    """Of a device with virtio id `kind`, PCI class `class_code`, and `queues` queues with a vector each."""

    def __init__(self, kind: int, class_code: int, queues: int, config_size: int) -> None:
        vectors = queues + 1
        multiplier = NOTIFY_MULTIPLIER.to_bytes(4, "little")
        window = bytes(2) + b"\xff" + bytes(3) + b"\xff" * 12
        super().__init__(
            Identity(
                pci.PCI_VENDOR_ID_REDHAT_QUMRANET,
                virtio.VIRTIO_PCI_DEVICE_ID_BASE + kind,
                class_code,
                revision=virtio.VIRTIO_PCI_REVISION,
                subsystem_vendor=pci.PCI_VENDOR_ID_REDHAT_QUMRANET,
                subsystem=virtio.VIRTIO_PCI_SUBSYSTEM_ID,
                pin=1,
            ),
            bars=[BAR],
            capabilities=[
                msix.capability(vectors, 0, MSIX_TABLE, MSIX_TABLE + msix.PBA_OFFSET),
                _capability(virtio.VIRTIO_PCI_CAP_PCI_CFG, 0, 0, bytes(4), window),
                _capability(virtio.VIRTIO_PCI_CAP_COMMON_CFG, COMMON, SIZE),
                _capability(virtio.VIRTIO_PCI_CAP_ISR_CFG, ISR, 1),
                _capability(virtio.VIRTIO_PCI_CAP_DEVICE_CFG, DEVICE, config_size),
                _capability(virtio.VIRTIO_PCI_CAP_NOTIFY_CFG, NOTIFY, NOTIFY_MULTIPLIER * queues, multiplier),
            ],
        )
        self.vectors = vectors
        self.region: MmioDevice | None = None
        """Who answers in the BAR; its owner sets it."""
        self.on_msix: Callable[[], object] = lambda: None
        """The MSI-X capability was written."""
        self._window = self.capability_offsets[pci.PCI_CAP_ID_VNDR]
        self.on_write = self._written

    def read(self, offset: int, size: int) -> int:
        """As any function's; the window's data come from the BAR."""
        at = self._window + virtio.VIRTIO_PCI_CAP_DATA
        if offset < at + 4 and offset + size > at and (place := self._place()) and self.region:
            value = self.region.read(*place) & (1 << 8 * place[1]) - 1
            self.config[at : at + 4] = value.to_bytes(4, "little")
        return super().read(offset, size)

    def _written(self, offset: int, size: int) -> None:
        at = self._window + virtio.VIRTIO_PCI_CAP_DATA
        if offset < at + 4 and offset + size > at:
            if (place := self._place()) and self.region:
                self.region.write(*place, int.from_bytes(self.config[at : at + place[1]], "little"))
        else:
            self.on_msix()

    def _place(self) -> tuple[int, int] | None:
        """What the window shows: offset and size of an access to the BAR; None for what is none."""
        at = self._window
        words = self.config[at + virtio.VIRTIO_PCI_CAP_OFFSET : at + virtio.VIRTIO_PCI_CAP_DATA]
        offset, size = int.from_bytes(words[:4], "little"), int.from_bytes(words[4:], "little")
        good = self.config[at + virtio.VIRTIO_PCI_CAP_BAR] == BAR.register and size in (1, 2, 4)
        return (offset, size) if good and not offset % size and offset + size <= BAR.size else None
