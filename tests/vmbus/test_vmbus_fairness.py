"""Fairness on the I/O loop, in units of work: whatever a guest does, others wait for a bounded turn."""

from __future__ import annotations

from typing import Any

from hvkvm.abi import vmbus
from hvkvm.vmbus.channel_io import BUDGET, BUDGET_BYTES


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


def test_a_turn_that_is_pending_ends_with_its_channel(loopback: Any, echo: Any) -> None:
    loop, greedy, _, device, _ = two_channels(loopback, echo)
    fill(greedy, 8)
    loop.synic.events[greedy.connection_id]()
    got = len(device.got)
    loop.client.close(greedy)
    loop.run()
    assert device.log == ["opened", "closed"]
    assert len(device.got) <= got + BUDGET
