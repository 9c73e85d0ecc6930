"""CMOS: the time of day behind ports 0x70 and 0x71, and the memory around it.

Linux reads the wall clock here when it boots (mach_get_cmos_time) and retries
for up to a second where nothing answers. Modelled after the Motorola MC146818:
BCD or binary, 12 or 24 hours, the update-in-progress bit, setting the clock
with register B's SET bit. No interrupts: most machines' ACPI tables offer guests no RTC
device to expect them from; `rtc.Rtc` has them. Always UTC. vCPU threads, under a lock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from hvkvm.abi.board import CMOS_PORT, CMOS_SIZE, RAM_LOW_LIMIT
from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from hvkvm.devices.port.bus import PortBus

RTC_SECONDS, RTC_MINUTES, RTC_HOURS = 0x00, 0x02, 0x04
RTC_DAY_OF_WEEK, RTC_DAY_OF_MONTH, RTC_MONTH, RTC_YEAR = 0x06, 0x07, 0x08, 0x09
RTC_REG_A, RTC_REG_B, RTC_REG_C, RTC_REG_D = 0x0A, 0x0B, 0x0C, 0x0D
RTC_CENTURY = 0x32

RTC_UIP = 0x80  # register A
RTC_SET = 0x80  # register B
RTC_DM_BINARY = 0x04
RTC_24H = 0x02
RTC_VRT = 0x80  # register D: the battery is good

_REG_A_RESET = 0x26  # 32.768 kHz, 1024 Hz
_UIP_SECONDS = 244e-6  # the update's announcement before each full second
# How much RAM there is: in KiB, and the last two in 64 KiB.
_CMOS_BASE_MEMORY = 0x15
_CMOS_EXTENDED_MEMORY = 0x17
_CMOS_EXTENDED_MEMORY_AGAIN = 0x30
_CMOS_MEMORY_ABOVE_16M = 0x34
_CMOS_MEMORY_ABOVE_4G = 0x5B
_TIME_REGISTERS = frozenset(
    (RTC_SECONDS, RTC_MINUTES, RTC_HOURS, RTC_DAY_OF_WEEK, RTC_DAY_OF_MONTH, RTC_MONTH, RTC_YEAR, RTC_CENTURY)
)
_PM = 0x80
_MOST_OFFSET = 30_000 * 366 * 86400.0
"""Seconds: more than the registers can name (the year 25,755), and few enough for every calendar function."""


def _days_from_civil(year: int, month: int, day: int) -> int:
    """Days from 1970-01-01 in the proleptic Gregorian calendar, for any numbers at all."""
    year += (month - 1) // 12
    month = (month - 1) % 12 + 1
    before_march = month <= 2
    y = year - before_march
    day_of_year = (153 * (month + (9 if before_march else -3)) + 2) // 5 + day - 1
    return 365 * y + y // 4 - y // 100 + y // 400 + day_of_year - 719468


class CmosState(NamedTuple):
    """The memory with its registers, which of them is chosen, and how the guest has set the clock."""

    chosen: int
    ram: bytes
    offset: float
    """Seconds that the guest's clock is ahead of the host's."""


class Cmos:
    """The two ports. `clock` gives seconds since 1970 in UTC."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._index = 0
        self._ram = bytearray(128)
        self._ram[RTC_REG_A] = _REG_A_RESET
        self._ram[RTC_REG_B] = RTC_24H
        self._ram[RTC_REG_D] = RTC_VRT
        self._offset = 0.0  # what the guest has set its clock to, ahead of ours

    def tell_memory(self, size: int) -> None:
        """Say how much RAM there is where a PC's BIOS keeps that, and U-Boot looks. Before the guest runs."""
        low = min(size, RAM_LOW_LIMIT)
        put = self._ram
        for at, value, count in (
            (_CMOS_BASE_MEMORY, min(size, 640 << 10) >> 10, 2),
            (_CMOS_EXTENDED_MEMORY, min(max(low - (1 << 20), 0) >> 10, 0xFFFF), 2),
            (_CMOS_EXTENDED_MEMORY_AGAIN, min(max(low - (1 << 20), 0) >> 10, 0xFFFF), 2),
            (_CMOS_MEMORY_ABOVE_16M, max(low - (16 << 20), 0) >> 16, 2),
            (_CMOS_MEMORY_ABOVE_4G, size - low >> 16, 3),
        ):
            put[at : at + count] = value.to_bytes(count, "little")

    def attach(self, bus: PortBus, port: int = CMOS_PORT) -> None:
        """Claim index and data port; ConfigError when one is taken."""
        bus.add(port, CMOS_SIZE, self, width=1)

    def save(self) -> CmosState:
        """What a battery keeps, and the index. The clock goes on with the host's meanwhile."""
        with self._lock:
            return CmosState(self._index, bytes(self._ram), self._offset)

    def load(self, state: CmosState) -> None:
        """Put it back. ValueError for what no CMOS of ours can hold."""
        if len(state.ram) != len(self._ram) or not abs(state.offset) <= _MOST_OFFSET:
            raise ValueError("its memory or its clock cannot be")
        with self._lock:
            self._index = state.chosen & 0x7F
            self._ram[:] = state.ram
            self._offset = state.offset

    def read(self, offset: int, size: int) -> int:
        """A register's value from the data port; the index port reads all ones, as on a PC."""
        if offset == 0:
            return 0xFF
        with self._lock:
            index = self._index
            if index in _TIME_REGISTERS and not self._ram[RTC_REG_B] & RTC_SET:
                self._refresh()
            value = self._ram[index]
            if index == RTC_REG_A and not self._ram[RTC_REG_B] & RTC_SET and self._updating():
                value |= RTC_UIP
            return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Choose a register (bit 7, the NMI mask, is ignored) or write the chosen one."""
        if offset == 0:
            self._index = value & 0x7F
            return
        with self._lock:
            index = self._index
            if index in (RTC_REG_C, RTC_REG_D):
                return
            setting = self._ram[RTC_REG_B] & RTC_SET
            if index in _TIME_REGISTERS:
                if not setting:
                    self._refresh()
                self._ram[index] = value
                if not setting:
                    self._set_clock()
            elif index == RTC_REG_A:
                self._ram[index] = value & ~RTC_UIP
            elif index == RTC_REG_B:
                if value & RTC_SET and not setting:
                    self._refresh()
                self._ram[index] = value
                if setting and not value & RTC_SET:
                    self._set_clock()
            else:
                self._ram[index] = value

    # --- the clock; under the lock ---------------------------------------------------------------

    def _updating(self) -> bool:
        return (self._clock() + self._offset) % 1.0 >= 1.0 - _UIP_SECONDS

    def _refresh(self, at: float | None = None) -> None:
        """Bring the time registers up to now, or have them say `at`."""
        now = time.gmtime(self._clock() + self._offset if at is None else at)
        put = self._encode
        self._ram[RTC_SECONDS] = put(min(now.tm_sec, 59))
        self._ram[RTC_MINUTES] = put(now.tm_min)
        self._ram[RTC_HOURS] = self._encode_hour(now.tm_hour)
        self._ram[RTC_DAY_OF_WEEK] = put((now.tm_wday + 1) % 7 + 1)  # Sunday is 1
        self._ram[RTC_DAY_OF_MONTH] = put(now.tm_mday)
        self._ram[RTC_MONTH] = put(now.tm_mon)
        self._ram[RTC_YEAR] = put(now.tm_year % 100)
        self._ram[RTC_CENTURY] = put(now.tm_year // 100 % 100)

    def _set_clock(self) -> None:
        """Take the time registers as now."""
        self._offset = self._shown() - self._clock()

    def _shown(self) -> int:
        """The time registers in seconds since 1970. Senseless numbers carry over (32 January: 1 February)."""
        ram, get = self._ram, self._decode
        hour = get(ram[RTC_HOURS])
        if not ram[RTC_REG_B] & RTC_24H:
            hour = get(ram[RTC_HOURS] & ~_PM) % 12 + (12 if ram[RTC_HOURS] & _PM else 0)
        year = get(ram[RTC_CENTURY]) * 100 + get(ram[RTC_YEAR])
        days = _days_from_civil(year, get(ram[RTC_MONTH]), get(ram[RTC_DAY_OF_MONTH]))
        seconds = (hour * 60 + get(ram[RTC_MINUTES])) * 60 + get(ram[RTC_SECONDS])
        return days * 86400 + seconds

    def _encode(self, value: int) -> int:
        return value if self._ram[RTC_REG_B] & RTC_DM_BINARY else value // 10 << 4 | value % 10

    def _encode_hour(self, hour: int) -> int:
        if self._ram[RTC_REG_B] & RTC_24H:
            return self._encode(hour)
        return self._encode(hour % 12 or 12) | (_PM if hour >= 12 else 0)

    def _decode(self, value: int) -> int:
        return value if self._ram[RTC_REG_B] & RTC_DM_BINARY else (value >> 4) * 10 + (value & 15)
