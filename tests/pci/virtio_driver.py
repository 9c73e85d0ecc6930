"""A virtio block driver whose every access to a register a guest's vCPU makes."""

from __future__ import annotations

from typing import Any

from guest_agent import SCRATCH
from guest_machine import Guest
from pci_driver import PciDriver

from hvkvm.abi import pci, virtio
from hvkvm.devices.pci.virtio import function as places
from hvkvm.machine.inspect import inspect

DESCRIPTORS, AVAILABLE, USED, HEADER, DATA = (SCRATCH + 0x1000 * n for n in range(5))
SIZE = 8
ACKNOWLEDGE_AND_DRIVER = virtio.VIRTIO_CONFIG_S_ACKNOWLEDGE | virtio.VIRTIO_CONFIG_S_DRIVER
READY = ACKNOWLEDGE_AND_DRIVER | virtio.VIRTIO_CONFIG_S_FEATURES_OK


class Driver(PciDriver):
    """A virtio driver whose every access to a register a guest's vCPU makes."""

    def __init__(self, guest: Guest, slot: int = 2) -> None:
        super().__init__(guest, slot)
        self.next = 0

    @property
    def memory(self) -> Any:
        return self.guest.machine.memory

    def enable(self) -> None:
        assert self.config(pci.PCI_VENDOR_ID) == 0x1042 << 16 | pci.PCI_VENDOR_ID_REDHAT_QUMRANET
        self.config(pci.PCI_BASE_ADDRESS_0, self.bar)
        self.config(pci.PCI_COMMAND, pci.PCI_COMMAND_MEMORY | pci.PCI_COMMAND_MASTER, 2)
        self.reg(virtio.VIRTIO_PCI_COMMON_STATUS, 0, 1)
        self.reg(virtio.VIRTIO_PCI_COMMON_STATUS, ACKNOWLEDGE_AND_DRIVER, 1)
        self.reg(virtio.VIRTIO_PCI_COMMON_GFSELECT, 1)
        self.reg(virtio.VIRTIO_PCI_COMMON_GF, 1)
        self.reg(virtio.VIRTIO_PCI_COMMON_STATUS, READY, 1)
        assert self.reg(virtio.VIRTIO_PCI_COMMON_STATUS, size=1) == READY
        self.memory.zero(AVAILABLE, 0x2000)
        self.next = 0
        self.reg(virtio.VIRTIO_PCI_COMMON_Q_SELECT, 0, 2)
        self.reg(virtio.VIRTIO_PCI_COMMON_Q_SIZE, SIZE, 2)
        self.reg(virtio.VIRTIO_PCI_COMMON_Q_DESCLO, DESCRIPTORS, 8)
        self.reg(virtio.VIRTIO_PCI_COMMON_Q_AVAILLO, AVAILABLE, 8)
        self.reg(virtio.VIRTIO_PCI_COMMON_Q_USEDLO, USED, 8)
        self.reg(virtio.VIRTIO_PCI_COMMON_Q_MSIX, 0, 2)
        self.reg(virtio.VIRTIO_PCI_COMMON_Q_ENABLE, 1, 2)
        assert self.reg(virtio.VIRTIO_PCI_COMMON_Q_ENABLE, size=2) == 1
        self.reg(virtio.VIRTIO_PCI_COMMON_STATUS, READY | virtio.VIRTIO_CONFIG_S_DRIVER_OK, 1)

    def await_bell(self) -> None:
        """Wait until the queue rings by an ioeventfd."""
        self.guest.until(lambda: self.shown["bells"] == 1, "the queue rings by an ioeventfd")

    @property
    def shown(self) -> Any:
        return inspect(self.guest.machine.parts)["pci"]["virtio"][f"{self.slot:02x}"]

    def read(self, sector: int, sectors: int = 8) -> bytes:
        """One request: its notification is the only access."""
        memory = self.memory
        memory.write(HEADER, virtio.virtio_blk_outhdr.pack(virtio.VIRTIO_BLK_T_IN, sector))
        chain = ((HEADER, 16, 1, 1), (DATA, 512 * sectors, 3, 2), (HEADER + 16, 1, 2, 0))
        for index, one in enumerate(chain):
            memory.write(DESCRIPTORS + 16 * index, virtio.vring_desc.pack(*one))
        memory.write(AVAILABLE + 4 + 2 * (self.next % SIZE), b"\0\0")
        self.next += 1
        memory.write(AVAILABLE + 2, self.next.to_bytes(2, "little"))
        self.reg(places.NOTIFY, 0, 2)
        wanted = self.next.to_bytes(2, "little")
        self.guest.until(lambda: memory.read(USED + 2, 2) == wanted, "the chain is given back")
        assert memory.read(HEADER + 16, 1)[0] == virtio.VIRTIO_BLK_S_OK
        return bytes(memory.read(DATA, 512 * sectors))
