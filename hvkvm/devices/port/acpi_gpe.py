"""The ACPI general-purpose event block that the FADT promises, and the SCI that it shares with PM1.

An event is one bit: status says that it came, enable that the guest wants to hear
of it, and both together raise the SCI. The guest's \\_GPE methods say what each is
for. Register calls come from vCPU threads, `raise_event` from any.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from hvkvm.abi.board import GPE0_EVENTS, GPE0_PORT, GPE0_SIZE
from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from hvkvm.devices.port.bus import PortBus

_BITS = 4 * GPE0_SIZE  # half of the ports are status, half enable


class SharedLine:
    """One level-triggered line that several drive: high while any of them wants it. Any thread."""

    def __init__(self, set_level: Callable[[bool], None]) -> None:
        self._set_level = set_level
        self._lock = threading.Lock()
        self._inputs: list[bool] = []

    def add(self) -> Callable[[bool], None]:
        """An input of it, low at first: a function of its level."""
        index = len(self._inputs)
        self._inputs.append(False)

        def drive(level: bool) -> None:
            with self._lock:  # the line is set in the order in which the inputs changed
                self._inputs[index] = level
                self._set_level(any(self._inputs))

        return drive


class GpeState(NamedTuple):
    """GPE0_STS and GPE0_EN."""

    status: int
    enable: int


class AcpiGpeBlock:
    """GPE0_STS in the low half of the ports, GPE0_EN in the high. `set_sci(level)` drives its SCI."""

    def __init__(self, set_sci: Callable[[bool], None]) -> None:
        self._set_sci = set_sci
        self._lock = threading.Lock()
        self._status = 0
        self._enable = 0

    def attach(self, bus: PortBus) -> None:
        """Claim the ports; ConfigError when one is taken."""
        bus.add(GPE0_PORT, GPE0_SIZE, self)

    def read(self, offset: int, size: int) -> int:
        """Both registers side by side."""
        return (self._status | self._enable << _BITS) >> 8 * offset

    def write(self, offset: int, size: int, value: int) -> None:
        """Clear the status bits written as 1; replace the enable bytes written."""
        bits = value << 8 * offset
        written = (1 << 8 * size) - 1 << 8 * offset
        with self._lock:
            self._status &= ~bits
            self._enable = (self._enable & ~(written >> _BITS) | bits >> _BITS) & GPE0_EVENTS
            self._update()

    def raise_event(self, number: int) -> None:
        """Event `number` has come; without effect on a guest that has no method for it."""
        with self._lock:
            self._status |= 1 << number & GPE0_EVENTS
            self._update()

    def reset(self) -> None:
        """Power-on state: nothing enabled, nothing pending."""
        self.load(GpeState(0, 0))

    def save(self) -> GpeState:
        """Both registers."""
        return GpeState(self._status, self._enable)

    def load(self, state: GpeState) -> None:
        """Put them back, and the SCI to the level that follows."""
        with self._lock:
            self._status, self._enable = state.status & GPE0_EVENTS, state.enable & GPE0_EVENTS
            self._update()

    def _update(self) -> None:
        self._set_sci(bool(self._status & self._enable))
