"""The HPET: what it counts, when its comparators interrupt and where, and what no guest can do to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.abi import hpet
from hvkvm.devices.hpet import Hpet, HpetState
from hvkvm.devices.hpet_timer import PINS, TimerState

ENABLE, PERIODIC, LEVEL = hpet.HPET_TN_ENABLE, hpet.HPET_TN_PERIODIC, hpet.HPET_TN_LEVEL
SETVAL, BITS32 = hpet.HPET_TN_SETVAL, hpet.HPET_TN_32BIT
TO_PIN_20 = 20 << hpet.HPET_TN_ROUTE_SHIFT
MILLISECOND = 1_000_000 // hpet.TICK_NS


def config_of(timer: int) -> int:
    return hpet.HPET_T0 + hpet.HPET_TN_SIZE * timer


def comparator_of(timer: int) -> int:
    return config_of(timer) + hpet.HPET_TN_CMP


class Timer:
    def __init__(self, world: World, at: int, fn: Callable[[], object]) -> None:
        self.at, self.fn, self._world = at, fn, world

    def cancel(self) -> None:
        if self in self._world.timers:
            self._world.timers.remove(self)


class World:
    """The device, a loop and a clock in a test's hands."""

    def __init__(self) -> None:
        self.now = 12345
        self.timers: list[Timer] = []
        self.lines: dict[int, bool] = {}
        self.edges: list[int] = []
        self.legacy = False
        self.device = Hpet(self, self._line, self._on_legacy, lambda: self.now)  # type: ignore[arg-type]
        self.device.start()

    def _line(self, gsi: int, level: bool) -> None:
        if level and not self.lines.get(gsi):
            self.edges.append(gsi)
        self.lines[gsi] = level

    def _on_legacy(self, on: bool) -> None:
        self.legacy = on

    def call_soon(self, fn: Callable[..., object], *args: Any, **_more: Any) -> None:
        fn(*args)

    def call_later(self, seconds: float, fn: Callable[..., object], *args: Any) -> Timer:
        assert 0 < seconds <= 3600
        timer = Timer(self, self.now + int(seconds * 1e9), lambda: fn(*args))
        self.timers.append(timer)
        assert len(self.timers) == 1
        return timer

    def wait(self, ticks: int) -> None:
        """Let that many ticks of the counter go by; what is due comes when it is."""
        end = self.now + ticks * hpet.TICK_NS
        while due := [one for one in self.timers if one.at <= end]:
            self.timers.remove(due[0])
            self.now = max(self.now, due[0].at)
            due[0].fn()
        self.now = end

    def r(self, offset: int, size: int = 8) -> int:
        return self.device.read(offset, size) & (1 << 8 * size) - 1

    def w(self, offset: int, value: int, size: int = 8) -> None:
        self.device.write(offset, size, value)

    def count(self, *, legacy: bool = False) -> None:
        self.w(hpet.HPET_CFG, hpet.HPET_CFG_ENABLE | (hpet.HPET_CFG_LEGACY if legacy else 0))


def test_it_says_what_it_is() -> None:
    """As Linux's hpet_enable() and the ACPI table have it."""
    world = World()
    identity = world.r(hpet.HPET_ID)
    assert identity >> hpet.HPET_PERIOD_SHIFT == world.r(hpet.HPET_ID + 4, 4) == hpet.PERIOD_FS
    assert hpet.PERIOD_FS <= 100_000_000, "the longest that the specification allows"
    assert world.r(hpet.HPET_ID, 4) == hpet.CAPABILITIES
    assert (identity >> 8 & 0x1F) + 1 == hpet.TIMERS
    for timer in range(hpet.TIMERS):
        assert world.r(config_of(timer)) >> 32 == sum(1 << pin for pin in PINS)
    assert world.timers == []


def test_the_counter_counts_while_it_is_switched_on() -> None:
    world = World()
    world.wait(1000)
    assert world.r(hpet.HPET_COUNTER) == 0
    world.w(hpet.HPET_COUNTER, 0xFFFF_FFFF)
    world.count()
    world.wait(1000)
    assert world.r(hpet.HPET_COUNTER) == 0xFFFF_FFFF + 1000
    assert world.r(hpet.HPET_COUNTER + 4, 4) == 1
    world.w(hpet.HPET_COUNTER, 5)
    assert world.r(hpet.HPET_COUNTER) == 0xFFFF_FFFF + 1000, "it is written only while it stands"
    world.w(hpet.HPET_CFG, 0)
    world.wait(1000)
    assert world.r(hpet.HPET_COUNTER) == 0xFFFF_FFFF + 1000
    assert world.timers == []


