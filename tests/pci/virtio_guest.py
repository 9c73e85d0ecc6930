"""A guest's virtio block driver in a test's hands: polls nothing, trusts nothing but the specification."""

from __future__ import annotations

import struct
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from nvme_guest import FakeDisk, Loop, ram

from hvkvm.abi import pci, virtio
from hvkvm.devices.pci.virtio import function as places
from hvkvm.devices.pci.virtio.blk import VirtioBlk
from hvkvm.devices.pci.virtio.transport import Transport
from hvkvm.memory.guest import GuestMemory

DESCRIPTORS, AVAILABLE, USED, TABLE, HEADERS, DATA = (0x10000 * n for n in range(1, 7))
SIZE = 8
BASE = 0xC0000000
STATUS, Q_ENABLE = virtio.VIRTIO_PCI_COMMON_STATUS, virtio.VIRTIO_PCI_COMMON_Q_ENABLE
READY = (
    virtio.VIRTIO_CONFIG_S_ACKNOWLEDGE | virtio.VIRTIO_CONFIG_S_DRIVER | virtio.VIRTIO_CONFIG_S_FEATURES_OK
)
EVENT_IDX, INDIRECT = 1 << virtio.VIRTIO_RING_F_EVENT_IDX, 1 << virtio.VIRTIO_RING_F_INDIRECT_DESC
VERSION_1 = 1 << virtio.VIRTIO_F_VERSION_1
Buffer = tuple[int, int, bool]
"""Address, length, whether the device writes it."""


class VirtioGuest:
    """The device, and a driver of its queue 0. `features` beside VERSION_1 are what the driver wants."""

    def __init__(
        self,
        routes: Any,
        features: int = EVENT_IDX | INDIRECT,
        memory: GuestMemory | None = None,
        **more: Any,
    ) -> None:
        self.loop = Loop()
        self.memory = ram() if memory is None else memory
        self.disk = FakeDisk(self.loop)
        self.bells: dict[int, Callable[[], object]] = {}
        self.intx: list[bool] = []
        self.device = Transport(
            self.memory,
            VirtioBlk(self.disk, **{"serial": "hvkvm-0", **more}),
            self.loop,
            routes,
            make_bell=self._make_bell,
        )
        self.device.on_intx = self.intx.append
        self.device.moved(places.BAR, BASE)
        self.device.function.write(pci.PCI_COMMAND, 2, pci.PCI_COMMAND_MASTER | pci.PCI_COMMAND_MEMORY)
        self.device.start()
        self.features = features | VERSION_1
        self.next = self.seen = 0

    def _make_bell(self, gpa: int, size: int, rang: Callable[[], object]) -> Any:
        assert size == 2
        self.bells[gpa] = rang
        return SimpleNamespace(close=lambda: self.bells.pop(gpa))

    def reg(self, offset: int, size: int, value: int | None = None) -> int:
        """Read a field of the common configuration, or write it."""
        if value is None:
            return self.device.read(offset, size) & (1 << 8 * size) - 1
        self.device.write(offset, size, value)
        return value

    def offered(self) -> int:
        found = 0
        for half in range(2):
            self.reg(virtio.VIRTIO_PCI_COMMON_DFSELECT, 4, half)
            found |= self.reg(4, 4) << 32 * half
        return found

    def negotiate(self) -> int:
        """Reset, take part in the features; device_status."""
        self.reg(STATUS, 1, 0)
        self.loop.settle()
        self.reg(STATUS, 1, READY & 3)
        for half in range(2):
            self.reg(virtio.VIRTIO_PCI_COMMON_GFSELECT, 4, half)
            self.reg(virtio.VIRTIO_PCI_COMMON_GF, 4, self.features >> 32 * half & 0xFFFFFFFF)
        self.reg(STATUS, 1, READY)
        return self.reg(STATUS, 1)

    def enable(self, queue: int = 0, vector: int = virtio.VIRTIO_MSI_NO_VECTOR) -> None:
        """All that a driver does before its first request."""
        assert self.negotiate() == READY
        self.memory.write(AVAILABLE, bytes(6 + 2 * SIZE))
        self.memory.write(USED, bytes(6 + 8 * SIZE))
        self.next = self.seen = 0
        self.reg(virtio.VIRTIO_PCI_COMMON_Q_SELECT, 2, queue)
        self.reg(virtio.VIRTIO_PCI_COMMON_Q_SIZE, 2, SIZE)
        self.reg(virtio.VIRTIO_PCI_COMMON_Q_MSIX, 2, vector)
        for offset, at in (
            (virtio.VIRTIO_PCI_COMMON_Q_DESCLO, DESCRIPTORS),
            (virtio.VIRTIO_PCI_COMMON_Q_AVAILLO, AVAILABLE),
            (virtio.VIRTIO_PCI_COMMON_Q_USEDLO, USED),
        ):
            self.reg(offset, 4, at)
            self.reg(offset + 4, 4, 0)
        self.reg(Q_ENABLE, 2, 1)
        assert self.reg(Q_ENABLE, 2) == 1
        self.reg(STATUS, 1, READY | virtio.VIRTIO_CONFIG_S_DRIVER_OK)
        self.loop.settle()

    def lay(self, buffers: list[Buffer], at: int = 0, table: int = DESCRIPTORS) -> None:
        """Descriptors from `at` on, one behind the other."""
        for index, (address, length, writable) in enumerate(buffers):
            last = index == len(buffers) - 1
            flags = (virtio.VRING_DESC_F_WRITE if writable else 0) | (0 if last else 1)
            raw = virtio.vring_desc.pack(address, length, flags, at + index + 1)
            self.memory.write(table + 16 * (at + index), raw)

    def offer(self, head: int = 0, ring: bool = True) -> None:
        """Make a chain available, and notify."""
        self.memory.write(AVAILABLE + 4 + 2 * (self.next % SIZE), struct.pack("<H", head))
        self.next = self.next + 1 & 0xFFFF
        self.memory.write(AVAILABLE + 2, struct.pack("<H", self.next))
        if ring:
            self.device.write(places.NOTIFY, 2, 0)

    def used(self) -> list[tuple[int, int]]:
        """What was given back since: (head, written)."""
        (index,) = struct.unpack("<H", self.memory.read(USED + 2, 2))
        found = []
        while self.seen != index:
            raw = self.memory.read(USED + 4 + 8 * (self.seen % SIZE), 8)
            found.append(struct.unpack("<II", raw))
            self.seen = self.seen + 1 & 0xFFFF
        return found

    def header(self, kind: int, sector: int = 0) -> None:
        self.memory.write(HEADERS, virtio.virtio_blk_outhdr.pack(kind, sector))

    def do(self, kind: int, sector: int = 0, length: int = 512, *, writes: bool = False) -> int:
        """One request with data at DATA; its status byte."""
        self.header(kind, sector)
        self.memory.write(HEADERS + 16, b"\xff")
        data = [(DATA, length, writes)] if length else []
        self.lay([(HEADERS, 16, False), *data, (HEADERS + 16, 1, True)])
        self.offer()
        self.loop.settle()
        ((head, written),) = self.used()
        assert head == 0
        status = self.memory.read(HEADERS + 16, 1)[0]
        assert written == (1 + length if writes and not status else 1)
        return status

    def close(self) -> None:
        self.device.close()
        self.memory.close()
