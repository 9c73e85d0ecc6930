"""Interrupt lines as port devices see them, and the one over an irqfd.

Devices know no GSI and no KVM: they get a line from the machine that wires
them. ISA lines on this board are edge-triggered, so a line can only pulse.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from hvkvm.kvm.irqfd import Irqfd


class IrqLine(Protocol):
    """An edge-triggered interrupt line."""

    def pulse(self) -> None:
        """Raise and lower the line. Any thread; must not block."""


class IrqfdLine:
    """A line that pulses an irqfd without resample: one eventfd write, no vCPU is waited for."""

    def __init__(self, irqfd: Irqfd) -> None:
        self.pulse = irqfd.signal
