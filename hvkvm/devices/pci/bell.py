"""An ioeventfd in a BAR, as the devices on PCI ask for one. No state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Closable(Protocol):
    """The ioeventfd."""

    def close(self) -> object:
        """Its writes are exits again. KvmIoctlError."""


BellMaker = Callable[[int, int, Callable[[], object]], Closable]
"""bell(gpa, size, rang): has `rang()` called on the loop when the guest writes `size` bytes. OSError."""
