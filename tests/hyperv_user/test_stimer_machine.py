"""A synthetic timer against a clock, an alarm and a VP that the test drives: no time passes by itself."""

from __future__ import annotations

import errno
from collections.abc import Callable
from struct import unpack_from

import pytest

from hvkvm.abi.hv_synic import HVMSG_TIMER_EXPIRED
from hvkvm.errors import Stopped
from hvkvm.hyperv.usermode.stimer import MIN_PERIOD, Stimer

ENABLE, PERIODIC, LAZY, AUTO_ENABLE, DIRECT = 1, 2, 4, 8, 1 << 12
TIMER, SINT = 1, 3
ON_SINT = SINT << 16
MS = 10_000


class Host:
    """Clock, alarm and VP in one; `now` in 100 ns."""

    def __init__(self) -> None:
        self.time = 1000 * MS
        self.alarm_at: int | None = None
        self.alarms = 0
        self.closed = 0
        self.slot: bytes | None = None
        self.page_on = True
        self.stopped = False
        self.queue: list[Callable[[], None]] = []
        self.raised: list[str] = []

    def now(self) -> int:
        return self.time

    def make(self, callback: Callable[[], None]) -> Host:
        if self.stopped:
            raise Stopped("no more")
        self.alarms += 1
        self.callback = callback
        return self

    def arm(self, nanoseconds: int) -> None:
        self.alarm_at = self.time + nanoseconds // 100

    def disarm(self) -> None:
        self.alarm_at = None

    def close(self) -> None:
        self.closed += 1

    def submit(self, fn: Callable[[], None], cancelled: Callable[[], None]) -> None:
        if self.stopped:
            raise Stopped("ended")
        self.queue.append(fn)

    def post_message(self, sint: int, message: bytes) -> int:
        assert (sint, len(message)) == (SINT, 256)
        if not self.page_on:
            return -errno.ENXIO
        if self.slot is not None:
            return -errno.EAGAIN
        self.slot = message
        return 0

    def raise_sint(self, sint: int) -> int:
        self.raised.append(f"sint {sint}")
        return 0

    def raise_vector(self, vector: int) -> int:
        self.raised.append(f"vector {vector:#x}")
        return 0

    def run_vp(self) -> None:
        queue, self.queue = self.queue, []
        for fn in queue:
            fn()

    def pass_time(self, units: int) -> None:
        """Let time pass; the alarm goes off when it is due, the VP's thread runs at once."""
        end = self.time + units
        while self.alarm_at is not None and self.alarm_at <= end:
            self.time, self.alarm_at = max(self.alarm_at, self.time), None
            self.callback()
            self.run_vp()
        self.time = end

    def take(self) -> tuple[int, int, int]:
        """Empty the slot: type, expiration and delivery time of its message."""
        assert self.slot is not None
        kind = unpack_from("<I", self.slot)[0]
        index, reserved, expired, delivered = unpack_from("<IIQQ", self.slot, 16)
        assert (index, reserved) == (TIMER, 0)
        self.slot = None
        return kind, expired, delivered


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def timer(host: Host) -> Stimer:
    return Stimer(TIMER, host, host, host.make)


def test_one_shot_sends_one_message_and_clears_enable(host: Host, timer: Stimer) -> None:
    due = host.time + 2 * MS
    timer.set_count(due)
    timer.set_config(ENABLE | ON_SINT)
    host.pass_time(MS)
    assert host.slot is None
    host.pass_time(MS)
    assert host.take() == (HVMSG_TIMER_EXPIRED, due, due)
    assert (timer.config, timer.count, host.raised) == (ON_SINT, due, [f"sint {SINT}"])
    host.pass_time(100 * MS)
    host.callback()  # an old alarm
    host.run_vp()
    assert host.slot is None


@pytest.mark.parametrize("count", [5, 1000 * MS], ids=["long ago", "now"])
def test_one_shot_in_the_past_expires_at_once(host: Host, timer: Stimer, count: int) -> None:
    """Before the guest's next instruction: its thread writes the message, and no alarm is needed."""
    timer.set_config(AUTO_ENABLE | ON_SINT)
    timer.set_count(count)
    assert host.alarms == 0
    host.run_vp()
    assert host.take()[:2] == (HVMSG_TIMER_EXPIRED, count)
    timer.set_config(ENABLE | DIRECT | 0x55 << 4)
    assert host.raised[-1] == "vector 0x55"


def test_auto_enable_and_count_zero(host: Host, timer: Stimer) -> None:
    timer.set_config(AUTO_ENABLE | ON_SINT)
    assert host.alarm_at is None
    timer.set_count(host.time + MS)
    assert timer.config == AUTO_ENABLE | ENABLE | ON_SINT
    timer.set_count(0)
    assert timer.config == AUTO_ENABLE | ON_SINT
    host.pass_time(10 * MS)
    assert host.slot is None


