"""The ACPI fixed hardware that the FADT promises: PM1a event and control blocks.

Power-off is SLP_EN with the sleep type that the DSDT's \\_S5 names. The power
button is an event, and so is the alarm of an RTC: each raises the SCI while both its
status and enable bits are set. The board has no SMI command port, so SCI_EN is always on, and no PM timer
where there is no PCI. Register calls come from vCPU threads, `press_power_button` from any.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hvkvm.abi.board import (
    PM1_CNT_SCI_EN,
    PM1_CNT_SLP_EN,
    PM1_CNT_SLP_TYP_MASK,
    PM1_CNT_SLP_TYP_SHIFT,
    PM1A_CNT_PORT,
    PM1A_CNT_SIZE,
    PM1A_EVT_PORT,
    PM1A_EVT_SIZE,
    S5_SLP_TYP,
)
from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from hvkvm.devices.port.bus import PortBus

PM1_STS_PWRBTN = 1 << 8
PM1_STS_RTC = 1 << 10
_EVENTS = PM1_STS_PWRBTN | PM1_STS_RTC
"""Both have their enable bit at the same place."""
SLEEP_BYTE = S5_SLP_TYP << 2 | 1 << 5
"""S5 and SLP_EN in a sleep control register (ACPI 6.5, 4.8.3.7), which OVMF's CloudHv platform writes where
PM1_STS is here. Bit 2 is reserved there, so nobody clears events with it."""
_PM1_EN_MASK = 0x0721  # TMR, GBL, PWRBTN, SLPBTN, RTC: what ACPI 4.8.4.1 defines and lets be written


class AcpiEventState(NamedTuple):
    """PM1_STS and PM1_EN."""

    status: int
    enable: int


class AcpiEventBlock:
    """PM1_STS and PM1_EN. `set_sci(level)` drives the level-triggered SCI, if the machine wired it."""

    def __init__(self, set_sci: Callable[[bool], None] | None = None) -> None:
        self.on_sleep: Callable[[], None] | None = None
        """What `SLEEP_BYTE` at the first port does, on a vCPU's thread; None: what it does to PM1_STS."""
        self._set_sci = set_sci
        self._lock = threading.Lock()
        self._status = 0
        self._enable = 0
        self._level = False

    def attach(self, bus: PortBus, port: int = PM1A_EVT_PORT) -> None:
        """Claim the four ports; ConfigError when one is taken."""
        bus.add(port, PM1A_EVT_SIZE, self)

    def read(self, offset: int, size: int) -> int:
        """Status in the low, enable in the high word."""
        return (self._status | self._enable << 16) >> 8 * offset

    def write(self, offset: int, size: int, value: int) -> None:
        """Clear the status bits written as 1; replace the enable bytes written."""
        if self.on_sleep is not None and (offset, size, value) == (0, 1, SLEEP_BYTE):
            self.on_sleep()
            return
        bits = value << 8 * offset
        written = (1 << 8 * size) - 1 << 8 * offset
        with self._lock:
            self._status &= ~bits
            self._enable = self._enable & ~(written >> 16) | bits >> 16 & _PM1_EN_MASK
            self._update()

    def reset(self) -> None:
        """Power-on state: nothing enabled, nothing pending."""
        with self._lock:
            self._status = self._enable = 0
            self._update()

    def save(self) -> AcpiEventState:
        """Both registers."""
        return AcpiEventState(self._status, self._enable)

    def load(self, state: AcpiEventState) -> None:
        """Put them back, and the SCI to the level that follows: the IOAPIC does not know who drives it."""
        with self._lock:
            self._status, self._enable = state.status & _EVENTS, state.enable & _PM1_EN_MASK
            self._update(even_if_the_same=True)

    def press_power_button(self) -> None:
        """Ask the guest to shut down; without effect on a guest that listens to no power button."""
        with self._lock:
            self._status |= PM1_STS_PWRBTN
            self._update()

    def raise_alarm(self) -> None:
        """The RTC's alarm is due. Linux takes it from here where an HPET has the RTC's own interrupt."""
        with self._lock:
            self._status |= PM1_STS_RTC
            self._update()

    def _update(self, *, even_if_the_same: bool = False) -> None:
        level = bool(self._status & self._enable & _EVENTS)
        if (even_if_the_same or level != self._level) and self._set_sci is not None:
            self._set_sci(level)
        self._level = level


class AcpiControlBlock:
    """PM1_CNT. `on_power_off` runs on the writing vCPU's thread and must not wait for it.

    `off_types` are the sleep types that mean S5: the DSDT's, and where firmware takes the board
    for a PIIX4, that chip's.
    """

    def __init__(self, on_power_off: Callable[[], None], off_types: Sequence[int] = (S5_SLP_TYP,)) -> None:
        self.on_power_off = on_power_off
        self._off_types = frozenset(off_types)
        self._value = 0

    def attach(self, bus: PortBus, port: int = PM1A_CNT_PORT) -> None:
        """Claim the two ports; ConfigError when one is taken."""
        bus.add(port, PM1A_CNT_SIZE, self)

    def reset(self) -> None:
        """Power-on state."""
        self._value = 0

    def save(self) -> int:
        """The register."""
        return self._value

    def load(self, value: int) -> None:
        """Put it back; powers nothing off."""
        self._value = value & ~PM1_CNT_SLP_EN & 0xFFFF

    def read(self, offset: int, size: int) -> int:
        """The sleep type last written, SCI_EN set, SLP_EN clear."""
        return (self._value | PM1_CNT_SCI_EN) >> 8 * offset

    def write(self, offset: int, size: int, value: int) -> None:
        """Power off on SLP_EN with S5's sleep type; other sleep states do not exist here."""
        written = (1 << 8 * size) - 1 << 8 * offset
        control = self._value & ~written | value << 8 * offset
        self._value = control & ~PM1_CNT_SLP_EN & 0xFFFF
        if (
            control & PM1_CNT_SLP_EN
            and (control & PM1_CNT_SLP_TYP_MASK) >> PM1_CNT_SLP_TYP_SHIFT in self._off_types
        ):
            self.on_power_off()
