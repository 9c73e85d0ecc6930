"""MSI-X: a table of vectors in a BAR, each an irqfd once the guest has said where it leads.

A vector that may fire has a route in KVM's table and an eventfd tied to it, so raising it is one write
to the eventfd. Routes are made when a vector is first unmasked and changed only when its address or data
are: each change makes KVM wait for every vCPU. They are given back when MSI-X is switched off. A vector that
is masked when it is raised stays pending until it is unmasked, and shows in the pending bit array. So does
one for which the host has no route now: it is asked again, until it has.

Registers come on vCPU threads, `raise_vector` on any. Two locks: `_table_lock` is held by who changes
the table and so may wait for KVM; `_lock` is held for a few instructions, and is all that raising takes.
"""

from __future__ import annotations

import threading
from typing import Protocol

from hvkvm.abi import pci
from hvkvm.devices.pci.function import Capability, Function
from hvkvm.errors import HvkvmError
from hvkvm.runtime.protocols import Delayer
from hvkvm.runtime.retry import Retry
from hvkvm.tuples import NamedTuple

_MASKED_AT_RESET = bytes(12) + pci.PCI_MSIX_ENTRY_CTRL_MASKBIT.to_bytes(4, "little")
_ENTRY_MASKS = (0xFFFFFFFC, 0xFFFFFFFF, 0xFFFFFFFF, pci.PCI_MSIX_ENTRY_CTRL_MASKBIT)
PBA_OFFSET = 0x800
"""Behind the table, which has room for 128 vectors before it."""
BAR_SIZE = 0x1000


class Line(Protocol):
    """A way to one MSI."""

    def signal(self) -> None:
        """Raise it. Any thread."""

    def close(self) -> None:
        """Give its route back."""


class MsiRouter(Delayer, Protocol):
    """Makes ways to MSIs: KVM's routing table with irqfds, or a recorder in a test. It delays on the loop."""

    def open(self, address: int, data: int) -> Line:
        """A line that raises this MSI. HvkvmError or OSError where the host has no more of them."""
        ...


class MsixState(NamedTuple):
    """The table as the guest has written it, and a bit for each vector that is pending."""

    table: bytes
    pending: int


def capability(vectors: int, bar: int, table: int = 0, pba: int = PBA_OFFSET) -> Capability:
    """The capability of a function with `vectors` vectors whose table and PBA are at offsets in `bar`."""
    flags = (vectors - 1).to_bytes(2, "little")
    body = flags + (table | bar).to_bytes(4, "little") + (pba | bar).to_bytes(4, "little")
    enable = pci.PCI_MSIX_FLAGS_ENABLE | pci.PCI_MSIX_FLAGS_MASKALL
    return Capability(pci.PCI_CAP_ID_MSIX, body, enable.to_bytes(2, "little") + bytes(8))


