"""fw_cfg: how firmware and kvm-unit-tests ask a board for its size.

The guest writes a 16-bit key to the selector port, then reads that item byte
by byte from the data port; past its end, and for unknown keys, it reads 0. The
protocol is QEMU's (docs/specs/fw_cfg), without files and without DMA.
vCPU threads; nothing changes after construction but the cursor.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from hvkvm.abi.board import FW_CFG_PORT, FW_CFG_SIZE

if TYPE_CHECKING:
    from hvkvm.devices.port.bus import PortBus

FW_CFG_SIGNATURE = 0x00
FW_CFG_ID = 0x01
FW_CFG_RAM_SIZE = 0x03
FW_CFG_NB_CPUS = 0x05
FW_CFG_MAX_CPUS = 0x0F
FW_CFG_MAX_RAM = 0x11  # kvm-unit-tests' own: 0 means no limit
FW_CFG_FILE_DIR = 0x19


_NOTHING = 0xFFFF
"""A key that no item has."""


class FwCfgState(NamedTuple):
    """Which item the guest reads, and how far it is."""

    key: int
    cursor: int


class FwCfg:
    """The two ports. `cpus` vCPUs, `memory_size` bytes of RAM."""

    def __init__(self, cpus: int, memory_size: int) -> None:
        self._items = {
            FW_CFG_SIGNATURE: b"QEMU",
            FW_CFG_ID: struct.pack("<I", 1),  # the traditional interface only
            FW_CFG_RAM_SIZE: struct.pack("<Q", memory_size),
            FW_CFG_NB_CPUS: struct.pack("<H", cpus),
            FW_CFG_MAX_CPUS: struct.pack("<H", cpus),
            FW_CFG_MAX_RAM: struct.pack("<Q", 0),
            FW_CFG_FILE_DIR: struct.pack(">I", 0),
        }
        self.reset()

    def attach(self, bus: PortBus, port: int = FW_CFG_PORT) -> None:
        """Claim selector and data port; ConfigError when one is taken."""
        bus.add(port, FW_CFG_SIZE, self, width=2)

    def reset(self) -> None:
        """Nothing selected."""
        self.load(FwCfgState(_NOTHING, 0))

    def save(self) -> FwCfgState:
        """The selection."""
        return FwCfgState(self._key, self._cursor)

    def load(self, state: FwCfgState) -> None:
        """Put it back. An unknown key has an item without bytes, as ever."""
        self._key = state.key
        self._item = self._items.get(state.key, b"")
        self._cursor = max(0, state.cursor)

    def read(self, offset: int, size: int) -> int:
        """The item's next byte, from the data port; 0 elsewhere."""
        if offset != 1:
            return 0
        # Two vCPUs may race for the cursor: either gets some byte of the item, as on a board.
        cursor, item = self._cursor, self._item
        if cursor >= len(item):
            return 0
        self._cursor = cursor + 1
        return item[cursor]

    def write(self, offset: int, size: int, value: int) -> None:
        """Select an item, by a 16-bit write to the selector; data writes are ignored."""
        if offset == 0 and size == 2:
            self.load(FwCfgState(value, 0))
