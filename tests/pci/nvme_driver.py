"""An NVMe driver whose every access a guest's vCPU makes."""

from __future__ import annotations

import struct
from typing import Any

from guest_agent import SCRATCH
from guest_machine import Guest
from pci_driver import PciDriver

from hvkvm.abi import nvme, pci

ADMIN_SQ, ADMIN_CQ, IO_SQ, IO_CQ, SHADOW, EVENTS, DATA = (SCRATCH + 0x1000 * n for n in range(7))
ENTRIES = 8


class Driver(PciDriver):
    """Its one controller, with an admin queue and one for I/O."""

    def __init__(self, guest: Guest, slot: int = 2) -> None:
        super().__init__(guest, slot)
        self.tails = [0, 0]
        self.heads = [0, 0]
        self.phases = [1, 1]
        self.id = 0

    def enable(self) -> None:
        assert self.config(pci.PCI_VENDOR_ID) == pci.NVME_DEVICE_ID << 16 | pci.PCI_VENDOR_ID_MICROSOFT
        self.config(pci.PCI_BASE_ADDRESS_0, self.bar)
        self.config(pci.PCI_COMMAND, pci.PCI_COMMAND_MEMORY | pci.PCI_COMMAND_MASTER, 2)
        self.reg(nvme.NVME_REG_AQA, (ENTRIES - 1) * 0x10001)
        self.reg(nvme.NVME_REG_ASQ, ADMIN_SQ, 8)
        self.reg(nvme.NVME_REG_ACQ, ADMIN_CQ, 8)
        self.reg(nvme.NVME_REG_CC, 0x00460001)
        self.guest.until(
            lambda: self.reg(nvme.NVME_REG_CSTS) == nvme.NVME_CSTS_RDY, "the controller is ready"
        )

    def begin(
        self,
        queue: int,
        opcode: int,
        *,
        nsid: int = 0,
        prp1: int = DATA,
        prp2: int = 0,
        cdw: tuple[int, ...] = (),
    ) -> None:
        """Submit a command; who rings is the caller's business."""
        self.id += 1
        words = (*cdw, *[0] * (6 - len(cdw)))
        raw = struct.pack("<BBHI8xQQQ6I", opcode, 0, self.id, nsid, 0, prp1, prp2, *words)
        self.guest.machine.memory.write((ADMIN_SQ, IO_SQ)[queue] + 64 * self.tails[queue], raw)
        self.tails[queue] = (self.tails[queue] + 1) % ENTRIES

    def take(self, queue: int) -> int:
        """Wait for the next completion, and its status."""
        memory = self.guest.machine.memory
        at = (ADMIN_CQ, IO_CQ)[queue] + 16 * self.heads[queue] + 12
        phase = self.phases[queue]
        self.guest.until(lambda: memory.read_u32(at) >> 16 & 1 == phase, "a completion comes")
        self.heads[queue] = (self.heads[queue] + 1) % ENTRIES
        self.phases[queue] ^= not self.heads[queue]
        return memory.read_u32(at) >> 17

    def do(self, queue: int, opcode: int, **more: Any) -> int:
        self.begin(queue, opcode, **more)
        self.reg(nvme.NVME_REG_DBS + 8 * queue, self.tails[queue])
        status = self.take(queue)
        self.reg(nvme.NVME_REG_DBS + 8 * queue + 4, self.heads[queue])
        return status

    def make_queues(self) -> None:
        size = (ENTRIES - 1) << 16 | 1
        assert self.do(0, nvme.NVME_ADMIN_CREATE_CQ, prp1=IO_CQ, cdw=(size, 1)) == 0
        assert self.do(0, nvme.NVME_ADMIN_CREATE_SQ, prp1=IO_SQ, cdw=(size, 1 << 16 | 1)) == 0

    def read(self, sector: int, sectors: int = 8) -> bytes:
        assert self.do(1, nvme.NVME_CMD_READ, nsid=1, cdw=(sector, 0, sectors - 1)) == 0
        return self.guest.machine.memory.read(DATA, 512 * sectors)
