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
    RTC_CENTURY,
    RTC_REG_A,
    RTC_REG_B,
    RTC_REG_C,
    RTC_SET,
    Cmos,
    CmosState,
)
from hvkvm.devices.turn import Turn
from hvkvm.runtime.protocols import Deferrer, Delayer, TimerHandle

RTC_PIE, RTC_AIE, RTC_UIE = 0x40, 0x20, 0x10  # register B
RTC_IRQF, RTC_PF, RTC_AF, RTC_UF = 0x80, 0x40, 0x20, 0x10  # register C
RTC_ALARM_DONT_CARE = 0xC0
RTC_SECONDS_ALARM, RTC_MINUTES_ALARM, RTC_HOURS_ALARM = 0x01, 0x03, 0x05
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
        self._seen = 0.0  # up to when it was looked, by the guest's clock
        self._alarm = False  # whether an alarm was noted that `on_alarm` has not heard of
        self._due = False  # whether register C says that it interrupts, and the loop has yet to do so

    def read(self, offset: int, size: int) -> int:
        """As `Cmos.read`; reading register C clears it."""
        if offset and self._index == RTC_REG_C:
            with self._lock:
                flags, self._ram[RTC_REG_C] = self._ram[RTC_REG_C], 0
            return flags
        return super().read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """As `Cmos.write`; the loop looks anew at what is due."""
        index = self._index
        if not offset or (index > RTC_REG_B and index != RTC_CENTURY):
            super().write(offset, size, value)
            return
        with self._lock:
            self._note()  # what came by the registers as they were
            ahead = self._offset
        super().write(offset, size, value)
        with self._lock:
            if self._offset != ahead:
                self._seen = self._now  # it was set: no alarm lies between
            if index == RTC_REG_B and value & RTC_SET:
                self._ram[RTC_REG_B] &= ~RTC_UIE
            self._look_at_flags()
        self._turn.ask()

    def save(self) -> CmosState:
        """As `Cmos.save`; the time registers say up to when it was looked for what is due."""
        with self._lock:
            if self._ram[RTC_REG_B] & _ENABLES and not self._ram[RTC_REG_B] & RTC_SET:
                self._refresh(self._seen)
        return super().save()

    def load(self, state: CmosState) -> None:
        """As `Cmos.load`. An alarm that was due while nothing ran comes when the machine goes on.

        So does an interrupt that the guest has not looked at: see `Serial16550.load`.
        """
        super().load(state)
        with self._lock:
            self._seen = min(self._shown(), self._now)
            self._due = bool(self._ram[RTC_REG_C] & RTC_IRQF)
        self._turn.ask()

    def reset(self) -> None:
        """A reset of the machine switches interrupts off; the clock goes on."""
        with self._lock:
            self._ram[RTC_REG_B] &= ~_ENABLES
            self._ram[RTC_REG_C] = 0
            self._alarm = self._due = False
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
        """Interrupt if something has come that the guest wants to hear of, and set the timer to the next."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._running:
            return
        with self._lock:
            self._note()
            now, enabled = self._seen, self._ram[RTC_REG_B] & _ENABLES
            due, self._due = self._due, False
            alarm, self._alarm = self._alarm, False
            delays = []
            if enabled & RTC_PIE and (period := self._period):
                delays.append(period - now % period)
            if enabled & (RTC_AIE | RTC_UIE) and not self._ram[RTC_REG_B] & RTC_SET:
                delays.append(1 - now % 1)
        if alarm and self.on_alarm is not None:
            self.on_alarm()
        if due and not self.replaced:
            self._interrupt()
        if delays:
            self._timer = self._io.call_later(max(min(delays), LEAST_SECONDS), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._arm()

    # Under the lock, on whichever thread.

    def _note(self) -> None:
        """Put into register C what has come since the last look; nothing while no interrupt is on."""
        before, now = self._seen, self._now
        self._seen = now
        enabled = self._ram[RTC_REG_B] & _ENABLES
        if not enabled:
            return
        flags = 0
        if (period := self._period) and now // period != before // period:
            flags |= RTC_PF
        first, last = int(before // 1) + 1, int(now // 1)
        if first != last + 1 and not self._ram[RTC_REG_B] & RTC_SET:
            flags |= RTC_UF
            # The loop may be seconds late. A host's clock that was set back counts as one second.
            due = self._next_alarm(min(first, last))
            if due is not None and due <= last:
                flags |= RTC_AF
        if flags & ~self._ram[RTC_REG_C] & enabled & RTC_AIE:
            self._alarm = True
        self._ram[RTC_REG_C] |= flags
        self._look_at_flags()

    def _look_at_flags(self) -> None:
        """Say in register C that it interrupts, if it has what the guest wants to hear of.

        At once, not with the interrupt: Linux reads C right behind what it writes into B.
        """
        flags = self._ram[RTC_REG_C]
        if flags & self._ram[RTC_REG_B] & _ENABLES and not flags & RTC_IRQF:
            self._ram[RTC_REG_C] = flags | RTC_IRQF
            self._due = True

    def _next_alarm(self, second: int) -> int | None:
        """The first second, `second` or later, of which each alarm register is, or is not to be looked at.

        Seconds since 1970 by the guest's clock; None where there is none.
        """
        seconds = self._matching(RTC_SECONDS_ALARM, 60, self._encode)
        minutes = self._matching(RTC_MINUTES_ALARM, 60, self._encode)
        hours = self._matching(RTC_HOURS_ALARM, 24, self._encode_hour)
        today = second - second % 86400
        for hour in (day + n * 3600 for day in (today, today + 86400) for n in hours):
            if hour + 3600 > second:
                for minute in (hour + n * 60 for n in minutes):
                    if minute + 60 > second:
                        for found in (minute + n for n in seconds):
                            if found >= second:
                                return found
        return None

    def _matching(self, register: int, count: int, encode: Callable[[int], int]) -> list[int]:
        byte = self._ram[register]
        return [n for n in range(count) if byte >= RTC_ALARM_DONT_CARE or byte == encode(n)]