@pytest.mark.parametrize("periodic", [0, PERIODIC])
def test_it_runs_only_enabled_and_with_a_count(host: Host, timer: Stimer, periodic: int) -> None:
    timer.set_config(ENABLE | periodic | ON_SINT)
    host.pass_time(MS)
    assert (host.slot, host.alarm_at) == (None, None), "COUNT is 0"
    timer.set_config(periodic | ON_SINT)
    timer.set_count(host.time + MS)
    assert (timer.config, host.alarm_at) == (periodic | ON_SINT, None), "only AutoEnable enables by COUNT"


def test_sint_0_takes_no_messages_but_direct_mode_needs_none(host: Host, timer: Stimer) -> None:
    timer.set_count(5)
    timer.set_config(ENABLE)
    assert timer.config == 0
    timer.set_config(AUTO_ENABLE)
    timer.set_count(5)
    assert timer.config == AUTO_ENABLE
    timer.set_config(ENABLE | DIRECT | 0x55 << 4)
    host.pass_time(0)
    assert host.raised == ["vector 0x55"]
    assert timer.config & ENABLE == 0


def test_direct_vector_below_16_raises_nothing(host: Host, timer: Stimer) -> None:
    timer.set_count(5)
    timer.set_config(ENABLE | DIRECT | 0xF << 4)
    host.pass_time(MS)
    assert host.raised == []
    timer.set_config(ENABLE | DIRECT | 0x10 << 4)
    assert host.raised == ["vector 0x10"]


def test_periodic_keeps_its_phase_and_skips_what_is_past(host: Host, timer: Stimer) -> None:
    start = host.time
    timer.set_config(PERIODIC | AUTO_ENABLE | ON_SINT)
    timer.set_count(MS)
    for tick in range(1, 4):
        host.pass_time(MS)
        assert host.take()[1] == start + tick * MS
    host.alarm_at = None  # the host was asleep
    host.time += 5 * MS + 7
    host.callback()
    host.run_vp()
    assert host.take()[1] == start + 4 * MS
    host.pass_time(MS - 7)
    assert host.take()[1] == start + 9 * MS


def test_busy_slot_is_tried_again_at_eom(host: Host, timer: Stimer) -> None:
    host.slot = b"somebody's"
    timer.set_count(host.time + MS)
    timer.set_config(ENABLE | ON_SINT)
    host.pass_time(3 * MS)
    assert (timer.pending, host.raised, timer.config & ENABLE) == (True, [], ENABLE)
    host.slot = None
    timer.retry()
    assert host.take()[0] == HVMSG_TIMER_EXPIRED
    assert (timer.pending, host.raised, timer.config & ENABLE) == (False, [f"sint {SINT}"], 0)
    timer.retry()
    assert host.slot is None


@pytest.mark.parametrize(("lazy", "messages"), [(0, 1), (LAZY, 0)])
def test_ticks_never_pile_up_in_a_busy_slot(host: Host, timer: Stimer, lazy: int, messages: int) -> None:
    host.slot = b"somebody's"
    timer.set_config(PERIODIC | AUTO_ENABLE | lazy | ON_SINT)
    timer.set_count(MS)
    host.pass_time(10 * MS)
    host.slot = None
    timer.retry()
    assert len(host.raised) == messages
    assert (host.slot is not None) == bool(messages)


def test_a_vp_that_is_busy_elsewhere_has_one_message_to_write(host: Host, timer: Stimer) -> None:
    timer.set_config(PERIODIC | AUTO_ENABLE | ON_SINT)
    timer.set_count(MS)
    for _ in range(3):
        host.time += MS
        host.callback()
    assert len(host.queue) == 1
    host.run_vp()
    assert host.take()[0] == HVMSG_TIMER_EXPIRED
    host.pass_time(MS)
    assert host.take()[0] == HVMSG_TIMER_EXPIRED


@pytest.mark.parametrize("kind", [0, PERIODIC, PERIODIC | LAZY], ids=["one-shot", "periodic", "lazy"])
def test_a_page_that_is_off_keeps_the_message_s58(host: Host, timer: Stimer, kind: int) -> None:
    host.page_on = False
    timer.set_config(AUTO_ENABLE | kind | ON_SINT)
    timer.set_count(1)
    host.pass_time(MS)
    assert timer.pending
    host.page_on = True
    timer.retry()
    assert host.take()[0] == HVMSG_TIMER_EXPIRED


