"""The controller's registers and doorbells, as vCPU threads write them and the I/O loop takes them.

What a vCPU wrote is noted here, under a lock; the controller acts on it in its next turn.
"""

from __future__ import annotations

import struct
import threading

from hvkvm.abi import nvme
from hvkvm.devices.pci.nvme.admin import MAX_ENTRIES, MAX_IO_QUEUES
from hvkvm.devices.pci.nvme.prp import PAGE
from hvkvm.tuples import NamedTuple

CAP = (MAX_ENTRIES - 1) | nvme.CAP_CQR | 20 << nvme.CAP_TO_SHIFT | nvme.CAP_CSS_NVM
_CC_WRITABLE = 0x00FFFFF1
_CC_BAD = nvme.NVME_CC_CSS_MASK | nvme.NVME_CC_MPS_MASK
_AQA_WRITABLE = 0x0FFF0FFF
_LAYOUT = struct.Struct("<QIIII4xI4xIQQ8x")
_LOW, _HIGH = 0xFFFFFFFF, 0xFFFFFFFF << 32


class Written(NamedTuple):
    """What vCPUs have written since the last time it was taken: doorbells by index, and whether EN fell."""

    doorbells: dict[int, int]
    reset: bool


class Registers:
    """CC, AQA, ASQ, ACQ and the interrupt mask; CSTS is the controller's own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """As at power-on."""
        self.cc = self.aqa = self.asq = self.acq = self.mask = 0
        self._reset_asked = False
        self._doorbells: dict[int, int] = {}

    @property
    def admin_sizes(self) -> tuple[int, int]:
        """Entries of the admin submission and completion queues, as the guest wants them."""
        return (self.aqa & 0xFFF) + 1, (self.aqa >> 16) + 1

    @property
    def is_possible(self) -> bool:
        """Whether CC asks for what there is."""
        return not self.cc & _CC_BAD and all(2 <= size <= 4096 for size in self.admin_sizes)

    def read(self, offset: int, size: int, csts: int) -> int:
        """Any bytes of them."""
        fields = nvme.NVME_VS_1_4, self.mask, self.mask, self.cc, csts, self.aqa, self.asq, self.acq
        return int.from_bytes(_LAYOUT.pack(CAP, *fields)[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> bool:
        """Note a write; whether the controller has to look at it."""
        if size == 8:
            low = self._write(offset, value & _LOW)
            return self._write(offset + 4, value >> 32) or low
        return size == 4 and self._write(offset, value)

    def _write(self, offset: int, value: int) -> bool:
        with self._lock:
            if offset == nvme.NVME_REG_CC:
                if self.cc & ~value & nvme.NVME_CC_ENABLE:
                    self._reset_asked = True
                    value &= ~nvme.NVME_CC_SHN_MASK  # a reset ends the shutdown; many drivers leave it in
                self.cc = value & _CC_WRITABLE
            elif offset == nvme.NVME_REG_INTMS:
                self.mask |= value
            elif offset == nvme.NVME_REG_INTMC:
                self.mask &= ~value
            elif offset == nvme.NVME_REG_AQA:
                self.aqa = value & _AQA_WRITABLE
            elif offset == nvme.NVME_REG_ASQ:
                self.asq = self.asq & _HIGH | value & -PAGE
            elif offset == nvme.NVME_REG_ASQ + 4:
                self.asq = self.asq & _LOW | value << 32
            elif offset == nvme.NVME_REG_ACQ:
                self.acq = self.acq & _HIGH | value & -PAGE
            elif offset == nvme.NVME_REG_ACQ + 4:
                self.acq = self.acq & _LOW | value << 32
        return offset in (nvme.NVME_REG_CC, nvme.NVME_REG_INTMS, nvme.NVME_REG_INTMC)

    def ring(self, offset: int, size: int, value: int) -> bool:
        """Note a doorbell; False for what is none."""
        index = offset - nvme.NVME_REG_DBS >> 2
        if size != 4 or offset & 3 or index >= 2 * (MAX_IO_QUEUES + 1):
            return False
        with self._lock:
            self._doorbells[index] = value & 0xFFFF
        return True

    def take(self) -> Written:
        """What was written since."""
        with self._lock:
            written = Written(self._doorbells, self._reset_asked)
            self._doorbells, self._reset_asked = {}, False
        return written

    def load(self, cc: int, aqa: int, asq: int, acq: int, mask: int) -> None:
        """Take those of a saved controller."""
        self.cc, self.aqa, self.mask = cc & _CC_WRITABLE, aqa & _AQA_WRITABLE, mask & _LOW
        self.asq, self.acq = asq & -PAGE & (1 << 64) - 1, acq & -PAGE & (1 << 64) - 1