def test_one_shot_on_a_pin_of_the_guests_choice() -> None:
    world = World()
    world.count()
    world.w(config_of(2), ENABLE | 22 << hpet.HPET_TN_ROUTE_SHIFT)
    world.w(comparator_of(2), world.r(hpet.HPET_COUNTER) + 3 * MILLISECOND)
    world.wait(3 * MILLISECOND - 1)
    assert world.edges == []
    world.wait(1)
    assert world.edges == [22]
    world.wait(1000 * MILLISECOND)
    assert (world.edges, world.lines) == ([22], {22: False})


def test_a_pin_that_is_none_is_not_taken() -> None:
    world = World()
    world.w(config_of(0), ENABLE | TO_PIN_20)
    world.w(config_of(0), ENABLE | 16 << hpet.HPET_TN_ROUTE_SHIFT)
    assert world.r(config_of(0)) & hpet.HPET_TN_ROUTE == TO_PIN_20
    world.count()
    world.w(config_of(1), ENABLE)  # routed nowhere
    world.w(comparator_of(1), world.r(hpet.HPET_COUNTER) + 10)
    world.wait(MILLISECOND)
    assert 0 not in world.edges


def test_in_place_of_pit_and_rtc() -> None:
    """Linux's periodic tick: SETVAL, then the first match, then the period."""
    world = World()
    world.count(legacy=True)
    assert world.legacy
    world.w(config_of(0), ENABLE | PERIODIC | SETVAL | BITS32, 4)
    world.w(comparator_of(0), world.r(hpet.HPET_COUNTER, 4) + 4 * MILLISECOND, 4)
    world.w(comparator_of(0), 4 * MILLISECOND, 4)
    assert not world.r(config_of(0)) & SETVAL
    world.w(config_of(1), ENABLE | BITS32, 4)
    world.w(comparator_of(1), world.r(hpet.HPET_COUNTER, 4) + 10 * MILLISECOND, 4)
    world.wait(41 * MILLISECOND)
    assert (world.edges.count(0), world.edges.count(8), len(world.edges)) == (10, 1, 11)
    world.w(hpet.HPET_CFG, hpet.HPET_CFG_ENABLE)
    assert not world.legacy
    world.wait(100 * MILLISECOND)
    assert len(world.edges) == 11, "without a pin of its own nothing comes"


def test_a_level_stays_until_its_status_is_cleared() -> None:
    world = World()
    world.count()
    world.w(config_of(0), ENABLE | LEVEL | TO_PIN_20)
    world.w(config_of(1), ENABLE | LEVEL | TO_PIN_20)
    for timer in (0, 1):
        world.w(comparator_of(timer), world.r(hpet.HPET_COUNTER) + MILLISECOND)
    world.wait(2 * MILLISECOND)
    assert (world.r(hpet.HPET_STATUS), world.lines) == (3, {20: True})
    world.w(hpet.HPET_STATUS, 1)
    assert world.lines == {20: True}, "two share the pin"
    world.w(hpet.HPET_STATUS, 2, 4)
    assert (world.r(hpet.HPET_STATUS), world.lines) == (0, {20: False})


def test_ticks_faster_than_the_loop_are_merged() -> None:
    world = World()
    world.count()
    world.w(config_of(0), ENABLE | PERIODIC | SETVAL | TO_PIN_20)
    world.w(comparator_of(0), 1)
    world.wait(100 * MILLISECOND)
    assert 0 < len(world.edges) <= 1002, "each 100 us at most"
    behind = world.r(hpet.HPET_COUNTER) - world.r(comparator_of(0))
    assert behind < 2, "and the comparator keeps step"


def test_a_32_bit_comparator_comes_around() -> None:
    world = World()
    world.w(hpet.HPET_COUNTER, (1 << 32) - 10)
    world.count()
    world.w(config_of(0), ENABLE | BITS32 | TO_PIN_20)
    world.w(comparator_of(0), 10)
    world.wait(20)
    world.wait(MILLISECOND)
    assert world.edges == [20]
    world.wait(1 << 32)
    assert world.edges == [20, 20]


def test_what_is_due_is_sent_though_the_guest_writes_first() -> None:
    """The loop is late, and the guest sets its next tick meanwhile."""
    world = World()
    world.count()
    world.w(config_of(0), ENABLE | TO_PIN_20)
    world.w(comparator_of(0), world.r(hpet.HPET_COUNTER) + 10)
    world.now += 1000 * hpet.TICK_NS
    world.w(comparator_of(0), world.r(hpet.HPET_COUNTER) + MILLISECOND)
    assert world.edges == [20]