def test_stopping_drops_a_message_on_its_way(host: Host, timer: Stimer) -> None:
    timer.set_config(AUTO_ENABLE | ON_SINT)
    timer.set_count(host.time + MS)
    host.time += MS
    host.callback()
    timer.set_config(0)
    host.run_vp()
    assert (host.slot, timer.pending) == (None, False)
    host.callback()  # the alarm of before, on its way when it was disarmed
    assert host.queue == []


@pytest.mark.parametrize("stop", [lambda timer: timer.set_config(0), lambda timer: timer.set_count(0)])
def test_a_stopped_timer_does_not_go_off(host: Host, timer: Stimer, stop: Callable[[Stimer], object]) -> None:
    timer.set_config(AUTO_ENABLE | ON_SINT)
    timer.set_count(host.time + MS)
    host.time += MS
    stop(timer)
    assert host.alarm_at is None
    host.callback()  # its alarm was on its way when it was stopped
    assert (host.queue, host.alarm_at) == ([], None)


def test_a_held_timer_goes_off_when_the_machine_goes_on(host: Host, timer: Stimer) -> None:
    due = host.time + MS
    timer.set_config(AUTO_ENABLE | ON_SINT)
    timer.set_count(due)
    timer.hold()
    assert host.alarm_at is None
    host.time += 3 * MS
    host.callback()  # its alarm was on its way when it was held
    assert host.queue == []
    timer.go_on()
    assert host.alarm_at == host.time
    host.pass_time(0)
    assert host.take() == (HVMSG_TIMER_EXPIRED, due, due + 2 * MS)
    host.slot = b"somebody's"
    timer.set_count(host.time)
    host.run_vp()
    timer.hold()
    fresh = Stimer(TIMER, host, host, host.make)
    fresh.load(timer.save())
    host.slot = None
    fresh.go_on()
    host.run_vp()
    assert host.take()[1] == due + 2 * MS, "its message waited for the slot when it was saved"


def test_shortest_period_is_bounded(host: Host, timer: Stimer) -> None:
    timer.set_config(PERIODIC | AUTO_ENABLE | DIRECT | 0x60 << 4)
    timer.set_count(1)
    host.pass_time(10 * MIN_PERIOD)
    assert len(host.raised) == 10


def test_an_early_alarm_is_set_again(host: Host, timer: Stimer) -> None:
    timer.set_config(AUTO_ENABLE | ON_SINT)
    timer.set_count(host.time + MS)
    host.alarm_at = None
    host.callback()
    assert (host.queue, host.alarm_at) == ([], host.time + MS)


@pytest.mark.parametrize("count", [1 << 56, (1 << 64) - 1])
def test_a_time_beyond_all_is_never(host: Host, timer: Stimer, count: int) -> None:
    timer.set_config(AUTO_ENABLE | ON_SINT)
    timer.set_count(count)
    assert host.alarm_at is None
    timer.set_config(PERIODIC | AUTO_ENABLE | ON_SINT)
    timer.set_count(count)
    assert host.alarm_at is None
    assert timer.count == count


def test_a_period_beyond_all_is_saved_and_restored(host: Host, timer: Stimer) -> None:
    """What a guest may set, a saved machine may have: the end of such a period is no 64-bit number."""
    timer.set_config(PERIODIC | AUTO_ENABLE | ON_SINT)
    timer.set_count((1 << 64) - 1)
    timer.hold()
    fresh = Stimer(TIMER, host, host, host.make)
    fresh.load(timer.save())
    fresh.go_on()
    assert (fresh.count, fresh.config) == (timer.count, timer.config)
    assert host.alarm_at is None


@pytest.mark.parametrize("field", ["msr_config", "msr_count", "expires", "pending"])
@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_a_saved_timer_that_none_can_be_is_refused(timer: Stimer, field: str, value: int) -> None:
    with pytest.raises(ValueError, match=r"timer 1 .* 64-bit"):
        timer.load(timer.save()._replace(**{field: value}))
    timer.load(timer.save()._replace(**{field: (1 << 64) - 1}))


def test_a_saved_timer_without_target_is_not_enabled(host: Host, timer: Stimer) -> None:
    timer.load(timer.save()._replace(msr_config=ENABLE, msr_count=MS))
    assert (timer.config, timer.count) == (0, MS)


def test_an_ending_machine_is_no_error(host: Host, timer: Stimer) -> None:
    timer.set_config(AUTO_ENABLE | ON_SINT)
    timer.set_count(host.time + MS)
    host.stopped = True
    host.pass_time(MS)
    fresh = Stimer(0, host, host, host.make)
    fresh.set_config(AUTO_ENABLE | ON_SINT)
    fresh.set_count(host.time + MS)
    fresh.set_count(1)
    for each in (timer, fresh):
        each.reset()
        each.close()
        each.close()
    assert host.closed == 1
