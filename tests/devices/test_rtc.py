"""The RTC's interrupts: alarm, periodic, update ended; and what a guest, a reset or a rest does to them."""

from __future__ import annotations

import calendar
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.devices.port.rtc import LEAST_SECONDS, RTC_AF, RTC_AIE, RTC_IRQF, RTC_PF, RTC_PIE, RTC_UF, RTC_UIE
from hvkvm.devices.port.rtc import Rtc as Device

B_24H, B_BINARY, B_SET = 0x02, 0x04, 0x80
A, B, C = 0x0A, 0x0B, 0x0C
START = calendar.timegm((2026, 1, 2, 15, 4, 5)) + 0.25


class Timer:
    def __init__(self, world: World, at: float, fn: Callable[[], object]) -> None:
        self.at, self.fn, self._world = at, fn, world

    def cancel(self) -> None:
        if self in self._world.timers:
            self._world.timers.remove(self)


class World:
    """The device, a loop and a clock in a test's hands."""

    def __init__(self) -> None:
        self.now = START
        self.timers: list[Timer] = []
        self.interrupts = 0
        self.device = Device(self, self._interrupt, lambda: self.now)  # type: ignore[arg-type]
        self.device.start()

    def _interrupt(self) -> None:
        self.interrupts += 1

    def call_soon(self, fn: Callable[..., object], *args: Any, **_more: Any) -> None:
        fn(*args)

    def call_later(self, seconds: float, fn: Callable[..., object], *args: Any) -> Timer:
        timer = Timer(self, self.now + seconds, lambda: fn(*args))
        self.timers.append(timer)
        return timer

    def wait(self, seconds: float) -> None:
        """Let time go by; what is due comes when it is."""
        end = self.now + seconds
        while due := [one for one in self.timers if one.at <= end]:
            first = min(due, key=lambda one: one.at)
            self.timers.remove(first)
            self.now = max(self.now, first.at)
            first.fn()
        self.now = end

    def r(self, register: int) -> int:
        self.device.write(0, 1, register)
        return self.device.read(1, 1)

    def w(self, register: int, value: int) -> None:
        self.device.write(0, 1, register)
        self.device.write(1, 1, value)


def test_it_costs_nothing_while_no_interrupt_is_on() -> None:
    world = World()
    assert world.timers == []
    world.w(0, 5)
    assert world.timers == []
    assert world.r(C) == 0


def test_update_ended_comes_with_each_second() -> None:
    world = World()
    world.w(B, B_24H | RTC_UIE)
    world.wait(0.7)
    assert world.interrupts == 0
    world.wait(0.1)
    assert world.interrupts == 1
    world.wait(2)
    assert world.interrupts == 1, "an edge a time that register C is read"
    assert world.r(C) & (RTC_IRQF | RTC_UF) == RTC_IRQF | RTC_UF
    assert world.r(C) == 0
    world.wait(1)
    assert world.interrupts == 2


def test_periodic_at_its_rate() -> None:
    world = World()
    world.w(A, 0x2A)  # 64 Hz
    world.w(B, B_24H | RTC_PIE)
    seen = 0
    for _ in range(64):
        world.wait(1 / 64)
        seen += bool(world.r(C) & RTC_PF)
    assert seen == 64
    assert world.interrupts == 64


def test_a_fast_one_has_its_ticks_merged() -> None:
    world = World()
    world.w(A, 0x23)  # 8192 Hz
    world.w(B, B_24H | RTC_PIE)
    calls = 0
    while calls < 100:
        (timer,) = world.timers
        assert timer.at - world.now >= LEAST_SECONDS * 0.99
        world.wait(timer.at - world.now)
        world.r(C)
        calls += 1
    assert world.interrupts == 100


