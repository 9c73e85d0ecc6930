"""A VMBus host and a guest's client in one process: no KVM, no threads, every order of events.

Why: what crosses between host and guest (messages, doorbells, event flags,
deferred work) waits here in queues until `run` lets it through. Given a random
generator, `run` picks among the queues anew at each step, delays what it likes
and makes slots busy: one thread plays what two would do at bad times. What the
SynIC keeps in order stays in order.

`LoopbackSynic` stands for `hyperv.partition.Partition` and records every
signal. For tests.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, TypeVar

from hvkvm.abi.hv_synic import HVMSG_VMBUS, hv_post_message_input
from hvkvm.abi.tlfs import HvStatus
from hvkvm.errors import RouteError
from hvkvm.events import Event, LimitedObserver
from hvkvm.memory.guest import GuestMemory
from hvkvm.testing.vmbus_client import GuestChannel, VmbusClient
from hvkvm.vmbus.host import VmbusHost

MIB = 1 << 20
LOOPBACK_STEP = 0.05
"""Seconds that pass at a time while something is waited for."""
T = TypeVar("T")


class NoSlots:
    """A VM that takes memory slots and does nothing with them."""

    memory_slots = 509

    def set_user_memory_region(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        """Nothing to do."""


class Notes(LimitedObserver):
    """Keeps what the host reports, as little of it as a machine's observer hears."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []

    def tell(self, event: Event) -> None:
        """Keep it."""
        self.events.append(event)


