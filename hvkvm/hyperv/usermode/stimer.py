"""A synthetic timer: HV_X64_MSR_STIMERn_CONFIG and _COUNT over a host timer.

The guest writes both on its VP's thread; the host timer goes off on the I/O
loop. A timer in direct mode raises its vector there and then. One in message
mode has the VP's thread write the message, since that is where slots may be
written; a slot that is taken, or a message page that is off, leaves the timer
pending until `retry` (EOM, or the page coming on: S58).

Periods shorter than MIN_PERIOD are stretched to it, because a guest could keep
the I/O loop busy for ever. Ticks that the host was too late for are skipped; a
periodic timer never has more than one message waiting, and a lazy one none.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import Protocol

from hvkvm.abi.hv_synic import (
    HV_SYNIC_FIRST_VALID_VECTOR,
    HVMSG_TIMER_EXPIRED,
    hv_message,
    hv_timer_message_payload,
)
from hvkvm.abi.tlfs import (
    HV_STIMER_AUTOENABLE,
    HV_STIMER_DIRECT_MODE,
    HV_STIMER_ENABLE,
    HV_STIMER_LAZY,
    HV_STIMER_PERIODIC,
    HV_STIMER_SINT_MASK,
    HV_STIMER_SINT_SHIFT,
    HV_STIMER_VECTOR_MASK,
    HV_STIMER_VECTOR_SHIFT,
)
from hvkvm.errors import Stopped
from hvkvm.tuples import NamedTuple

MIN_PERIOD = 1000
"""100 ns units: 100 us."""

_FAR = 1 << 55
"""100 ns units: more than a century. Later than that is never."""

_LAST = (1 << 64) - 1
"""The last moment that 64 bits can name; a guest may ask for a period that ends later, and be saved."""

_LAZY_PERIODIC = HV_STIMER_PERIODIC | HV_STIMER_LAZY


def _has_target(config: int) -> bool:
    """Whether a timer may be enabled: SINT 0 takes no timer messages (TLFS), direct mode needs no SINT."""
    return bool(config & HV_STIMER_DIRECT_MODE or config >> HV_STIMER_SINT_SHIFT & HV_STIMER_SINT_MASK)


class TimerVp(Protocol):
    """The VP whose timer it is: see `usermode.vp.UserVp`."""

    def submit(self, fn: Callable[[], None], cancelled: Callable[[], None]) -> None: ...

    def post_message(self, sint: int, message: bytes) -> int: ...

    def raise_sint(self, sint: int) -> int: ...

    def raise_vector(self, vector: int) -> int: ...


class Clock(Protocol):
    def now(self) -> int: ...


class Alarm(Protocol):
    """Calls `Stimer.due` on the I/O loop: see `alarm.Alarms`."""

    def arm(self, nanoseconds: int) -> None: ...

    def disarm(self) -> None: ...

    def close(self) -> None: ...


class StimerState(NamedTuple):
    """A timer's registers, and what is to come of it. Times are reference time, 100 ns units."""

    msr_config: int
    msr_count: int
    expires: int | None
    pending: int | None