@pytest.mark.parametrize("mode", [B_24H, B_24H | B_BINARY, 0])
def test_an_alarm_at_a_time(mode: int) -> None:
    world = World()
    world.w(B, mode)
    hour, minute, second = (15, 4, 8) if mode & B_BINARY else (0x15, 0x04, 0x08)
    if not mode & B_24H:
        hour = 0x83  # 3 in the afternoon
    for register, value in ((1, second), (3, minute), (5, hour)):
        world.w(register, value)
    world.w(B, mode | RTC_AIE)
    world.wait(2.5)
    assert world.interrupts == 0
    world.wait(0.3)
    assert world.interrupts == 1
    assert world.r(C) & RTC_AF
    world.wait(3600)
    assert world.interrupts == 1, "it comes once a day"


def test_an_alarm_is_an_event_of_acpi_too_and_only_that_beside_an_hpet() -> None:
    world = World()
    alarms: list[float] = []
    world.device.on_alarm = lambda: alarms.append(world.now)
    world.device.replaced = True
    for register in (1, 3, 5):
        world.w(register, 0xFF)  # each second
    world.wait(3)
    assert alarms == [], "nobody has it on"
    world.w(B, B_24H | RTC_AIE)
    world.wait(1)
    assert (len(alarms), world.interrupts) == (1, 0)
    assert world.r(C) & (RTC_AF | RTC_IRQF) == RTC_AF | RTC_IRQF
    world.device.replaced = False
    world.wait(1)
    assert (len(alarms), world.interrupts) == (2, 1)


def test_an_alarm_that_does_not_care() -> None:
    world = World()
    for register, value in ((1, 0x30), (3, 0xC0), (5, 0xFF)):
        world.w(register, value)
    world.w(B, B_24H | RTC_AIE)
    seen = 0
    for _ in range(300):
        world.wait(1)
        seen += bool(world.r(C) & RTC_AF)
    assert seen == 5, "each minute"


def with_alarm(world: World, second: int) -> None:
    """On, at `second` of this minute; the world begins at 5.25 s."""
    for register, value in ((1, second), (3, 0x04), (5, 0x15)):
        world.w(register, value)
    world.w(B, B_24H | RTC_AIE)


def test_an_alarm_comes_though_the_loop_is_late() -> None:
    world = World()
    with_alarm(world, 0x08)
    world.now += 40  # a busy host, or one that slept
    world.wait(0)
    assert world.interrupts == 1
    assert world.r(C) & RTC_AF
    world.wait(3600)
    assert world.interrupts == 1


def test_an_alarm_of_a_machine_at_rest_comes_when_it_goes_on() -> None:
    world = World()
    with_alarm(world, 0x08)
    world.device.stop()
    world.now += 10
    assert world.interrupts == 0
    state = world.device.save()
    world.now += 10
    world.device.start()
    assert world.interrupts == 1
    other = World()
    other.device.stop()
    other.now += 3600
    other.device.load(state)
    other.device.start()
    assert other.interrupts == 1


def test_an_interrupt_that_nobody_has_looked_at_comes_again_in_a_restored_machine() -> None:
    """KVM may not have raised it yet when it was saved; register C would have kept all later ones back."""
    world = World()
    with_alarm(world, 0x08)
    world.wait(10)
    assert world.interrupts == 1
    world.device.stop()
    state = world.device.save()
    for looked in (False, True):
        other = World()
        other.device.stop()
        other.now = world.now
        other.device.load(state)
        if looked:
            assert other.r(C) & RTC_IRQF
            state = other.device.save()
            other.device.load(state)
        other.device.start()
        assert other.interrupts == (not looked)


@pytest.mark.parametrize("register", [1, A, B])
def test_a_write_between_the_alarm_and_the_tick_does_not_lose_it(register: int) -> None:
    world = World()
    with_alarm(world, 0x08)
    alarms: list[float] = []
    world.device.on_alarm = lambda: alarms.append(world.now)
    later: list[Callable[[], None]] = []
    world.call_soon = lambda fn, *args, **_more: later.append(lambda: fn(*args))  # type: ignore[method-assign]
    world.now += 2.76
    world.w(register, {1: 0x30, A: 0x2A, B: B_24H | RTC_AIE}[register])
    # Linux looks at once, before the loop has had a turn.
    assert world.r(C) & (RTC_AF | RTC_IRQF) == RTC_AF | RTC_IRQF
    for turn in later:
        turn()
    assert (world.interrupts, len(alarms)) == (1, 1)


