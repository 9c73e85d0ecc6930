"""What a channel costs does not grow with how many there are: bytecodes counted, not time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from hvkvm.abi import vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.events import NULL_OBSERVER
from hvkvm.vmbus.actions import Action, ForgetChannel
from hvkvm.vmbus.channels import Channels
from hvkvm.vmbus.gpadl import GpadlTable
from hvkvm.vmbus.offer import Offer
from hvkvm.vmbus.report import Reports

FEW, MANY = 8, 1500


class Bus:
    """The channels of a bus whose guest has asked for offers; what they send and ask for is kept."""

    def __init__(self, count: int) -> None:
        self.offered: list[bytes] = []
        self.forgotten: list[str] = []
        self.channels = Channels(lambda _gpa, _n: True, 1, self._sent, self._asked, Reports(NULL_OBSERVER))
        self.channels.opening.version = vmbus.VERSION_WIN10_V5_3
        self.channels.offering = True
        self._made = 0
        for _ in range(count):
            self.channels.add(self.offer())

    def offer(self) -> Offer:
        self._made += 1
        return Offer(
            name=f"device {self._made}", interface=b"i" * 16, instance=self._made.to_bytes(16, "little")
        )

    def _sent(self, what: bytes | int, **_fields: object) -> None:
        if isinstance(what, bytes):
            self.offered.append(what)

    def _asked(self, action: Action) -> None:
        if isinstance(action, ForgetChannel):
            self.forgotten.append(action.channel.offer.name)


def steps_of(work: Callable[[], object]) -> int:
    """How many bytecodes of Python `work` is.

    The garbage collector is off for as long: what it calls (finalizers, and hypothesis's own
    entry in `gc.callbacks`) is bytecodes too, at whatever moment a collection falls.
    """
    count = 0

    def noted(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return noted

    before, collecting = sys.gettrace(), gc.isenabled()
    gc.disable()
    sys.settrace(noted)
    try:
        work()
    finally:
        sys.settrace(before)
        if collecting:
            gc.enable()
    return count


def test_what_the_garbage_collector_calls_is_no_step() -> None:
    def noisy(_phase: str, _info: object) -> None:
        sum(range(10))

    def work() -> None:
        kept.extend([] for _ in range(3000))  # three times what sets a collection off by itself

    kept: list[list[object]] = []
    quiet = steps_of(work)
    gc.callbacks.append(noisy)
    try:
        assert steps_of(work) == quiet
    finally:
        gc.callbacks.remove(noisy)


def come_and_go(bus: Bus) -> None:
    """A connection's channel: offered, rescinded, released."""
    channel = bus.channels.add(bus.offer())
    released = wire.parse(wire.build(wire.RELID_RELEASED, relid=channel.relid))
    assert released is not None
    bus.channels.withdraw(channel)
    bus.channels.on_released(released)


def test_a_channel_that_comes_and_goes_costs_the_same_beside_many() -> None:
    few, many = Bus(FEW), Bus(MANY)
    assert len(many.offered) == len(many.channels.by_relid) == MANY
    for bus in few, many:
        come_and_go(bus)  # what is made once, such as a cache, is made
    assert steps_of(lambda: come_and_go(many)) < 1.2 * steps_of(lambda: come_and_go(few))
    assert (len(many.channels.all), len(many.offered), len(many.forgotten)) == (MANY, MANY + 2, 2)


def test_the_next_guest_is_offered_what_is_left_in_its_order() -> None:
    bus = Bus(MANY)
    channels = bus.channels
    for channel in channels.all:
        channel.withdrawn = channel.relid % 2 == 0
    left = [channel for channel in channels.all if not channel.withdrawn]
    channels.stop_all()
    channels.hide_all()
    assert channels.all == left
    assert len(bus.forgotten) == MANY - len(left)
    bus.offered.clear()
    channels.offering = True
    channels.sort(lambda channel: -int.from_bytes(channel.offer.instance, "little"))
    channels.offer_hidden()
    assert channels.all == left[::-1]
    assert bus.offered == [channel.offer_message() for channel in channels.all]


def test_a_channels_gpadls_are_found_without_the_others() -> None:
    costs = []
    for count in FEW, MANY:
        table = GpadlTable(lambda _gpa, _n: True)
        page = (4096).to_bytes(4, "little") + bytes(4) + (5).to_bytes(8, "little")
        for relid in range(1, count + 1):
            for gpadl_id in (1, 2):
                made = table.header(relid, gpadl_id, len(page), 1, page)
                assert made is not None
                assert made.gpadl is not None
        assert len(table) == len(list(table)) == 2 * count
        assert [gpadl.gpadl_id for gpadl in table.of_channel(count)] == [1, 2]
        costs.append(steps_of(lambda table=table: table.drop_channel(1)))  # type: ignore[misc]
        assert (len(table), table.get(1, 1), table.of_channel(1)) == (2 * count - 2, None, [])
    assert costs[1] < 1.2 * costs[0]
