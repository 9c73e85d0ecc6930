"""Reference time, the reference TSC page that lets the guest read it without an exit, and VPs' run time.

Reference time is CLOCK_MONOTONIC_RAW: like the TSC, and unlike CLOCK_MONOTONIC,
nobody slews it, so the counter (an exit) and the page (the guest's own TSC)
stay together. It goes on while the machine is paused, as the TSC does.

The VP that writes HV_X64_MSR_REFERENCE_TSC calls `TscPage.write` on its thread.
"""

from __future__ import annotations

import threading
from pathlib import Path
from time import CLOCK_MONOTONIC_RAW, clock_gettime_ns, thread_time_ns
from typing import Protocol

from hvkvm.abi.tlfs import (
    HV_CLOCK_HZ,
    HV_X64_MSR_TSC_REFERENCE_ADDRESS_MASK,
    HV_X64_MSR_TSC_REFERENCE_ENABLE,
)
from hvkvm.hyperv.synic.pages import Overlay
from hvkvm.memory.atomics import store_4

MSR_IA32_TSC = 0x10
_CLOCKSOURCE = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
_TRIES = 5
"""Readings of both clocks for a page, of which the closest counts."""
_MOST_TRIES = 50
_CLOSE = 20
"""100 ns units between two readings of our clock with one of the TSC between them; on a host where none is so
close, more are tried."""
_SEQUENCE_LIMIT = 0xFFFFFFFE
"""0 and 0xFFFFFFFF both mean to some guest that the page is invalid."""


class TscReader(Protocol):
    """What is needed of a Vcpu, on its own thread."""

    def msrs(self, indices: tuple[int, ...]) -> dict[int, int]: ...

    def tsc_khz(self) -> int: ...


class ReferenceClock:
    """Reference time in 100 ns units since this object was made. Any thread."""

    __slots__ = ("_start",)

    def __init__(self) -> None:
        self._start = clock_gettime_ns(CLOCK_MONOTONIC_RAW)

    def set(self, now: int) -> None:
        """Go on from `now`, 100 ns units."""
        self._start = clock_gettime_ns(CLOCK_MONOTONIC_RAW) - 100 * now

    def now(self) -> int:
        return (clock_gettime_ns(CLOCK_MONOTONIC_RAW) - self._start) // 100


class RunTime:
    """HV_X64_MSR_VP_RUNTIME of a VP: CPU time of its thread in 100 ns units, which begins anew at a reset.

    `last` is what the guest has read: never less is read in a machine that goes on from it.
    """

    __slots__ = ("_before", "last")

    def __init__(self) -> None:
        self._before: int | None = 0
        """To be added to the thread's time; None from a reset until it is first read."""
        self.last = 0

    def read(self) -> int:
        """The VP's thread."""
        spent = thread_time_ns() // 100
        if self._before is None:
            self._before = -spent
        self.last = self._before + spent
        return self.last

    def reset(self) -> None:
        """The VP is outside KVM_RUN."""
        self._before, self.last = None, 0

    def load(self, last: int) -> None:
        """Go on from what the guest read last. The VP is outside KVM_RUN."""
        self._before = self.last = last


def host_counts_by_tsc() -> bool:
    """Whether the host's own clock is the TSC; else a page computed from its rate would drift away."""
    try:
        return _CLOCKSOURCE.read_text().strip() == "tsc"
    except OSError:
        return False


def _gpa(value: int) -> int | None:
    return value & HV_X64_MSR_TSC_REFERENCE_ADDRESS_MASK if value & HV_X64_MSR_TSC_REFERENCE_ENABLE else None


class TscPage:
    """HV_X64_MSR_REFERENCE_TSC and its page. Not `usable`, it stays invalid and guests use the counter."""

    def __init__(self, clock: ReferenceClock, page: Overlay, *, usable: bool) -> None:
        self._clock = clock
        self._page = page
        self._usable = usable
        self._lock = threading.Lock()
        self._sequence = 0
        self.value = 0
        self.uncertain = 0
        """100 ns units by which the page may be wrong: how closely both clocks could be read together."""

    def write(self, value: int, vcpu: TscReader) -> bool:
        """The guest writes the MSR on `vcpu`; False when the page cannot lie there."""
        with self._lock:
            on = value & HV_X64_MSR_TSC_REFERENCE_ENABLE
            if not self._page.place(_gpa(value)):
                self._page.place(_gpa(self.value))
                return False
            self.value = value
            if on and self._usable:
                self._fill(vcpu)
            return True

    def _fill(self, vcpu: TscReader) -> None:
        """Sequence 0 while the rest changes, so that no guest computes with half of it."""
        scale, offset = self.scale_and_offset(vcpu)
        self._sequence = self._sequence % _SEQUENCE_LIMIT + 1
        store_4(self._page.hva, 0)
        self._page.view[8:16] = scale.to_bytes(8, "little")
        self._page.view[16:24] = (offset & (1 << 64) - 1).to_bytes(8, "little")
        store_4(self._page.hva, self._sequence)

    def scale_and_offset(self, vcpu: TscReader) -> tuple[int, int]:
        """reference time = ((tsc * scale) >> 64) + offset, by the best of some readings of both clocks.

        A busy host takes the processor away between two readings; `uncertain` says how far apart they were.
        """
        scale = (HV_CLOCK_HZ << 64) // max(vcpu.tsc_khz() * 1000, HV_CLOCK_HZ + 1)
        readings: list[tuple[int, int, int]] = []
        while len(readings) < _TRIES or (len(readings) < _MOST_TRIES and min(readings)[0] > _CLOSE):
            before = self._clock.now()
            tsc = vcpu.msrs((MSR_IA32_TSC,))[MSR_IA32_TSC]
            after = self._clock.now()
            readings.append((after - before, (before + after) // 2, tsc))
        apart, now, tsc = min(readings)
        self.uncertain = apart // 2 + 1
        return scale, now - (tsc * scale >> 64)

    def load(self, value: int, vcpu: TscReader) -> None:
        """Put the page where `value` has it, filled anew: this host's clocks are not those it was made by.

        ValueError where it cannot lie there. The vCPU is paused, its TSC put back.
        """
        if not 0 <= value < 1 << 64 or not self.write(value, vcpu):
            raise ValueError(f"no reference TSC page can be where {value:#x} has it")

    def reset(self) -> None:
        """Off, and nothing left of its contents."""
        with self._lock:
            self._page.place(None)
            self._page.zero()
            self.value = 0
