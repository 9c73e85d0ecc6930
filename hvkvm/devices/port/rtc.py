"""The RTC as a device: CMOS with the MC146818's three interrupts, on machines whose ACPI tables name one.

Alarm, periodic and update-ended, by ISA IRQ 8, an edge for each time register C becomes worth reading. A
timer of the I/O loop runs while the guest has one of them on; else this costs nothing. A periodic interrupt
comes a thousand times a second at most: a faster one (up to 8192 Hz) has its ticks merged, as on a PC that
is busy. Source: the data sheet's registers A to C, Linux mc146818rtc.h.

vCPU threads read and write under the lock of `Cmos`; the loop owns the timer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from hvkvm.devices.port.cmos import (
    RTC_HOURS,
    RTC_MINUTES,
    RTC_REG_A,
    RTC_REG_B,
    RTC_REG_C,
    RTC_SECONDS,
    RTC_SET,
    Cmos,
    CmosState,
)
from hvkvm.devices.turn import Turn
from hvkvm.runtime.protocols import Deferrer, Delayer, TimerHandle

RTC_PIE, RTC_AIE, RTC_UIE = 0x40, 0x20, 0x10  # register B
RTC_IRQF, RTC_PF, RTC_AF, RTC_UF = 0x80, 0x40, 0x20, 0x10  # register C
RTC_ALARM_DONT_CARE = 0xC0
_ALARMS = ((RTC_SECONDS, 0x01), (RTC_MINUTES, 0x03), (RTC_HOURS, 0x05))
"""Each time register with its alarm."""
_ENABLES = RTC_PIE | RTC_AIE | RTC_UIE
_CRYSTAL = 32768
LEAST_SECONDS = 0.001


class Loop(Deferrer, Delayer, Protocol):
    """What it needs of the I/O loop."""


class Rtc(Cmos):
    """`interrupt()` raises IRQ 8 once. `clock` gives seconds since 1970 in UTC."""

    def __init__(
        self, io: Loop, interrupt: Callable[[], object], clock: Callable[[], float] = time.time
    ) -> None:
        super().__init__(clock)
        self._io = io
        self._interrupt = interrupt
        self._timer: TimerHandle | None = None
        self._turn = Turn(io, self._arm)
        self._running = False
        self.on_alarm: Callable[[], object] | None = None
        """Called when an alarm is due that the guest has on. The loop."""
        self.replaced = False
        """Whether an HPET has IRQ 8 now: then alarms and the like show in register C only."""
        self._seen = 0.0  # up to when the loop has looked, by the guest's clock

    def read(self, offset: int, size: int) -> int:
        """As `Cmos.read`; reading register C clears it."""
        if offset and self._index == RTC_REG_C:
            with self._lock:
                flags, self._ram[RTC_REG_C] = self._ram[RTC_REG_C], 0
            return flags
        return super().read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """As `Cmos.write`; the loop looks anew at what is due."""
        super().write(offset, size, value)
        if offset and self._index <= RTC_REG_B:
            if self._index == RTC_REG_B and value & RTC_SET:
                with self._lock:
                    self._ram[RTC_REG_B] &= ~RTC_UIE
            self._turn.ask()

    def load(self, state: CmosState) -> None:
        """As `Cmos.load`."""
        super().load(state)
        self._turn.ask()

    def reset(self) -> None:
        """A reset of the machine switches interrupts off; the clock goes on."""
        with self._lock:
            self._ram[RTC_REG_B] &= ~_ENABLES
            self._ram[RTC_REG_C] = 0
        self._turn.ask()

    def start(self) -> None:
        """The machine runs: interrupts come. The loop."""
        self._running = True
        self._arm()

    def stop(self) -> None:
        """The machine rests: none comes. The loop."""
        self._running = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # On the loop.

    @property
    def _now(self) -> float:
        return self._clock() + self._offset

    @property
    def _period(self) -> float:
        """Seconds between two periodic interrupts; 0: never."""
        rate = self._ram[RTC_REG_A] & 15
        if not rate:
            return 0.0
        return (1 << (rate - 1 if rate > 2 else rate + 6)) / _CRYSTAL

    def _arm(self) -> None:
        """Set the timer to what comes next of what the guest has on."""
        with self._lock:
            enabled = self._ram[RTC_REG_B] & _ENABLES
            now = self._seen = self._now
            delays = []
            if enabled & RTC_PIE and (period := self._period):
                delays.append(period - now % period)
            if enabled & (RTC_AIE | RTC_UIE) and not self._ram[RTC_REG_B] & RTC_SET:
                delays.append(1 - now % 1)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if delays and self._running:
            self._timer = self._io.call_later(max(min(delays), LEAST_SECONDS), self._tick)

    def _tick(self) -> None:
        """Note what has come since the last look, and interrupt if the guest wants to hear of it."""
        self._timer = None
        with self._lock:
            before, now = self._seen, self._now
            flags = 0
            if (period := self._period) and now // period != before // period:
                flags |= RTC_PF
            if int(now) != int(before) and not self._ram[RTC_REG_B] & RTC_SET:
                flags |= RTC_UF
                if self._alarm_is_due():
                    flags |= RTC_AF
            was = self._ram[RTC_REG_C]
            flags |= was
            if flags & self._ram[RTC_REG_B] & _ENABLES:
                flags |= RTC_IRQF
            self._ram[RTC_REG_C] = flags
            alarm = flags & ~was & RTC_AF and self._ram[RTC_REG_B] & RTC_AIE
        if alarm and self.on_alarm is not None:
            self.on_alarm()
        if flags & ~was & RTC_IRQF and not self.replaced:
            self._interrupt()
        self._arm()

    def _alarm_is_due(self) -> bool:
        """Whether each alarm register is what its time register is, or is not to be looked at."""
        self._refresh()
        return all(
            self._ram[alarm] >= RTC_ALARM_DONT_CARE or self._ram[alarm] == self._ram[now]
            for now, alarm in _ALARMS
        )
