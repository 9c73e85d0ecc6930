"""A SynIC for tests: real registers, pages and atomics in plain memory, everything else by hand.

The test decides when the vCPU's thread runs its queue, when the I/O loop runs a
round and when the guest frees a slot, so every interleaving can be forced.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from hvkvm.abi.hv_synic import HV_MESSAGE_PAYLOAD_BYTE_COUNT
from hvkvm.errors import Stopped
from hvkvm.events import Event, Observer
from hvkvm.hyperv.sint_route import RouteTable, SintRoute
from hvkvm.hyperv.synic.vp import VpSynic

MESSAGE_GPA, EVENT_GPA = 0x10000, 0x20000


class hv_message(ctypes.Structure):
    """A slot of the message page as a guest's own header has it."""

    _fields_ = [
        ("message_type", ctypes.c_uint32),
        ("payload_size", ctypes.c_uint8),
        ("message_flags", ctypes.c_uint8),
        ("reserved", ctypes.c_uint16),
        ("sender", ctypes.c_uint64),
        ("payload", ctypes.c_uint8 * HV_MESSAGE_PAYLOAD_BYTE_COUNT),
    ]


class FakeOverlay:
    """A page of plain memory; `refused` are addresses where no page can lie."""

    def __init__(self) -> None:
        self._memory = (ctypes.c_uint64 * 512)()
        self.hva = ctypes.addressof(self._memory)
        self.view = memoryview(self._memory).cast("B")
        self.gpa: int | None = None
        self.moves: list[int | None] = []
        self.refused: set[int] = set()
        self.closed = False

    def place(self, gpa: int | None) -> bool:
        self.moves.append(gpa)
        self.gpa = None if gpa in self.refused else gpa
        return self.gpa == gpa

    def zero(self) -> None:
        self.view[:] = bytes(4096)

    def close(self) -> None:
        self.gpa = None
        self.closed = True


class Recorder(Observer):
    """Keeps every event."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def event(self, event: Event) -> None:
        self.events.append(event)


class FakeLoop:
    """An I/O loop that runs a round when told to."""

    def __init__(self) -> None:
        self.queue: list[tuple[Callable[..., object], tuple[object, ...], Callable[[], object] | None]] = []
        self.stopped = False

    def call_soon(
        self, fn: Callable[..., object], *args: object, cancelled: Callable[[], object] | None = None
    ) -> None:
        if self.stopped:
            raise Stopped("the loop has ended")
        self.queue.append((fn, args, cancelled))

    def run(self) -> int:
        """One round: what was queued when it began."""
        taken, self.queue = self.queue, []
        for fn, args, _cancelled in taken:
            fn(*args)
        return len(taken)

    def stop(self) -> None:
        self.stopped = True
        taken, self.queue = self.queue, []
        for _fn, _args, cancelled in taken:
            if cancelled is not None:
                cancelled()


class FakeVp(VpSynic):
    """A VP whose queue runs when told to."""

    def __init__(self, vp_index: int, observer: Observer) -> None:
        self.messages, self.flags = FakeOverlay(), FakeOverlay()
        super().__init__(vp_index, self.messages, self.flags, observer=observer)
        self.queue: list[tuple[Callable[[], None], Callable[[], None]]] = []
        self.stopped = False
        self.active = True

    def submit(self, fn: Callable[[], None], cancelled: Callable[[], None]) -> None:
        if self.stopped:
            raise Stopped("the vCPU thread has ended")
        self.queue.append((fn, cancelled))

    def run(self) -> int:
        """What the vCPU's thread does between two KVM_RUNs."""
        taken, self.queue = self.queue, []
        for fn, _cancelled in taken:
            fn()
        return len(taken)

    def stop(self) -> None:
        self.stopped = True
        taken, self.queue = self.queue, []
        for _fn, cancelled in taken:
            cancelled()

    def switch_on(self, message_gpa: int = MESSAGE_GPA, event_gpa: int = EVENT_GPA) -> None:
        """As a guest does: SCONTROL, SIEFP, SIMP."""
        self.update(1, event_gpa | 1, message_gpa | 1)

    def slot(self, sint: int) -> hv_message:
        """The guest's view of a slot."""
        return hv_message.from_address(self.messages.hva + 256 * sint)