class Msix:
    """The vectors of one function. An MMIO device: its BAR, or a part of it that begins with the table."""

    def __init__(self, function: Function, vectors: int, router: MsiRouter) -> None:
        if not 1 <= vectors <= PBA_OFFSET // pci.PCI_MSIX_ENTRY_SIZE:
            raise ValueError(f"{vectors} MSI-X vectors")
        self.vectors = vectors
        self.failures = 0
        """How often the host had no route for a vector."""
        self._function = function
        self._flags_at = function.capability_offsets[pci.PCI_CAP_ID_MSIX] + pci.PCI_MSIX_FLAGS
        self._router = router
        self._table_lock = threading.RLock()
        self._lock = threading.Lock()
        self._table = bytearray(_MASKED_AT_RESET * vectors)
        self._pending = 0
        self._lines: list[Line | None] = [None] * vectors
        self._leads_to: list[tuple[int, int] | None] = [None] * vectors
        self._live = [False] * vectors
        self._retry = Retry(router, self.control_written)

    @property
    def enabled(self) -> bool:
        """Whether the guest uses MSI-X and not INTx."""
        return bool(self._flags & pci.PCI_MSIX_FLAGS_ENABLE)

    @property
    def _flags(self) -> int:
        config = self._function.config
        return config[self._flags_at] | config[self._flags_at + 1] << 8

    # The guest.

    def read(self, offset: int, size: int) -> int:
        """Table and pending bits; zeros around them."""
        if offset >= PBA_OFFSET:
            return self._pending >> 8 * (offset - PBA_OFFSET)
        with self._table_lock:
            return int.from_bytes(self._table[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Change the table; by aligned words of 4 or 8 bytes, as the specification wants it."""
        if size not in (4, 8) or offset % size or offset + size > len(self._table):
            return
        with self._table_lock:
            for at in range(offset, offset + size, 4):
                mask = _ENTRY_MASKS[at % 16 // 4]
                self._table[at : at + 4] = (value & mask).to_bytes(4, "little")
                value >>= 32
            self._look_at(offset // pci.PCI_MSIX_ENTRY_SIZE)

    def control_written(self) -> None:
        """The function's capability was written: vectors may come alive, or go."""
        with self._table_lock:
            for vector in range(self.vectors):
                self._look_at(vector)

    # The device.

    def raise_vector(self, vector: int) -> None:
        """Send a vector's MSI, or remember that it is due. Any thread."""
        with self._lock:
            line = self._lines[vector]
            if line is not None and self._live[vector]:
                line.signal()
            else:
                self._pending |= 1 << vector

    def _look_at(self, vector: int) -> None:
        """Make `vector` live or not, as table and capability say; send it if it waited for that."""
        at = vector * pci.PCI_MSIX_ENTRY_SIZE
        entry = self._table[at : at + pci.PCI_MSIX_ENTRY_SIZE]
        flags = self._flags
        masked = entry[pci.PCI_MSIX_ENTRY_VECTOR_CTRL] & pci.PCI_MSIX_ENTRY_CTRL_MASKBIT
        if masked or flags & pci.PCI_MSIX_FLAGS_MASKALL or not flags & pci.PCI_MSIX_FLAGS_ENABLE:
            with self._lock:
                self._live[vector] = False
            if not flags & pci.PCI_MSIX_FLAGS_ENABLE and self._lines[vector] is not None:
                self._replace(vector, None)
            return
        wanted = int.from_bytes(entry[:8], "little"), int.from_bytes(entry[8:12], "little")
        if self._leads_to[vector] != wanted:
            self._replace(vector, None)
            try:
                self._replace(vector, self._router.open(*wanted))
            except (HvkvmError, OSError):
                self.failures += 1
                self._retry.later()
                return
            self._leads_to[vector] = wanted
        with self._lock:
            self._live[vector] = True
            line = self._lines[vector]
            if line is not None and self._pending >> vector & 1:
                self._pending &= ~(1 << vector)
                line.signal()

    def _replace(self, vector: int, line: Line | None) -> None:
        with self._lock:
            old, self._lines[vector] = self._lines[vector], line
            self._live[vector] = False
        self._leads_to[vector] = None
        if old is not None:
            old.close()

    # State.

    def reset(self) -> None:
        """Every vector masked, no route held."""
        with self._table_lock:
            self._table[:] = _MASKED_AT_RESET * self.vectors
            for vector in range(self.vectors):
                self._replace(vector, None)
            with self._lock:
                self._pending = 0

    def close(self) -> None:
        """Give every route back, and ask for none any more. Not under a lock of its own."""
        self._retry.cancel()
        self.reset()

    def save(self) -> MsixState:
        """Table and pending bits."""
        return MsixState(bytes(self._table), self._pending)

    def load(self, state: MsixState) -> None:
        """Take them, behind the function's registers. ValueError for a table of another size."""
        if len(state.table) != len(self._table):
            raise ValueError("its MSI-X table has another size")
        with self._table_lock:
            for at in range(0, len(state.table), 4):
                word = int.from_bytes(state.table[at : at + 4], "little") & _ENTRY_MASKS[at % 16 // 4]
                self._table[at : at + 4] = word.to_bytes(4, "little")
            self._pending = state.pending & (1 << self.vectors) - 1
            for vector in range(self.vectors):
                self._look_at(vector)
