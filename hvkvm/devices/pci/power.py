"""Where the ACPI blocks of a machine with PCI are: wherever firmware has put them, with a PM timer.

The blocks themselves are the board's (`port.acpi_pm`). The PM function's PMBA says at which port they
begin: the event block, 4 ports on the control block, 8 on the timer. A base whose ports belong to
somebody else is not decoded. vCPU threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from hvkvm.abi.board import PM1A_CNT_PORT, PM1A_CNT_SIZE, PM1A_EVT_PORT, PM1A_EVT_SIZE
from hvkvm.abi.pci import PM_TIMER_HZ, PM_TIMER_OFFSET, PM_TIMER_SIZE

if TYPE_CHECKING:
    from hvkvm.devices.port.acpi_pm import AcpiControlBlock, AcpiEventBlock
    from hvkvm.devices.port.bus import PortBus

_CONTROL = PM1A_CNT_PORT - PM1A_EVT_PORT
_BLOCKS = ((0, PM1A_EVT_SIZE), (_CONTROL, PM1A_CNT_SIZE), (PM_TIMER_OFFSET, PM_TIMER_SIZE))
_TIMER_BITS = 24


class PmTimer:
    """Counts at 3.579545 MHz in 24 bits, and raises nothing."""

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._offset = 0

    @property
    def count(self) -> int:
        """The register."""
        return (self._clock() * PM_TIMER_HZ // 1_000_000_000 + self._offset) & (1 << _TIMER_BITS) - 1

    @count.setter
    def count(self, value: int) -> None:
        """Go on from `value`, as a saved machine does."""
        self._offset += value - self.count

    def read(self, offset: int, size: int) -> int:
        """The counter's bytes."""
        return self.count >> 8 * offset

    def write(self, offset: int, size: int, value: int) -> None:
        """Nothing: the counter is read-only."""


class PmBlocks:
    """Lays the three blocks onto the port bus where they are to be."""

    def __init__(self, ports: PortBus, events: AcpiEventBlock, control: AcpiControlBlock) -> None:
        self.timer = PmTimer()
        self.base: int | None = None
        """Where they are; None: nowhere."""
        self._ports = ports
        self._events = events
        self._control = control
        self._lock = threading.Lock()

    def move(self, base: int | None) -> None:
        """Decode them at `base` from now on, if those ports are free."""
        with self._lock:
            if base == self.base:
                return
            if self.base is not None:
                for offset, size in _BLOCKS:
                    self._ports.remove(self.base + offset, size)
                self.base = None
            if base is None or not all(self._ports.is_free(base + at, size) for at, size in _BLOCKS):
                return
            self._events.attach(self._ports, base)
            self._control.attach(self._ports, base + _CONTROL)
            self._ports.add(base + PM_TIMER_OFFSET, PM_TIMER_SIZE, self.timer)
            self.base = base