class LoopbackTimer:
    """A timer, which goes off when a test lets time pass."""

    def __init__(self, due: float, fn: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.due = due
        self.fn = fn
        self.args = args
        self.active = True

    def cancel(self) -> None:
        """As `runtime.timers.Timer.cancel`."""
        self.active = False

    def __lt__(self, other: LoopbackTimer) -> bool:
        return self.due < other.due


class LoopbackRoute:
    """A route whose messages and flags wait in the synic's queues."""

    def __init__(
        self, synic: LoopbackSynic, vp_index: int, sint: int, on_complete: Callable[[int], None] | None
    ) -> None:
        self.synic = synic
        self.vp_index = vp_index
        self.sint = sint
        self.on_complete = on_complete
        self.closed = False
        self.busy = False

    def post(self, message_type: int, payload: bytes) -> int:
        """As `SintRoute.post`: one at a time."""
        assert message_type == HVMSG_VMBUS
        if self.closed:
            return -errno.ENXIO
        if self.busy:
            return -errno.EAGAIN
        self.busy = True
        self.synic.messages.append((self, payload))
        return 0

    def retry(self) -> None:
        """As `SintRoute.retry`: `LoopbackSynic.messages` are tried until they are taken."""

    def set_event_flag(self, number: int) -> int:
        """Set a flag; a flag that is set already interrupts nobody again."""
        self.synic.flags_set.append((self.vp_index, self.sint, number))
        self.synic.flags[self.vp_index, self.sint, number] = None
        return 0

    def close(self) -> None:
        """As `SintRoute.close`."""
        self.closed = True


class LoopbackSynic:
    """Stands for the Partition. `flags_set` and `rung` record every signal each way."""

    def __init__(self, vp_count: int) -> None:
        self.vp_count = vp_count
        self.connections = self
        self.handlers: dict[int, Callable[[Any], int]] = {}
        self.events: dict[int, Callable[[], object]] = {}
        self.messages: deque[tuple[LoopbackRoute, bytes]] = deque()
        self.doorbells: dict[int, None] = {}
        self.flags: dict[tuple[int, int, int], None] = {}
        self.flags_set: list[tuple[int, int, int]] = []
        self.rung: list[int] = []
        self.message_page = True
        """Whether the guest's message page is on: else posts complete with -ENXIO (S9)."""

    def open_route(
        self, vp_index: int, sint: int, on_complete: Callable[[int], None] | None = None
    ) -> LoopbackRoute:
        """As `Partition.open_route`."""
        if not 0 <= vp_index < self.vp_count or not 0 <= sint < 16:
            raise RouteError(f"SINT {sint} of VP {vp_index}")
        return LoopbackRoute(self, vp_index, sint, on_complete)

    def add_message(self, conn_id: int, handler: Callable[[Any], int]) -> int:
        """As `Connections.add_message`."""
        return -errno.EEXIST if self.handlers.setdefault(conn_id, handler) is not handler else 0

    def remove_message(self, conn_id: int) -> int:
        """As `Connections.remove_message`."""
        return 0 if self.handlers.pop(conn_id, None) else -errno.ENOENT

    def add_event(self, conn_id: int, callback: Callable[[], object]) -> int:
        """As `Connections.add_event`."""
        if conn_id in self.events:
            return -errno.EEXIST
        self.events[conn_id] = callback
        return 0

    def remove_event(self, conn_id: int) -> int:
        """As `Connections.remove_event`."""
        return 0 if self.events.pop(conn_id, None) else -errno.ENOENT

    def signal(self, conn_id: int) -> int:
        """The guest's HvSignalEvent: signals coalesce (S54)."""
        if conn_id not in self.events:
            return int(HvStatus.INVALID_CONNECTION_ID)
        self.rung.append(conn_id)
        self.doorbells[conn_id] = None
        return 0


class Loopback:
    """Host and guest. `random` None lets everything through in a fixed order."""

    def __init__(
        self,
        *,
        vp_count: int = 2,
        pages: Sequence[int] | None = None,
        random: Random | None = None,
        memory_bytes: int = 4 * MIB,
        **options: Any,
    ) -> None:
        self.memory = GuestMemory(NoSlots(), memory_bytes)
        self.notes = Notes()
        self.synic = LoopbackSynic(vp_count)
        self.random = random
        self.deferred: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self.now = 0.0
        self.timers: list[LoopbackTimer] = []
        self.host = VmbusHost(
            self.synic,
            self.memory,
            vp_count,
            self.call_soon,
            self.call_later,
            observer=self.notes,
            **options,
        )
        self.host.attach()
        self.callers_errors: list[Exception] = []
        """What code of the test's, such as a device, raised when the host called it; `run` raises it."""
        self.host.devices.on_callers_error = self.callers_errors.append
        self.connection_id = 1
        self.client = VmbusClient(
            self.memory, list(range(64, 1024)) if pages is None else pages, self.post, self.synic.signal
        )

    def call_soon(self, fn: Callable[..., object], *args: Any) -> None:
        """The I/O loop's deferral."""
        self.deferred.append((fn, args))

    def call_later(self, seconds: float, fn: Callable[..., object], *args: Any) -> LoopbackTimer:
        """The I/O loop's timers; they stand still but for `advance`."""
        self.timers = [timer for timer in self.timers if timer.active]
        timer = LoopbackTimer(self.now + seconds, fn, args)
        self.timers.append(timer)
        return timer

    def advance(self, seconds: float) -> None:
        """Let time pass: what is due runs, in order."""
        end = self.now + seconds
        while due := [timer for timer in self.timers if timer.active and timer.due <= end]:
            timer = min(due, key=lambda timer: timer.due)
            timer.active = False
            self.timers.remove(timer)
            self.now = max(self.now, timer.due)
            timer.fn(*timer.args)
        self.now = end

    def post(self, payload: bytes) -> int:
        """The guest's HvPostMessage on the current connection."""
        message = hv_post_message_input(self.connection_id, 0, HVMSG_VMBUS, len(payload))
        message.payload[: len(payload)] = list(payload)
        return self.synic.handlers[self.connection_id](message)

    # What can happen next.

    def _run_deferred(self) -> None:
        fn, args = self.deferred.popleft()
        fn(*args)

    def _deliver_message(self) -> None:
        route, payload = self.synic.messages.popleft()
        if route.closed:
            return  # withdrawn
        if self.random is not None and self.random.random() < 0.3:
            self.synic.messages.appendleft((route, payload))  # the slot is taken, until an EOM
            return
        status = 0 if self.synic.message_page else -errno.ENXIO
        if not status:
            self.client.deliver(payload)
        route.busy = False
        assert route.on_complete is not None
        route.on_complete(status)

    def _deliver_doorbell(self) -> None:
        conn_id = self._pick(list(self.synic.doorbells))
        del self.synic.doorbells[conn_id]
        if (callback := self.synic.events.get(conn_id)) is not None:
            callback()

    def _deliver_flag(self) -> None:
        key = self._pick(list(self.synic.flags))
        del self.synic.flags[key]
        relids = [key[2]]
        if self.client.interrupt_page:
            relids = [] if key[2] else self.client.take_marks()
        for channel in list(self.client.offers.values()):
            if channel.relid in relids:
                channel.interrupt()

    def _pick(self, choices: list[Any]) -> Any:
        return choices[0] if self.random is None else self.random.choice(choices)

    def step(self) -> bool:
        """Let one thing happen; False if nothing can."""
        ready = [
            happen
            for queue, happen in (
                (self.deferred, self._run_deferred),
                (self.synic.messages, self._deliver_message),
                (self.synic.doorbells, self._deliver_doorbell),
                (self.synic.flags, self._deliver_flag),
            )
            if queue
        ]
        if not ready:
            return False
        self._pick(ready)()
        return True

    def run(self, limit: int = 100_000) -> None:
        """Let everything happen. AssertionError if it never ends; what a device of the test's has raised."""
        for _ in range(limit):
            if not self.step():
                break
        else:
            raise AssertionError("host and guest never come to rest")
        if self.callers_errors:
            raise self.callers_errors.pop(0)

    # As a stage of `device.ScriptedDevice`.

    def call(self, fn: Callable[..., T], *args: Any) -> T:
        """What is done on a machine's I/O loop: at once, there is one thread."""
        return fn(*args)

    later = call_later

    def wait_until(self, happened: Callable[[], T | None], what: str, seconds: float | None = None) -> T:
        """What `happened()` returned once that was true: everything happens, then time passes."""
        self.run()
        for _ in range(int((1.0 if seconds is None else seconds) / LOOPBACK_STEP) + 1):
            found = happened()
            if found:
                return found
            self.advance(LOOPBACK_STEP)
            self.run()
        raise AssertionError(f"no {what}")

    # Short ways for tests.

    def connect(self, version: int, **options: Any) -> None:
        """Contact and offers; AssertionError if the version is not taken."""
        from hvkvm.abi import vmbus_messages as wire

        self.client.contact(version, **options)
        self.run()
        assert self.client.last(wire.VERSION_RESPONSE)["version_supported"]
        self.client.post(wire.REQUESTOFFERS)
        self.run()

    def open(
        self, channel: GuestChannel, *, out_pages: int = 2, in_pages: int = 2, vp_index: int = 0
    ) -> None:
        """GPADL and OPENCHANNEL; AssertionError if the host refuses."""
        from hvkvm.abi import vmbus_messages as wire

        self.client.prepare_rings(channel, out_pages, in_pages)
        self.run()
        assert self.client.last(wire.GPADL_CREATED)["status"] == 0
        self.client.open(channel, out_pages=out_pages, vp_index=vp_index)
        self.run()
        assert self.client.last(wire.OPENCHANNEL_RESULT)["status"] == 0

    def close(self) -> None:
        """Release the RAM."""
        self.host.close()
        self.memory.close()
