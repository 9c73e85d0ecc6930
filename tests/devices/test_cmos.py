"""The RTC: what Linux's mc146818_get_time reads, every format, setting the clock."""

from __future__ import annotations

import calendar
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.devices.port.bus import PortBus
from hvkvm.devices.port.cmos import Cmos, _days_from_civil

B_24H, B_BINARY, B_SET = 0x02, 0x04, 0x80
NEW_YEAR = calendar.timegm((2026, 1, 2, 15, 4, 5))


class Rtc:
    def __init__(self, now: float = NEW_YEAR) -> None:
        self.now = now
        self.bus = PortBus()
        self.cmos = Cmos(lambda: self.now)
        self.cmos.attach(self.bus)

    def r(self, register: int) -> int:
        self.bus.write(0x70, 1, register | 0x80)
        return self.bus.read(0x71, 1)

    def w(self, register: int, value: int) -> None:
        self.bus.write(0x70, 1, register)
        self.bus.write(0x71, 1, value)

    def date(self) -> list[int]:
        return [self.r(i) for i in (0x32, 0x09, 0x08, 0x07, 0x04, 0x02, 0x00)]


def test_bcd_24_hours_after_power_on():
    rtc = Rtc()
    assert rtc.date() == [0x20, 0x26, 0x01, 0x02, 0x15, 0x04, 0x05]
    assert rtc.r(0x06) == 6, "a Friday; Sunday is 1"
    assert rtc.r(0x0B) == B_24H
    assert rtc.r(0x0D) == 0x80


def test_binary():
    rtc = Rtc()
    rtc.w(0x0B, B_24H | B_BINARY)
    assert rtc.date() == [20, 26, 1, 2, 15, 4, 5]


@pytest.mark.parametrize(
    ("hour", "shown"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)]
)
def test_twelve_hours(hour, shown):
    rtc = Rtc(calendar.timegm((2026, 1, 2, hour, 0, 0)))
    rtc.w(0x0B, 0)
    assert rtc.r(0x04) == shown


def test_update_in_progress_shows_just_before_the_second_and_ends():
    rtc = Rtc(NEW_YEAR + 0.5)
    assert not rtc.r(0x0A) & 0x80
    rtc.now = NEW_YEAR + 0.9999
    assert rtc.r(0x0A) & 0x80
    rtc.now = NEW_YEAR + 1.0
    assert not rtc.r(0x0A) & 0x80


def test_set_freezes_the_clock_and_takes_the_new_time():
    rtc = Rtc()
    rtc.w(0x0B, B_24H | B_SET)
    rtc.now += 100
    assert rtc.r(0x00) == 0x05
    for register, value in (
        (0x32, 0x19),
        (0x09, 0x99),
        (0x08, 0x12),
        (0x07, 0x31),
        (0x04, 0x23),
        (0x02, 0x59),
        (0, 0x58),
    ):
        rtc.w(register, value)
    assert not rtc.r(0x0A) & 0x80
    rtc.w(0x0B, B_24H)
    rtc.now += 2
    assert rtc.date() == [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00]


def test_a_register_may_be_set_while_the_clock_runs():
    rtc = Rtc()
    rtc.w(0x04, 0x07)
    rtc.now += 1
    assert rtc.date() == [0x20, 0x26, 0x01, 0x02, 0x07, 0x04, 0x06]


def test_the_other_bytes_are_memory_and_index_wraps():
    rtc = Rtc()
    rtc.w(0x40, 0x5A)
    assert rtc.r(0x40) == 0x5A
    assert rtc.r(0xC0) == 0x5A
    assert rtc.bus.read(0x70, 1) == 0xFF


def test_status_registers_c_and_d_are_read_only():
    rtc = Rtc()
    rtc.w(0x0C, 0xFF)
    rtc.w(0x0D, 0)
    assert (rtc.r(0x0C), rtc.r(0x0D)) == (0, 0x80)


@given(st.integers(0, 4102444800), st.sampled_from((0, B_24H, B_BINARY, B_24H | B_BINARY)))
def test_what_is_read_can_be_set_and_read_again(now, mode):
    source, target = Rtc(now), Rtc(0)
    source.w(0x0B, mode)
    target.w(0x0B, mode | B_SET)
    registers = (0x32, 0x09, 0x08, 0x07, 0x04, 0x02, 0x00)
    for register in registers:
        target.w(register, source.r(register))
    target.w(0x0B, mode)
    assert target.date() == source.date()


@given(st.integers(-(10**9), 10**10))
def test_days_from_civil_agrees_with_the_calendar(now):
    date = time.gmtime(now)
    assert _days_from_civil(date.tm_year, date.tm_mon, date.tm_mday) * 86400 == now - now % 86400


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0x70, 0x71), st.sampled_from((1, 2, 4)), st.integers(0)))
)
def test_no_sequence_raises(accesses):
    bus, cmos = PortBus(), Cmos()
    cmos.attach(bus)
    for is_write, port, size, value in accesses:
        if is_write:
            bus.write(port, size, value & (1 << 8 * size) - 1)
        else:
            assert 0 <= bus.read(port, size) < 1 << 8 * size
    Cmos().load(cmos.save())


def test_the_furthest_clock_that_a_guest_can_set_is_saved_and_loaded():
    rtc = Rtc()
    rtc.w(0x0B, B_24H | B_BINARY | B_SET)
    for register in (0x32, 0x09, 0x08, 0x07, 0x04, 0x02, 0x00):
        rtc.w(register, 255)
    rtc.w(0x0B, B_24H | B_BINARY)
    again = Cmos()
    again.load(rtc.cmos.save())
    assert again.save() == rtc.cmos.save()
