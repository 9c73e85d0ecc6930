"""fw_cfg: how firmware and kvm-unit-tests ask a board for its size, and firmware for its tables.

The guest writes a 16-bit key to the selector port, then reads that item byte by byte from the data port;
past its end, and for unknown keys, it reads 0. Firmware has two things more (`FirmwareFwCfg`): files,
which a directory names, and DMA, by which an item is copied into RAM with one exit. The protocol is
QEMU's (docs/specs/fw_cfg).

vCPU threads; what there is does not change while they run, but for the cursor. A DMA is bounded by RAM,
since the whole target must be RAM, and runs on the thread of the vCPU that asked for it.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from hvkvm.abi.board import FW_CFG_DMA_PORT, FW_CFG_DMA_SIZE, FW_CFG_PORT, FW_CFG_SIZE
from hvkvm.abi.fw_cfg import (
    DMA_ACCESS,
    FILE_ENTRY,
    FW_CFG_DMA_CTL_ERROR,
    FW_CFG_DMA_CTL_READ,
    FW_CFG_DMA_CTL_SELECT,
    FW_CFG_DMA_CTL_SKIP,
    FW_CFG_DMA_CTL_WRITE,
    FW_CFG_DMA_SIGNATURE,
    FW_CFG_FILE_DIR,
    FW_CFG_FILE_FIRST,
    FW_CFG_ID,
    FW_CFG_MAX_CPUS,
    FW_CFG_MAX_FILE_PATH,
    FW_CFG_MAX_RAM,
    FW_CFG_NB_CPUS,
    FW_CFG_RAM_SIZE,
    FW_CFG_SIGNATURE,
    FW_CFG_VERSION,
    FW_CFG_VERSION_DMA,
)
from hvkvm.errors import GuestMemoryError
from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from hvkvm.devices.port.bus import PortBus

_NOTHING = 0xFFFF
"""A key that no item has."""

_PIECE = 1 << 20

Content = bytes | memoryview


class Ram(Protocol):
    """What DMA needs of guest memory. Each raises GuestMemoryError for what is no RAM."""

    def contains(self, gpa: int, n: int) -> bool: ...
    def read(self, gpa: int, n: int) -> bytes: ...
    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None: ...
    def zero(self, gpa: int, n: int) -> None: ...


class FwCfgState(NamedTuple):
    """Which item the guest reads, how far it is, and the upper half of the DMA address."""

    key: int
    cursor: int
    dma_high: int = 0


class FwCfg:
    """The two ports. `cpus` vCPUs, `memory_size` bytes of RAM."""

    def __init__(self, cpus: int, memory_size: int) -> None:
        self._items: dict[int, Content | Callable[[], Content]] = {
            FW_CFG_SIGNATURE: b"QEMU",
            FW_CFG_ID: struct.pack("<I", FW_CFG_VERSION),
            FW_CFG_RAM_SIZE: struct.pack("<Q", memory_size),
            FW_CFG_NB_CPUS: struct.pack("<H", cpus),
            FW_CFG_MAX_CPUS: struct.pack("<H", cpus),
            FW_CFG_MAX_RAM: struct.pack("<Q", 0),
            FW_CFG_FILE_DIR: struct.pack(">I", 0),
        }
        self._dma_high = 0
        self.reset()

    def attach(self, bus: PortBus, port: int = FW_CFG_PORT) -> None:
        """Claim selector and data port; ConfigError when one is taken."""
        bus.add(port, FW_CFG_SIZE, self, width=2)

    def reset(self) -> None:
        """Nothing selected."""
        self.load(FwCfgState(_NOTHING, 0))

    def save(self) -> FwCfgState:
        """The selection."""
        return FwCfgState(self._selected[0], self._cursor, self._dma_high)

    def load(self, state: FwCfgState) -> None:
        """Put it back. An unknown key has an item without bytes, as ever."""
        self.select(state.key)
        self._cursor = max(0, state.cursor)
        self._dma_high = state.dma_high & 0xFFFFFFFF

    def select(self, key: int) -> None:
        """Begin with an item."""
        found = self._items.get(key, b"")
        self._selected = key, found() if callable(found) else found
        self._cursor = 0

    def read(self, offset: int, size: int) -> int:
        """The item's next byte, from the data port; 0 elsewhere."""
        if offset != 1:
            return 0
        # Two vCPUs may race for the cursor: either gets some byte of the item, as on a board.
        cursor, (_key, item) = self._cursor, self._selected
        if cursor >= len(item):
            return 0
        self._cursor = cursor + 1
        return item[cursor]

    def write(self, offset: int, size: int, value: int) -> None:
        """Select an item, by a 16-bit write to the selector; data writes are ignored."""
        if offset == 0 and size == 2:
            self.select(value)


