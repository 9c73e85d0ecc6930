"""One comparator of the HPET: its registers, and when it matches next. Under the HPET's lock.

Times are host ticks of hpet.TICK_NS, which never wrap; the counter that a guest sees is at an offset to them.
"""

from __future__ import annotations

from hvkvm.abi import hpet
from hvkvm.tuples import NamedTuple

PINS = (20, 21, 22, 23)
"""Of the IOAPIC, which a timer may be routed to: those that PCI has not."""
ALL = (1 << 64) - 1
LOW = (1 << 32) - 1
_ROUTES = sum(1 << pin for pin in PINS)
_CAPABILITIES = hpet.HPET_TN_PERIODIC_CAP | hpet.HPET_TN_64BIT_CAP | _ROUTES << hpet.HPET_TN_ROUTE_CAP_SHIFT
_WRITABLE = (
    hpet.HPET_TN_LEVEL
    | hpet.HPET_TN_ENABLE
    | hpet.HPET_TN_PERIODIC
    | hpet.HPET_TN_SETVAL
    | hpet.HPET_TN_32BIT
    | hpet.HPET_TN_ROUTE
)


class TimerState(NamedTuple):
    """Registers; the last period written; and ticks until it is due, 0 for now, -1 for never."""

    config: int
    comparator: int
    period: int
    remaining: int


class HpetState(NamedTuple):
    """Registers, as the guest would read them."""

    config: int
    status: int
    counter: int
    timers: tuple[TimerState, ...]


class Comparator:
    """`due` is when it matches next; None while the counter stands."""

    def __init__(self) -> None:
        self.config = 0
        self.comparator = ALL
        self.period = 0
        self.due: int | None = None

    @property
    def register(self) -> int:
        """Its configuration and capabilities."""
        return self.config | _CAPABILITIES

    @property
    def enabled(self) -> bool:
        """Whether it interrupts."""
        return bool(self.config & hpet.HPET_TN_ENABLE)

    @property
    def level(self) -> bool:
        """Whether its interrupt stays until the guest clears it."""
        return bool(self.config & hpet.HPET_TN_LEVEL)

    @property
    def pin(self) -> int | None:
        """The one that it is routed to; None where that is none of PINS, as it is at power-on."""
        pin = (self.config & hpet.HPET_TN_ROUTE) >> hpet.HPET_TN_ROUTE_SHIFT
        return pin if _ROUTES >> pin & 1 else None

    @property
    def mask(self) -> int:
        """The bits of the counter that it looks at."""
        return LOW if self.config & hpet.HPET_TN_32BIT else ALL

    def after(self, now: int) -> tuple[int, int | None]:
        """Comparator and due time as they are once every match up to `now` is over."""
        if self.due is None or self.due > now:
            return self.comparator, self.due
        periodic = self.config & hpet.HPET_TN_PERIODIC and self.period & self.mask
        steps = periodic or self.mask + 1  # once around
        over = (now - self.due) // steps + 1
        return (self.comparator + over * steps) & self.mask, self.due + over * steps

    def configure(self, value: int, mask: int) -> None:
        """Take the bits of `mask` of what is written to its configuration."""
        before = self.config & hpet.HPET_TN_ROUTE
        self.config = self.config & ~mask | value & mask & _WRITABLE
        if self.pin is None:  # a pin that there is none of: reading it back tells
            self.config = self.config & ~hpet.HPET_TN_ROUTE | before

    def compare(self, value: int, mask: int) -> None:
        """Likewise its comparator: a periodic one's period, and behind SETVAL its next match, too."""
        periodic = self.config & hpet.HPET_TN_PERIODIC
        if not periodic or self.config & hpet.HPET_TN_SETVAL:
            self.comparator = self.comparator & ~mask & ALL | value
        if periodic:
            self.period = self.period & ~mask & ALL | value
        if self.config & hpet.HPET_TN_32BIT or mask > LOW:
            self.config &= ~hpet.HPET_TN_SETVAL

    def save(self, now: int) -> TimerState:
        """All of it."""
        remaining = -1 if self.due is None else max(self.due - now, 0)
        return TimerState(self.config, self.comparator, self.period, remaining)

    def load(self, state: TimerState, now: int, counter: int, *, counts: bool) -> None:
        """Take it, as a file that nobody believes has it; the counter is at `counter` now."""
        self.config = state.config & _WRITABLE
        self.comparator, self.period = state.comparator & ALL, state.period & ALL
        if state.remaining < 0 or not counts:
            self.due = None
        elif state.remaining:
            self.due = now + (state.remaining & ALL)
        else:  # it has matched, and the counter says when: the matches behind that one keep step with it
            self.due = now - (counter - self.comparator & self.mask)