def test_a_clock_that_is_set_beyond_the_alarm_does_not_ring() -> None:
    world = World()
    with_alarm(world, 0x08)
    for register, value in ((0, 0x30), (0x32, 0x21)):
        world.w(register, value)
        world.wait(1)
    world.w(B, B_24H | RTC_AIE | B_SET)
    world.w(4, 0x16)
    world.w(B, B_24H | RTC_AIE)
    world.wait(60)
    assert world.interrupts == 0


@given(
    st.integers(0, 86400 * 10),
    st.integers(0, 255),
    st.integers(0, 255),
    st.integers(0, 255),
    st.sampled_from((0, B_24H, B_BINARY, B_24H | B_BINARY)),
    st.integers(1, 3 * 86400),
)
def test_a_late_look_finds_what_looking_each_second_finds(
    start: int, second: int, minute: int, hour: int, mode: int, late: int
) -> None:
    world = World()
    world.now = start + 0.5
    for register, value in ((1, second), (3, minute), (5, hour)):
        world.w(register, value)
    world.w(B, mode)
    shown = []
    for at in (start + 1, start + late, start + late // 2, start - start % 60 + 59):
        world.now = at
        shown.append((at, tuple(world.r(register) for register in (0, 2, 4))))
    alarm = (second, minute, hour)
    for at, registers in shown:
        rings = all(one >= 0xC0 or one == now for one, now in zip(alarm, registers, strict=True))
        assert (world.device._next_alarm(at) == at) == rings
    due = world.device._next_alarm(start)
    if due is not None:
        world.now = due
        registers = tuple(world.r(register) for register in (0, 2, 4))
        assert all(one >= 0xC0 or one == now for one, now in zip(alarm, registers, strict=True))
        assert start <= due < start + 86400


def test_setting_the_clock_holds_updates_up() -> None:
    world = World()
    world.w(B, B_24H | RTC_UIE | B_SET)
    assert not world.r(B) & RTC_UIE
    world.wait(3)
    assert world.interrupts == 0


def test_a_machine_at_rest_has_none_and_goes_on() -> None:
    world = World()
    world.w(B, B_24H | RTC_UIE)
    world.device.stop()
    assert world.timers == []
    world.w(B, B_24H | RTC_UIE | RTC_PIE)
    assert world.timers == []
    state = world.device.save()
    other = World()
    other.device.stop()
    other.device.load(state)
    assert other.device.save() == state
    assert other.timers == []
    other.device.start()
    other.wait(1)
    assert other.interrupts == 1


def test_a_reset_switches_them_off_and_keeps_time() -> None:
    world = World()
    world.w(B, B_24H | RTC_UIE)
    world.wait(1)
    world.device.reset()
    assert world.r(C) == 0
    assert world.timers == []
    assert world.r(0) == 0x06


@given(
    st.lists(st.tuples(st.integers(0, 15), st.integers(0, 255), st.sampled_from((0, 0.3, 2))), max_size=40)
)
def test_no_writes_make_more_than_one_timer(steps: list[tuple[int, int, float]]) -> None:
    world = World()
    for register, value, seconds in steps:
        world.w(register, value)
        world.wait(seconds)
        world.r(register)
        assert len(world.timers) <= 1


@pytest.mark.parametrize(
    ("size", "kib_from_1m", "above_16m", "above_4g"),
    [(8 << 20, 7 << 10, 0, 0), (512 << 20, 0xFFFF, 496 << 4, 0), (6 << 30, 0xFFFF, 3056 << 4, 3 << 14)],
)
def test_it_says_how_much_memory_there_is(size: int, kib_from_1m: int, above_16m: int, above_4g: int) -> None:
    world = World()
    world.device.tell_memory(size)
    assert world.r(0x15) | world.r(0x16) << 8 == 640
    assert world.r(0x30) | world.r(0x31) << 8 == kib_from_1m
    assert world.r(0x34) | world.r(0x35) << 8 == above_16m
    assert world.r(0x5B) | world.r(0x5C) << 8 | world.r(0x5D) << 16 == above_4g
