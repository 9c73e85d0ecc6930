"""How a virtio device interrupts: by MSI-X vectors, or by INTx with the ISR status that reading clears.

Any thread. `_lock` is held for the status alone, and may be taken under the transport's; `_line_lock` is held
while the bus is told of the line's level, and taken under none; the bus calls nothing of ours that takes it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from hvkvm.abi import virtio
from hvkvm.devices.pci.msix import Msix


class Interrupts:
    """Of one device."""

    def __init__(self, msix: Msix) -> None:
        self.on_intx: Callable[[bool], object] | None = None
        """Drives the INTx of the slot that it is in."""
        self._msix = msix
        self._lock = threading.Lock()
        self._line_lock = threading.Lock()
        self._isr = 0

    @property
    def isr(self) -> int:
        """The status, for a file."""
        return self._isr

    @isr.setter
    def isr(self, value: int) -> None:
        with self._lock:
            self._isr = value & 0xFF

    def take_isr(self) -> int:
        """A guest's read: it clears the status and lets go of the line."""
        with self._lock:
            isr, self._isr = self._isr, 0
        self.update_line()
        return isr

    def note(self) -> None:
        """A queue has something new: shown in the status, for a guest without MSI-X."""
        if not self._msix.enabled:
            with self._lock:
                self._isr |= virtio.VIRTIO_PCI_ISR_QUEUE

    def raise_vectors(self, vectors: Iterable[int]) -> None:
        """Send those that the guest has given, or raise the line for what was noted."""
        if not self._msix.enabled:
            self.update_line()
            return
        for vector in vectors:
            if vector != virtio.VIRTIO_MSI_NO_VECTOR:
                self._msix.raise_vector(vector)

    def update_line(self) -> None:
        """Have INTx as the status says."""
        with self._line_lock:
            if self.on_intx is not None:
                self.on_intx(bool(self._isr) and not self._msix.enabled)
