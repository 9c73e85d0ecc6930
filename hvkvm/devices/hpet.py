"""The HPET: a counter of 100 MHz and three comparators, for machines that are asked to have one.

It can take the place of the PIT (timer 0) and of the RTC's interrupt (timer 1), which is how Linux and
others use it; else a timer goes to one of four pins of the IOAPIC that the guest chooses. No MSIs.

vCPU threads read and write under `_lock`; the I/O loop sends what is due, by one timer for all of them, at
least LEAST_SECONDS apart. A periodic timer whose ticks come faster has them merged, as on a PC that is
busy. Source: IA-PC HPET specification 1.0a.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from hvkvm.abi import hpet
from hvkvm.abi.board import PIT_IRQ, RTC_IRQ
from hvkvm.devices.hpet_timer import ALL, Comparator, HpetState, TimerState
from hvkvm.devices.turn import Turn
from hvkvm.runtime.protocols import Deferrer, Delayer, TimerHandle

LEAST_SECONDS = 0.0001
MOST_SECONDS = 3600.0
"""After that long the loop looks again; a guest may set a comparator to a time in thousands of years."""
_IDENTITY = hpet.CAPABILITIES | hpet.PERIOD_FS << hpet.HPET_PERIOD_SHIFT
_CONFIG_WRITABLE = hpet.HPET_CFG_ENABLE | hpet.HPET_CFG_LEGACY
_LEGACY_PINS = (PIT_IRQ, RTC_IRQ)
"""Of timers 0 and 1 while they take the PIT's and the RTC's place."""


class Loop(Deferrer, Delayer, Protocol):
    """What it needs of the I/O loop."""


class Hpet:
    """An MMIO device. `set_line(gsi, level)` drives a pin; `on_legacy(on)` says who has IRQ 0 and 8."""

    def __init__(
        self,
        io: Loop,
        set_line: Callable[[int, bool], object],
        on_legacy: Callable[[bool], object],
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._io = io
        self._set_line = set_line
        self._on_legacy = on_legacy
        self._clock = clock
        self._lock = threading.Lock()
        self._config = 0
        self._status = 0
        self._offset = 0  # counter less host ticks while it counts, else the counter itself
        self._timers = [Comparator() for _ in range(hpet.TIMERS)]
        self._held: set[int] = set()  # pins that a level keeps up
        self._turn = Turn(io, self._look)
        # The loop's own.
        self._handle: TimerHandle | None = None
        self._running = False
        self.interrupts = [0] * hpet.TIMERS
        """Sent so far, of each timer."""

    # The guest.

    def read(self, offset: int, size: int) -> int:
        """A register or part of one; zeros between them."""
        with self._lock:
            return self._register(offset & ~7) >> 8 * (offset & 7)

    def _register(self, at: int) -> int:
        if at == hpet.HPET_ID:
            return _IDENTITY
        if at == hpet.HPET_CFG:
            return self._config
        if at == hpet.HPET_STATUS:
            return self._status
        if at == hpet.HPET_COUNTER:
            return self._counter(self._now)
        number, register = divmod(at - hpet.HPET_T0, hpet.HPET_TN_SIZE)
        if not 0 <= number < hpet.TIMERS or register > hpet.HPET_TN_CMP:
            return 0
        timer = self._timers[number]
        return timer.after(self._now)[0] & timer.mask if register else timer.register

    def write(self, offset: int, size: int, value: int) -> None:
        """By aligned words of 4 or 8 bytes, as the specification wants it; others change nothing."""
        if size not in (4, 8) or offset % size:
            return
        at, shift = offset & ~7, 8 * (offset & 7)
        mask = (1 << 8 * size) - 1 << shift
        with self._lock:
            now = self._now
            self._settle(now)
            self._change(at, value << shift & mask, mask, now)
            self._drive()
        self._turn.ask()

    def _change(self, at: int, value: int, mask: int, now: int) -> None:
        if at == hpet.HPET_CFG:
            self._configure(self._config & ~mask | value & _CONFIG_WRITABLE, now)
        elif at == hpet.HPET_STATUS:
            self._status &= ~value
        elif at == hpet.HPET_COUNTER:
            if not self._counts:  # else undefined
                self._offset = self._offset & ~mask & ALL | value
        else:
            number, register = divmod(at - hpet.HPET_T0, hpet.HPET_TN_SIZE)
            if 0 <= number < hpet.TIMERS and register <= hpet.HPET_TN_CMP:
                timer = self._timers[number]
                (timer.compare if register else timer.configure)(value, mask)
                self._aim(timer, now)

    # Under the lock.

    @property
    def _now(self) -> int:
        return self._clock() // hpet.TICK_NS

    @property
    def _counts(self) -> bool:
        return bool(self._config & hpet.HPET_CFG_ENABLE)

    def _counter(self, now: int) -> int:
        return (self._offset + (now if self._counts else 0)) & ALL

    def _configure(self, config: int, now: int) -> None:
        counter, changed = self._counter(now), self._config ^ config
        self._config = config
        if changed & hpet.HPET_CFG_LEGACY:
            self._on_legacy(bool(config & hpet.HPET_CFG_LEGACY))
        if changed & hpet.HPET_CFG_ENABLE:
            self._offset = counter - (now if self._counts else 0)
            for timer in self._timers:
                self._aim(timer, now)

    def _aim(self, timer: Comparator, now: int) -> None:
        """Say when it matches next."""
        wait = (timer.comparator - self._counter(now)) & timer.mask
        timer.due = now + wait if self._counts else None

    def _settle(self, now: int) -> None:
        """Send what is due: also before a write, which may change what a match would have done."""
        for number, timer in enumerate(self._timers):
            if timer.due is None or timer.due > now:
                continue
            timer.comparator, timer.due = timer.after(now)
            pin = self._pin(number)
            if timer.level:
                self._status |= 1 << number
            elif pin is not None and pin not in self._held:
                self._set_line(pin, True)
                self._set_line(pin, False)
            self.interrupts[number] += pin is not None

    def _pin(self, number: int) -> int | None:
        """Where a timer's interrupt goes; None: nowhere."""
        timer = self._timers[number]
        if not timer.enabled:
            return None
        if self._config & hpet.HPET_CFG_LEGACY and number < len(_LEGACY_PINS):
            return _LEGACY_PINS[number]
        return timer.pin

    def _drive(self) -> None:
        """Have each pin as the levels that lead to it say."""
        wanted = set()
        for number, timer in enumerate(self._timers):
            pin = self._pin(number)
            if pin is not None and timer.level and self._status >> number & 1:
                wanted.add(pin)
        for pin in self._held ^ wanted:
            self._set_line(pin, pin in wanted)
        self._held = wanted

    # The loop.

    def _look(self) -> None:
        """Send what is due, and come again when the next one is."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        with self._lock:
            if not self._running:
                return
            now = self._now
            self._settle(now)
            self._drive()
            dues = [one.due for one in self._timers if one.due is not None and one.enabled]
        if dues:
            delay = (min(dues) - now) * hpet.TICK_NS / 1e9
            self._handle = self._io.call_later(min(max(delay, LEAST_SECONDS), MOST_SECONDS), self._look)

    # The machine.

    def start(self) -> None:
        """Interrupts come. The loop, or before it runs."""
        self._running = True
        self._turn.ask()

    def stop(self) -> None:
        """None comes, though the counter goes on. The loop."""
        self._running = False
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def reset(self) -> None:
        """Power-on state: it neither counts nor interrupts, and the PIT has its place. Only while stopped."""
        self.load(HpetState(0, 0, 0, (TimerState(0, ALL, 0, -1),) * hpet.TIMERS))

    def save(self) -> HpetState:
        """All that the guest could tell apart. Only while stopped."""
        with self._lock:
            now = self._now
            timers = tuple(one.save(now) for one in self._timers)
            return HpetState(self._config, self._status, self._counter(now), timers)

    def load(self, state: HpetState) -> None:
        """Take it; the counter goes on from where it was. ValueError for another number of timers."""
        if len(state.timers) != hpet.TIMERS:
            raise ValueError("its HPET has another number of timers")
        with self._lock:
            now = self._now
            self._config = state.config & _CONFIG_WRITABLE
            self._status = state.status & (1 << hpet.TIMERS) - 1
            self._offset = (state.counter & ALL) - (now if self._counts else 0)
            for timer, given in zip(self._timers, state.timers, strict=True):
                timer.load(given, now, self._counter(now), counts=self._counts)
            self._on_legacy(bool(self._config & hpet.HPET_CFG_LEGACY))
            self._drive()

    def inspect(self) -> dict[str, object]:
        """Whether it counts, whose place it has, and what each timer has sent."""
        return {
            "counts": self._counts,
            "legacy": bool(self._config & hpet.HPET_CFG_LEGACY),
            "interrupts": list(self.interrupts),
        }