class Stimer:
    """Timer `index` of `vp`. `make_alarm(callback)` gives the host timer, when one is first needed."""

    __slots__ = (
        "_alarm",
        "_clock",
        "_expires",
        "_held",
        "_lock",
        "_make_alarm",
        "_pending",
        "_queued",
        "_vp",
        "config",
        "count",
        "index",
    )

    def __init__(
        self, index: int, vp: TimerVp, clock: Clock, make_alarm: Callable[[Callable[[], None]], Alarm]
    ) -> None:
        self.index = index
        self.config = 0
        self.count = 0
        self._vp = vp
        self._clock = clock
        self._make_alarm = make_alarm
        self._alarm: Alarm | None = None
        # The guest's thread against the I/O loop.
        self._lock = threading.Lock()
        self._expires: int | None = None  # reference time of the next expiration, while it runs
        self._pending: int | None = None  # reference time of the expiration whose message is not in yet
        self._held = False
        self._queued = False  # `_deliver` is on its way to the VP's thread

    @property
    def pending(self) -> bool:
        """Whether a message waits for its slot."""
        return self._pending is not None

    def set_config(self, config: int) -> bool:
        """The guest writes CONFIG; the VP's thread. Always taken."""
        with self._lock:
            self._stop()
            self.config = config if _has_target(config) else config & ~HV_STIMER_ENABLE
            late = self._start()
        if late:
            self.due()
        return True

    def set_count(self, count: int) -> bool:
        """The guest writes COUNT; the VP's thread. Always taken."""
        with self._lock:
            self._stop()
            self.count = count
            if not count:
                self.config &= ~HV_STIMER_ENABLE
            elif self.config & HV_STIMER_AUTOENABLE and _has_target(self.config):
                self.config |= HV_STIMER_ENABLE
            late = self._start()
        if late:
            self.due()
        return True

    def _stop(self) -> None:
        self._pending = None
        if self._expires is not None:
            self._expires = None
            if self._alarm is not None:
                self._alarm.disarm()

    def _start(self) -> bool:
        """True for a one-shot that is due: it expires before the guest's next instruction, with no alarm."""
        if not self.config & HV_STIMER_ENABLE or not self.count:
            return False
        now = self._clock.now()
        if self.config & HV_STIMER_PERIODIC:
            self._arm(min(now + max(self.count, MIN_PERIOD), _LAST), now)
        elif self.count <= now:
            self._expires = self.count
            return True
        else:
            self._arm(self.count, now)
        return False

    def _arm(self, expires: int, now: int) -> None:
        self._expires = expires
        if expires - now > _FAR:
            return
        if self._alarm is None:
            try:
                self._alarm = self._make_alarm(self.due)
            except Stopped:
                return  # the machine is ending
        self._alarm.arm(max(expires - now, 0) * 100)

    def due(self) -> None:
        """The host timer went off (I/O loop), or the guest set a moment that has passed (VP's thread)."""
        with self._lock:
            expired = self._expires
            if expired is None or self._held:
                return  # the guest stopped it meanwhile
            now = self._clock.now()
            if now < expired:
                self._arm(expired, now)  # the two clocks differ by a hair, or this is an old alarm
                return
            config = self.config
            if config & HV_STIMER_PERIODIC:
                period = max(self.count, MIN_PERIOD)
                self._arm(now + period - (now - expired) % period, now)
            else:
                self._expires = None
            direct = config & HV_STIMER_DIRECT_MODE
            if direct:
                if not config & HV_STIMER_PERIODIC:
                    self.config = config & ~HV_STIMER_ENABLE
            else:
                if self._pending is None:
                    self._pending = expired
        if direct:
            vector = config >> HV_STIMER_VECTOR_SHIFT & HV_STIMER_VECTOR_MASK
            if vector >= HV_SYNIC_FIRST_VALID_VECTOR:
                self._vp.raise_vector(vector)
            return
        self._deliver_soon()

    def _deliver_soon(self) -> None:
        with self._lock:
            if self._queued:
                return
            self._queued = True
        try:
            self._vp.submit(self._deliver, self._cancelled)
        except Stopped:
            self._cancelled()

    def _cancelled(self) -> None:
        with self._lock:
            self._queued = False

    def _deliver(self) -> None:
        with self._lock:
            self._queued = False
        self.retry()

    def retry(self) -> None:
        """Write the message that waits, if one does. The VP's thread."""
        with self._lock:
            if self._pending is None:
                return
            config = self.config
            sint = config >> HV_STIMER_SINT_SHIFT & HV_STIMER_SINT_MASK
            payload = hv_timer_message_payload.pack(self.index, 0, self._pending, self._clock.now())
            status = self._vp.post_message(sint, hv_message(HVMSG_TIMER_EXPIRED, payload))
            if status:
                if status == -errno.EAGAIN and config & _LAZY_PERIODIC == _LAZY_PERIODIC:
                    self._pending = None
                return
            self._pending = None
            if not config & HV_STIMER_PERIODIC:
                self.config = config & ~HV_STIMER_ENABLE
        self._vp.raise_sint(sint)

    def hold(self) -> None:
        """Do not go off until `go_on`. The VP is outside KVM_RUN."""
        with self._lock:
            self._held = True  # an alarm that went off before this may still come
            if self._alarm is not None:
                self._alarm.disarm()

    def go_on(self) -> None:
        """Go off as ever; what became due meanwhile does so now. The VP is outside KVM_RUN."""
        with self._lock:
            self._held = False
            if self._expires is not None:
                self._arm(self._expires, self._clock.now())
        if self._pending is not None:
            self._deliver_soon()

    def described(self) -> str | None:
        """In words; None for one in its power-on state. Any thread."""
        from hvkvm.hyperv.synic_text import stimer

        config, count = self.config, self.count
        if not (config or count):
            return None
        waits = ", its message waits for its slot" if self.pending else ""
        return stimer(config, count, self._clock.now()) + waits

    def save(self) -> StimerState:
        """What it is. Held."""
        with self._lock:
            return StimerState(self.config, self.count, self._expires, self._pending)

    def load(self, state: StimerState) -> None:
        """Be that, once it goes on. Held, and reset before. ValueError for a timer that cannot be."""
        times = [time for time in (state.expires, state.pending) if time is not None]
        if any(not 0 <= number < 1 << 64 for number in (*state[:2], *times)):
            raise ValueError(f"timer {self.index} has a register that is no 64-bit number")
        with self._lock:
            self.config, self.count = state.msr_config, state.msr_count
            if not _has_target(self.config):
                self.config &= ~HV_STIMER_ENABLE
            self._expires, self._pending = state.expires, state.pending

    def reset(self) -> None:
        """Power-on state. The VP is outside KVM_RUN."""
        with self._lock:
            self._stop()
            self.config = self.count = 0

    def close(self) -> None:
        """Let the host timer go. Idempotent; not from the I/O loop while it runs `due`."""
        with self._lock:
            self._expires = self._pending = None
            alarm, self._alarm = self._alarm, None
        if alarm is not None:
            alarm.close()
