"""Fairness on the I/O loop, in units of work: whatever a guest does, others wait for a bounded turn."""

from __future__ import annotations

from typing import Any

import pytest

from hvkvm.abi import vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.abi.ring import VM_PKT_DATA_USING_GPA_DIRECT
from hvkvm.errors import GuestMemoryError
from hvkvm.memory.guest import GuestMemory
from hvkvm.testing.vmbus_client import gpadl_messages
from hvkvm.vmbus.channel_devices import TURN_CLOSES
from hvkvm.vmbus.channel_io import BUDGET, BUDGET_BYTES
from hvkvm.vmbus.host import TURN_MESSAGES
from hvkvm.vmbus.inbox import MAX_INBOX
from hvkvm.vmbus.pages import RUN_PAGES, GuestPages


def two_channels(loopback: Any, echo: Any) -> tuple[Any, Any, Any, Any, Any]:
    """A loopback, a greedy channel with large rings and a modest one, with their devices."""
    loop = loopback()
    devices = [echo(1), echo(2)]
    for device in devices:
        loop.host.add(device)
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    greedy, modest = loop.client.offers.values()
    loop.open(greedy, out_pages=200, in_pages=200)
    loop.open(modest)
    return loop, greedy, modest, *devices


def fill(channel: Any, size: int) -> int:
    """As many packets of `size` bytes as the ring takes; published with one signal at most."""
    count = 0
    with channel.opened as io:
        while io.send(bytes(size)):
            count += 1
    return count


def test_a_channel_has_one_turn_pending_however_often_it_rings(loopback: Any, echo: Any) -> None:
    loop, greedy, _, device, _ = two_channels(loopback, echo)
    count = fill(greedy, 8)
    assert count > 20 * BUDGET
    turns = 0
    while len(device.got) < count:
        before = len(device.got)
        loop.synic.events[greedy.connection_id]()  # a doorbell, whatever the interrupt mask asks for
        for _ in range(len(loop.deferred)):
            loop._run_deferred()
            loop.synic.events[greedy.connection_id]()
        assert len(loop.deferred) <= 1, "doorbells add turns"
        assert len(device.got) - before <= 2 * BUDGET, "the first turn by the doorbell, the next behind it"
        turns += 1
    assert turns >= count / (2 * BUDGET)


def test_a_device_that_asks_often_has_one_turn_pending(loopback: Any, echo: Any) -> None:
    loop = loopback()
    device = echo(1)

    def rung() -> None:
        device.log.append("rung")
        for _ in range(3):
            device.io.again()

    device.rung = rung
    loop.host.add(device)
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    (guest,) = loop.client.offers.values()
    with pytest.raises(AssertionError, match="never come to rest"):  # it asks again in each turn
        loop.open(guest)
    assert len(loop.deferred) == 1
    loop.synic.events[guest.connection_id]()
    assert len(loop.deferred) == 1
    before = device.log.count("rung")
    loop._run_deferred()
    assert (device.log.count("rung"), len(loop.deferred)) == (before + 1, 1)


def test_the_rest_of_a_busy_channel_comes_behind_all_who_wait(loopback: Any, echo: Any) -> None:
    """Between two services of a modest channel, a greedy one moves a turn's packets."""
    loop, greedy, modest, greedy_device, modest_device = two_channels(loopback, echo)
    count = fill(greedy, 8)
    loop.synic.events[greedy.connection_id]()
    while len(greedy_device.got) < count:
        before = len(greedy_device.got)
        modest.opened.send(b"a key")
        heard = len(modest_device.got)
        loop.call_soon(loop.synic.events[modest.connection_id])
        while len(modest_device.got) == heard:
            loop._run_deferred()
        assert len(greedy_device.got) - before <= BUDGET


def test_large_packets_end_a_turn_by_their_bytes(loopback: Any, echo: Any) -> None:
    loop, greedy, _, device, _ = two_channels(loopback, echo)
    assert fill(greedy, 40_000) > 10
    loop.synic.events[greedy.connection_id]()
    assert sum(len(packet.payload) for packet in device.got) < BUDGET_BYTES + 40_000
    loop.run()
    assert sum(len(packet.payload) for packet in device.got) > 5 * BUDGET_BYTES


def test_what_stands_before_a_payload_counts_too(loopback: Any, echo: Any) -> None:
    loop, greedy, _, device, _ = two_channels(loopback, echo)
    count = 0
    with greedy.opened as io:
        while io.send(b"", kind=VM_PKT_DATA_USING_GPA_DIRECT, header=bytes(40_000)):
            count += 1
    assert count > 10
    loop.synic.events[greedy.connection_id]()
    assert sum(len(packet.header) for packet in device.got) < BUDGET_BYTES + 40_000
    loop.run()
    assert len(device.got) == count


def test_a_turn_that_is_pending_ends_with_its_channel(loopback: Any, echo: Any) -> None:
    loop, greedy, _, device, _ = two_channels(loopback, echo)
    fill(greedy, 8)
    loop.synic.events[greedy.connection_id]()
    got = len(device.got)
    loop.client.close(greedy)
    loop.run()
    assert device.log == ["opened", "closed"]
    assert len(device.got) <= got + BUDGET


PAIRS = MAX_INBOX // 2


def flood(loop: Any) -> list[int]:
    """Run the deferred calls one by one; how many messages of the guest each of them took."""
    taken = []
    while loop.deferred:
        before = len(loop.host.inbox)
        loop._run_deferred()
        taken.append(before - len(loop.host.inbox))
        while loop.synic.messages:
            loop._deliver_message()
    assert not loop.host.inbox
    return taken