class FakeLine:
    """A line that counts; acks come when the test says so."""

    def __init__(self, synic: FakeSynic, acks: bool) -> None:
        self._synic = synic
        self.acks = acks
        self.pulses = 0
        self.pulse_status = 0
        self.waiters: list[Callable[[], None]] = []
        self.closed = 0

    def pulse(self) -> int:
        if self.closed:
            return -6
        if self.pulse_status == 0:
            self.pulses += 1
        return self.pulse_status

    def enable_acks(self) -> None:
        self._synic.maybe_fail("acks")
        self.acks = True

    def arm_ack(self, waiter: Callable[[], None]) -> None:
        assert self.acks
        if self._synic.loop.stopped:
            raise Stopped("the loop has ended")
        self._synic.maybe_fail("ack")
        self.waiters.append(waiter)

    def disarm_ack(self, waiter: Callable[[], None]) -> None:
        if waiter in self.waiters:
            self.waiters.remove(waiter)

    def ack(self) -> None:
        """The guest's EOM: the I/O loop will hear of it."""
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            self._synic.loop.call_soon(waiter)

    def close(self) -> None:
        self.closed += 1


class FakeSynic:
    """`vps` VPs; `fail` names the steps that raise when they come: "line", "acks", "ack"."""

    signal_path = None
    signal_path_missing = "the stand-in has none"

    def __init__(self, loop: FakeLoop, vps: int, observer: Observer) -> None:
        self.loop = loop
        self.vps = [FakeVp(index, observer) for index in range(vps)]
        self.lines: dict[tuple[int, int], list[FakeLine]] = {}
        self.fail: dict[str, Exception] = {}
        self.activated = False
        self.closed = 0

    def maybe_fail(self, step: str) -> None:
        if step in self.fail:
            raise self.fail[step]

    def vp(self, vp_index: int) -> FakeVp | None:
        return self.vps[vp_index] if 0 <= vp_index < len(self.vps) else None

    def open_line(self, vp_index: int, sint: int, *, acks: bool) -> FakeLine:
        self.maybe_fail("line")
        assert all(line.closed for line in self.lines.get((vp_index, sint), [])), "two lines for one SINT"
        line = FakeLine(self, acks)
        self.lines.setdefault((vp_index, sint), []).append(line)
        return line

    def open_lines(self) -> int:
        return sum(not line.closed for lines in self.lines.values() for line in lines)

    def activate(self) -> None:
        self.activated = True

    def reset(self) -> None:
        for vp in self.vps:
            vp.reset()

    def close(self) -> None:
        self.closed += 1
        for vp in self.vps:
            vp.close()


class World:
    """Routes over the stand-in, with a guest's moves."""

    def __init__(self, vps: int = 2) -> None:
        self.observer = Recorder()
        self.loop = FakeLoop()
        self.synic = FakeSynic(self.loop, vps, self.observer)
        self.routes = RouteTable(self.synic, self.loop, observer=self.observer)
        for vp in self.synic.vps:
            vp.switch_on(MESSAGE_GPA + 0x1000 * vp.vp_index, EVENT_GPA + 0x1000 * vp.vp_index)

    def open(self, vp: int = 0, sint: int = 2, on_complete: Callable[[int], None] | None = None) -> SintRoute:
        return self.routes.open(vp, sint, on_complete)

    def sender(self, vp: int = 0, sint: int = 2) -> tuple[SintRoute, list[int]]:
        """A route that posts, and the statuses it was told."""
        statuses: list[int] = []
        return self.open(vp, sint, statuses.append), statuses

    def vp(self, index: int = 0) -> FakeVp:
        return self.synic.vps[index]

    def line(self, vp: int = 0, sint: int = 2) -> FakeLine:
        return self.synic.lines[vp, sint][-1]

    def free_slot(self, vp: int = 0, sint: int = 2) -> bool:
        """The guest takes the message and, if asked to, writes EOM, which all lines of the VP hear (S29)."""
        slot = self.vp(vp).slot(sint)
        slot.message_type = 0
        if not slot.message_flags & 1:
            return False
        for (index, _sint), lines in self.synic.lines.items():
            if index == vp:
                for line in lines:
                    line.ack()
        return True

    def settle(self) -> None:
        """Run vCPU queues and the loop until nothing is left to do."""
        while sum(vp.run() for vp in self.synic.vps) + self.loop.run():
            pass
