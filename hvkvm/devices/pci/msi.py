"""Plain MSI: messages of one address, told apart by the lowest bits of their data, each masked by itself.

A guest takes as many of the messages as it has room for, a power of two; vectors beyond them wrap around. An
eventfd tied to a route in KVM's table sends a message, as in `msix`; routes are made when the capability is
written, which is all that a guest does to it, and given back when it is switched off. A message that is
masked when it is raised stays pending until it is unmasked, and shows in the capability.

Registers come on vCPU threads, `raise_vector` on any. Locks are those of `msix`. Source: PCI 3.0, 6.8.1.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from hvkvm.abi import pci
from hvkvm.devices.pci.function import Capability, Function
from hvkvm.devices.pci.msix import Line, MsiRouter
from hvkvm.errors import HvkvmError
from hvkvm.runtime.retry import Retry

MESSAGES = 32
"""What the capability offers."""


def capability() -> Capability:
    """Of a function with MESSAGES messages, with 64-bit addresses and masks."""
    flags = pci.PCI_MSI_FLAGS_64BIT | pci.PCI_MSI_FLAGS_MASKBIT | (MESSAGES.bit_length() - 1) << 1
    body = flags.to_bytes(2, "little") + bytes(pci.PCI_CAP_MSI_SIZEOF_64_MASK - 4)
    writable = pci.PCI_MSI_FLAGS_ENABLE | pci.PCI_MSI_FLAGS_QSIZE
    masks = writable.to_bytes(2, "little") + b"\xfc" + b"\xff" * 7 + b"\xff\xff" + bytes(2) + b"\xff" * 4
    return Capability(pci.PCI_CAP_ID_MSI, body, masks)


class Msi:
    """The messages of one function. Its registers are all in the function's configuration space."""

    def __init__(self, function: Function, router: MsiRouter) -> None:
        self.failures = 0
        """How often the host had no route for a message."""
        self.overruled: Callable[[], bool] = lambda: False
        """Whether the guest has MSI-X on as well, which counts: then this one holds no route."""
        self._function = function
        self._at = function.capability_offsets[pci.PCI_CAP_ID_MSI]
        self._router = router
        self._table_lock = threading.RLock()
        self._lock = threading.Lock()
        self._lines: list[Line | None] = [None] * MESSAGES
        self._leads_to: list[tuple[int, int] | None] = [None] * MESSAGES
        self._live = 0  # a bit for each message that may be sent
        self._pending = 0
        self._retry = Retry(router, self.control_written)

    def _register(self, offset: int, size: int) -> int:
        at = self._at + offset
        return int.from_bytes(self._function.config[at : at + size], "little")

    @property
    def enabled(self) -> bool:
        """Whether the guest uses MSI and not INTx."""
        return bool(self._register(pci.PCI_MSI_FLAGS, 2) & pci.PCI_MSI_FLAGS_ENABLE)

    @property
    def messages(self) -> int:
        """How many the guest has taken."""
        taken = (self._register(pci.PCI_MSI_FLAGS, 2) & pci.PCI_MSI_FLAGS_QSIZE) >> 4
        return min(1 << taken, MESSAGES)

    def control_written(self) -> None:
        """The capability was written: messages may come alive, or go."""
        with self._table_lock:
            count = self.messages if self.enabled and not self.overruled() else 0
            address = self._register(pci.PCI_MSI_ADDRESS_LO, 8)
            data = self._register(pci.PCI_MSI_DATA_64, 2) & -self.messages
            mask = self._register(pci.PCI_MSI_MASK_64, 4)
            for message in range(MESSAGES):
                good = message < count and not mask >> message & 1
                if good and self._leads_to[message] != (address, data | message):
                    good = self._lead(message, (address, data | message))
                elif message >= count and self._lines[message] is not None:
                    self._replace(message, None)
                self._set_live(message, live=good)

    def _lead(self, message: int, where: tuple[int, int]) -> bool:
        self._replace(message, None)
        try:
            line = self._router.open(*where)
        except (HvkvmError, OSError):
            self.failures += 1
            self._retry.later()
            return False
        self._replace(message, line)
        self._leads_to[message] = where
        return True

    def _replace(self, message: int, line: Line | None) -> None:
        with self._lock:
            old, self._lines[message] = self._lines[message], line
            self._live &= ~(1 << message)
        self._leads_to[message] = None
        if old is not None:
            old.close()

    def _set_live(self, message: int, *, live: bool) -> None:
        bit = 1 << message
        with self._lock:
            self._live = self._live | bit if live else self._live & ~bit
            line = self._lines[message]
            if live and line is not None and self._pending & bit:
                self._pending &= ~bit
                self._show()
                line.signal()

    def raise_vector(self, vector: int) -> None:
        """Send its message, or remember that it is due. Any thread."""
        message = vector & self.messages - 1
        with self._lock:
            line = self._lines[message]
            if line is not None and self._live >> message & 1:
                line.signal()
            else:
                self._pending |= 1 << message
                self._show()

    def _show(self) -> None:
        at = self._at + pci.PCI_MSI_PENDING_64
        self._function.config[at : at + 4] = self._pending.to_bytes(4, "little")

    # State.

    def reset(self) -> None:
        """No route held, nothing pending. The function's own reset clears the registers."""
        with self._table_lock:
            for message in range(MESSAGES):
                self._replace(message, None)
            with self._lock:
                self._pending = 0
                self._show()

    def close(self) -> None:
        """Give every route back, and ask for none any more. Not under a lock of its own."""
        self._retry.cancel()
        self.reset()

    def save(self) -> int:
        """The pending bits; the rest is in the function's registers."""
        return self._pending

    def load(self, pending: int) -> None:
        """Take them, behind the function's registers."""
        with self._lock:
            self._pending = pending & (1 << MESSAGES) - 1
            self._show()
        self.control_written()