def test_at_rest_nothing_comes_and_what_was_due_comes_afterwards() -> None:
    world = World()
    world.count()
    world.w(config_of(0), ENABLE | TO_PIN_20)
    world.w(comparator_of(0), world.r(hpet.HPET_COUNTER) + MILLISECOND)
    world.device.stop()
    assert world.timers == []
    world.wait(5 * MILLISECOND)
    saved = world.device.save()
    assert (world.edges, saved.timers[0].remaining) == ([], 0)
    other = World()
    other.device.stop()
    other.device.load(saved)
    assert other.edges == []
    other.device.start()
    other.wait(MILLISECOND)
    assert other.edges == [20]
    assert other.r(hpet.HPET_COUNTER) == saved.counter + MILLISECOND
    world.device.start()
    world.wait(MILLISECOND)
    assert world.edges == [20]


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("rest", [3, 40])
def test_a_periodic_timer_keeps_step_over_a_save(rest: int, enabled: bool) -> None:
    """Its comparator fell behind by all the ticks of the rest, and came at another time than it matched."""
    world = World()
    world.count()
    world.w(config_of(0), (ENABLE if enabled else 0) | PERIODIC | SETVAL | TO_PIN_20)
    world.w(comparator_of(0), world.r(hpet.HPET_COUNTER) + MILLISECOND)
    world.w(comparator_of(0), MILLISECOND)
    world.wait(2 * MILLISECOND + 1000)
    world.device.stop()
    world.wait(rest * MILLISECOND + MILLISECOND // 3)
    saved, before = world.device.save(), world.r(comparator_of(0))
    other = World()
    other.device.stop()
    other.device.load(saved)
    assert other.r(comparator_of(0)) == before
    for one in (world, other):
        one.edges.clear()
        one.device.start()
        one.wait(10 * MILLISECOND)
        assert 0 < one.r(comparator_of(0)) - one.r(hpet.HPET_COUNTER) <= MILLISECOND
    assert other.r(comparator_of(0)) == world.r(comparator_of(0))
    assert len(other.edges) == len(world.edges)
    assert bool(other.edges) == enabled


def test_reset_gives_irq_0_back() -> None:
    world = World()
    power_on = world.device.save()
    world.count(legacy=True)
    world.w(config_of(0), ENABLE | LEVEL)
    world.w(comparator_of(0), world.r(hpet.HPET_COUNTER) + 10)
    world.wait(MILLISECOND)
    assert world.lines[0]
    world.device.stop()
    world.device.reset()
    assert (world.legacy, world.lines[0], world.device.save()) == (False, False, power_on)


@pytest.mark.parametrize("count", [0, 2, 4])
def test_another_number_of_timers_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="another number"):
        World().device.load(HpetState(1, 0, 0, (TimerState(0, 0, 0, -1),) * count))


big = st.integers(0, 2**64 - 1)
values = big | st.sampled_from((0, 1, 3, 0x4E, 0x10C, 0x2804, 0x284C, 1 << 32, (1 << 64) - 1))
accesses = st.tuples(st.integers(0, hpet.HPET_SIZE - 1), st.sampled_from((1, 2, 4, 8)))
registers = st.tuples(
    st.sampled_from([0x10, 0x14, 0x20, 0xF0, 0xF4, *range(0x100, 0x160, 4)]), st.sampled_from((4, 8))
)
writes = st.tuples(st.just("write"), accesses | registers, values)
reads = st.tuples(st.just("read"), accesses | registers, st.just(0))
waits = st.tuples(st.just("wait"), st.just((0, 0)), st.integers(0, 10 * MILLISECOND))


@given(steps=st.lists(writes | reads | waits, max_size=60))
def test_whatever_a_guest_writes(steps: list[tuple[str, tuple[int, int], int]]) -> None:
    """One timer of the loop, bounded work, lines as the registers say, and a state that can be kept."""
    world = World()
    for what, (offset, size), value in steps:
        if what == "write":
            world.w(offset, value & (1 << 8 * size) - 1, size)
        elif what == "read":
            assert 0 <= world.r(offset, size) < 1 << 8 * size
        else:
            world.edges.clear()
            world.wait(value)
            assert len(world.edges) <= hpet.TIMERS * (2 + value * hpet.TICK_NS // 100_000)
        assert set(world.lines) <= {0, 8, *PINS}
        up = {pin for pin, level in world.lines.items() if level}
        assert len(up) <= bin(world.r(hpet.HPET_STATUS)).count("1")
        assert world.r(hpet.HPET_STATUS) < 1 << hpet.TIMERS
    world.device.stop()
    saved = world.device.save()
    other = World()
    other.device.stop()
    other.device.load(saved)
    assert other.device.save() == saved
    assert other.legacy == world.legacy
    assert {pin for pin, level in other.lines.items() if level} == up if steps else True


@given(
    state=st.builds(
        HpetState, *[st.integers()] * 3, st.tuples(*[st.builds(TimerState, *[st.integers()] * 4)] * 3)
    )
)
def test_whatever_a_file_says(state: HpetState) -> None:
    world = World()
    world.device.stop()
    world.device.load(state)
    world.device.start()
    world.wait(MILLISECOND)
    for offset in range(0, hpet.HPET_SIZE, 4):
        assert 0 <= world.r(offset, 4) < 1 << 32
    assert len(world.edges) < 50