class FirmwareFwCfg(FwCfg):
    """With files and DMA. Give it all of them before the vCPUs run."""

    def __init__(self, cpus: int, memory_size: int, ram: Ram) -> None:
        super().__init__(cpus, memory_size)
        self._items[FW_CFG_ID] = struct.pack("<I", FW_CFG_VERSION | FW_CFG_VERSION_DMA)
        del self._items[FW_CFG_MAX_RAM]  # kernel data, for firmware
        self._ram = ram
        self._files: list[tuple[str, int, int]] = []
        self._writers: dict[int, Callable[[int, bytes], object]] = {}
        self._lock = threading.Lock()

    def add_item(self, key: int, content: Content) -> None:
        """Have `key` select `content`."""
        self._items[key] = content

    def add_file(self, name: str, content: Content | Callable[[], Content], size: int = -1) -> None:
        """Add a file of `size` bytes, by default the content's length.

        A function is asked whenever a guest selects the file; give the size that it always has. ValueError
        for a name that does not fit.
        """
        if not name.isascii() or len(name) >= FW_CFG_MAX_FILE_PATH:
            raise ValueError(f"fw_cfg file {name!r}: not a name of up to {FW_CFG_MAX_FILE_PATH - 1} letters")
        if size < 0:
            size = len(content() if callable(content) else content)
        key = FW_CFG_FILE_FIRST + len(self._files)
        self._files.append((name, key, size))
        self._items[key] = content
        listed = sorted(self._files)
        entries = [FILE_ENTRY.pack(length, select, 0, file.encode()) for file, select, length in listed]
        self._items[FW_CFG_FILE_DIR] = struct.pack(">I", len(entries)) + b"".join(entries)

    def add_writable(
        self, name: str, size: int, content: Callable[[], bytes], on_write: Callable[[int, bytes], object]
    ) -> None:
        """Add a file that guests may write, within its `size`: `on_write(offset, data)` on a vCPU's thread.

        One write at a time. ValueError as for `add_file`.
        """
        self.add_file(name, content, size)
        self._writers[self._files[-1][1]] = on_write

    def attach(self, bus: PortBus, port: int = FW_CFG_PORT) -> None:
        """Claim the selector, data and DMA ports; ConfigError when one is taken."""
        super().attach(bus, port)
        bus.add(port - FW_CFG_PORT + FW_CFG_DMA_PORT, FW_CFG_DMA_SIZE, _DmaPorts(self))

    def dma_high(self, value: int) -> None:
        """The upper half of the next descriptor's address."""
        self._dma_high = value

    def dma(self, low: int) -> None:
        """Carry out the descriptor at this address. One vCPU at a time."""
        with self._lock:
            gpa = self._dma_high << 32 | low
            self._dma_high = 0
            try:
                control, length, address = DMA_ACCESS.unpack(self._ram.read(gpa, DMA_ACCESS.size))
                if control & FW_CFG_DMA_CTL_SELECT:
                    self.select(control >> 16)
                good = True
                if control & FW_CFG_DMA_CTL_READ:
                    good = self._copy(address, length)
                elif control & FW_CFG_DMA_CTL_WRITE:
                    good = self._store(address, length)
                elif control & FW_CFG_DMA_CTL_SKIP:
                    self._cursor = min(self._cursor + length, len(self._selected[1]))
                self._ram.write(gpa, struct.pack(">I", 0 if good else FW_CFG_DMA_CTL_ERROR))
            except GuestMemoryError:
                return  # a descriptor outside RAM: there is nowhere to say so

    def _store(self, gpa: int, length: int) -> bool:
        """`length` bytes of RAM into an item that guests may write; no byte behind its end."""
        # Another vCPU may select by the port meanwhile: what is written is bounded by the item whose it is.
        (key, item), cursor = self._selected, self._cursor
        on_write = self._writers.get(key)
        if on_write is None or length > len(item) - cursor or not self._ram.contains(gpa, length):
            return False
        self._cursor = cursor + length
        on_write(cursor, self._ram.read(gpa, length))
        return True

    def _copy(self, gpa: int, length: int) -> bool:
        """`length` bytes of the item into RAM, zeros behind its end."""
        if not self._ram.contains(gpa, length):
            return False
        cursor = self._cursor
        data = memoryview(self._selected[1])[cursor : cursor + length]
        self._cursor = cursor + len(data)
        # In pieces, between which other threads may run.
        for at in range(0, len(data), _PIECE):
            self._ram.write(gpa + at, data[at : at + _PIECE])
        for at in range(len(data), length, _PIECE):
            self._ram.zero(gpa + at, min(_PIECE, length - at))
        return True


class _DmaPorts:
    """The DMA address, big-endian: the lower half starts the transfer. Reads give a signature."""

    def __init__(self, owner: FirmwareFwCfg) -> None:
        self._owner = owner

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(FW_CFG_DMA_SIGNATURE[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        if size == 4:
            swapped = int.from_bytes(value.to_bytes(4, "little"), "big")
            if offset == 0:
                self._owner.dma_high(swapped)
            elif offset == 4:
                self._owner.dma(swapped)