def test_messages_are_taken_in_turns(loopback: Any, echo: Any) -> None:
    loop = loopback()
    loop.host.add(echo(1))
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    (guest,) = loop.client.offers.values()
    for number in range(MAX_INBOX):
        assert loop.client.post(wire.GPADL_TEARDOWN, relid=guest.relid, gpadl=number) == 0
    assert len(loop.deferred) == 1
    assert max(flood(loop)) == TURN_MESSAGES
    assert loop.client.count(wire.GPADL_TORNDOWN) == MAX_INBOX


def test_costly_messages_are_taken_one_a_turn(loopback: Any, echo: Any) -> None:
    """OPEN and CLOSE of a large ring, as often as the queue of messages holds."""
    device = echo(1)
    loop = loopback()
    loop.host.add(device)
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    (guest,) = loop.client.offers.values()
    for payload in gpadl_messages(guest.relid, 1, [(8190 * 4096, 0, [2 * (i % 500) for i in range(8190)])]):
        loop.post(payload)
        loop.run()
    for number in range(PAIRS):
        opens = {"openid": number, "ring_gpadl": 1, "target_vp": 0, "downstream_page_offset": 4095}
        assert loop.client.post(wire.OPENCHANNEL, relid=guest.relid, **opens) == 0
        assert loop.client.post(wire.CLOSECHANNEL, relid=guest.relid) == 0
    assert max(flood(loop)) == 1
    assert device.log.count("closed") == PAIRS


@pytest.mark.parametrize(("pages", "a_turn"), [(8000, 1), (40, TURN_MESSAGES)])
def test_a_gpadl_of_many_pages_ends_a_turn(loopback: Any, echo: Any, pages: int, a_turn: int) -> None:
    """Of each GPADL all messages but the last have come; those come together."""
    loop = loopback()
    loop.host.add(echo(1))
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    (guest,) = loop.client.offers.values()
    last = []
    for number in range(2 * TURN_MESSAGES):
        *first, end = gpadl_messages(
            guest.relid, number, [(pages * 4096, 0, [n % 500 for n in range(pages)])]
        )
        for payload in first:
            loop.post(payload)
            loop.run()
        last.append(end)
    for payload in last:
        loop.post(payload)
    assert max(flood(loop)) == a_turn
    assert [m["status"] for m in loop.client.messages if m.kind.type == wire.GPADL_CREATED] == [0] * len(last)


@pytest.mark.parametrize("leave", [wire.INITIATE_CONTACT, wire.UNLOAD], ids=["contact", "unload"])
def test_a_connection_ends_some_channels_a_turn_and_is_answered_behind_the_last(
    loopback: Any, echo: Any, leave: int
) -> None:
    loop = loopback()
    devices = [echo(number) for number in range(1, 20)]
    for device in devices:
        loop.host.add(device)
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    for guest in list(loop.client.offers.values()):
        loop.open(guest)
    if leave == wire.UNLOAD:
        loop.client.post(wire.UNLOAD)
        answer = wire.UNLOAD_RESPONSE
    else:
        loop.client.contact(vmbus.VERSION_WIN10_V5_3)
        answer = wire.VERSION_RESPONSE
    answers = loop.client.count(answer)
    closed = 0
    while loop.deferred:
        ready = devices[-1].io
        if ready is not None and closed:
            assert not ready.send(b"into memory that may be another kernel's")
        loop._run_deferred()
        before, closed = closed, sum(device.log[-1] == "closed" for device in devices)
        assert closed - before <= TURN_CLOSES
        while loop.synic.messages:
            assert closed == len(devices)
            loop._deliver_message()
    assert loop.client.count(answer) == answers + 1


def test_a_reset_of_the_machine_closes_all_at_once(loopback: Any, echo: Any) -> None:
    loop = loopback()
    devices = [echo(number) for number in range(1, 20)]
    for device in devices:
        loop.host.add(device)
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    for guest in list(loop.client.offers.values()):
        loop.open(guest)
    loop.client.post(wire.UNLOAD)
    loop._run_deferred()
    loop.host.reset()
    assert [device.log for device in devices] == [["opened", "closed"]] * len(devices)
    loop.run()


class CountingRam:
    """Guest RAM that counts the views it gives."""

    def __init__(self, memory: GuestMemory) -> None:
        self.contains = memory.contains
        self._memory = memory
        self.views = 0

    def view(self, gpa: int, n: int) -> memoryview:
        self.views += 1
        return self._memory.view(gpa, n)


def test_scattered_pages_cost_nothing_before_they_are_used(memory: GuestMemory) -> None:
    ram = CountingRam(memory)
    scattered = [2 * (page * 7 % 100) for page in range(100)]
    pages = GuestPages(ram, scattered)
    assert ram.views == 0
    pages.write(4096 * 10 - 2, b"data")
    assert pages.read(4096 * 10 - 2, 4) == b"data"
    assert memory.read(scattered[10] * 4096, 2) == b"ta"
    assert ram.views == 2
    pages = GuestPages(ram, range(5, 205))
    assert ram.views == 3
    pages = GuestPages(ram, [250, *range(10, 210)])
    assert sum(map(len, pages.views(0, pages.size))) == pages.size
    assert ram.views <= 3 + 2 + 200 // RUN_PAGES + 1
    for outside in ([3, 1 << 40], [3, 5, 256], [1 << 52, 1]):
        with pytest.raises(GuestMemoryError):
            GuestPages(ram, outside)
