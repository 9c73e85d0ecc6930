"""Channels end to end: open, echo, move, close, break, in fixed and in random order."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from hvkvm.abi import vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.abi.ring import WORD_WRITE_INDEX
from hvkvm.errors import RouteError
from hvkvm.vmbus.server import Server


def ready(loopback: Any, device: Any, **options: Any) -> tuple[Any, Any]:
    loop = loopback(**options)
    loop.host.add(device)
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    return loop, next(iter(loop.client.offers.values()))


@pytest.mark.parametrize("seed", range(25))
def test_every_packet_comes_back_whatever_the_order(loopback: Any, echo: Any, seed: int) -> None:
    """Rings too small for what is under way, on scattered pages, with messages delayed and signals late."""
    random = Random(seed)
    pages = random.sample(range(64, 1024), 64)
    device = echo(1)
    loop, guest = ready(loopback, device, random=random, pages=pages)
    loop.open(guest, out_pages=2, in_pages=3)
    sent = [random.randbytes(8 * random.randrange(1, 150)) for _ in range(200)]
    waiting = list(enumerate(sent))
    for _ in range(200_000):
        for _ in range(random.randrange(4)):
            if waiting and guest.opened.send(waiting[0][1], trans_id=waiting[0][0], flags=waiting[0][0] & 1):
                waiting.pop(0)
        if not loop.step() and not waiting:
            break
    assert not waiting
    assert [packet.trans_id for packet in guest.received] == list(range(200))
    assert [packet.payload for packet in guest.received] == sent
    assert not loop.notes.events


def test_what_was_written_before_the_doorbell_was_there_is_read(loopback: Any, echo: Any) -> None:
    device = echo(1)
    loop, guest = ready(loopback, device)
    loop.client.prepare_rings(guest)
    loop.run()
    loop.client.open(guest)
    guest.opened.send(b"early bird")  # its signal finds no connection yet
    loop.run()
    assert [packet.payload[:10] for packet in device.got] == [b"early bird"]


@pytest.mark.parametrize("seed", range(25))
def test_a_device_hears_of_its_opening_before_anything_else(loopback: Any, echo: Any, seed: int) -> None:
    """A guest rings once it has the result, and the loop may see that before its own deferred call."""
    heard: list[str] = []

    class Listener(echo):  # type: ignore[misc]
        def opened(self, io: Any) -> None:
            heard.append("opened")
            super().opened(io)

        def received(self, packet: Any) -> None:
            heard.append("received")
            super().received(packet)

    loop, guest = ready(loopback, Listener(), random=Random(seed))
    loop.client.prepare_rings(guest)
    loop.run()
    loop.client.open(guest)
    while not loop.synic.events:
        loop.step()
    guest.opened.send(b"at once")
    loop._deliver_doorbell()
    loop.run()
    assert heard == ["opened", "received"]


def test_signals_per_packet_are_few(loopback: Any, echo: Any) -> None:
    loop, guest = ready(loopback, echo(1))
    loop.open(guest, out_pages=8, in_pages=8)
    with guest.opened:
        for _ in range(200):
            guest.opened.send(b"x" * 64)
    loop.run()
    assert len(guest.received) == 200
    assert len(loop.synic.rung) == 1
    assert len(loop.synic.flags_set) <= 2


def test_interrupts_follow_the_target_vp(loopback: Any, echo: Any) -> None:
    loop, guest = ready(loopback, echo(1))
    loop.open(guest, vp_index=0)
    guest.opened.send(b"a")
    loop.run()
    loop.client.post(wire.MODIFYCHANNEL, relid=guest.relid, target_vp=1)
    loop.run()
    assert loop.client.last(wire.MODIFYCHANNEL_RESPONSE)["status"] == 0
    guest.opened.send(b"b")
    loop.run()
    assert [vp for vp, _sint, _flag in loop.synic.flags_set] == [0, 1]
    loop.client.post(wire.MODIFYCHANNEL, relid=guest.relid, target_vp=77)
    loop.client.post(wire.MODIFYCHANNEL, relid=1999, target_vp=0)
    loop.run()
    assert loop.client.count(wire.MODIFYCHANNEL_RESPONSE) == 3
    assert loop.client.last(wire.MODIFYCHANNEL_RESPONSE)["status"] != 0


def test_a_polling_guest_is_not_interrupted(loopback: Any, echo: Any) -> None:
    loop, guest = ready(loopback, echo(1))
    loop.open(guest, vp_index=vmbus.VP_INVALID)
    guest.opened.send(b"a")
    loop.run()
    assert loop.synic.flags_set == []
    guest.interrupt()
    assert len(guest.received) == 1


def test_open_close_and_open_again(loopback: Any, echo: Any) -> None:
    device = echo(1)
    loop, guest = ready(loopback, device)
    for _ in range(10):
        loop.open(guest)
        guest.opened.send(b"hello")
        loop.run()
        loop.client.close(guest)
        loop.run()
        assert loop.client.last(wire.GPADL_TORNDOWN)["gpadl"] == guest.gpadl
        loop.client.reclaim(guest)
    assert len(device.got) == 10
    assert device.log == ["opened", "closed"] * 10


def test_s61_a_broken_channel_ends_alone_with_one_line(loopback: Any, echo: Any) -> None:
    bad, good = echo(1), echo(2)
    loop = loopback()
    loop.host.add(bad)
    loop.host.add(good)
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    first, second = loop.client.offers.values()
    loop.open(first)
    loop.open(second)
    first.opened.writer.words[WORD_WRITE_INDEX] = 0xFFFFFFFF
    for _ in range(5):
        loop.synic.signal(first.connection_id)
        loop.run()
    assert bad.log == ["opened", "closed"]
    assert first.rescinded
    assert len(loop.notes.events) == 1
    assert "write index 0xffffffff" in str(loop.notes.events[0])
    second.opened.send(b"still here")
    loop.run()
    assert len(second.received) == 1


def test_s61_a_ring_that_was_closed_meanwhile_breaks_nothing(loopback: Any, echo: Any) -> None:
    """The guest closes a broken ring and opens another before the host has come to ending the channel."""
    loop, guest = ready(loopback, echo(1))
    loop.open(guest)
    broken = guest.opened
    loop.client.prepare_rings(guest)
    loop.run()
    loop.client.post(wire.CLOSECHANNEL, relid=guest.relid)
    loop.client.open(guest)
    broken.writer.words[WORD_WRITE_INDEX] = 0xFFFFFFFF
    loop.synic.signal(guest.connection_id)
    loop._deliver_doorbell()
    loop.run()
    assert not guest.rescinded
    guest.opened.send(b"anew")
    loop.run()
    assert [packet.payload[:4] for packet in guest.received] == [b"anew"]


@pytest.mark.parametrize("opened", [False, True])
def test_only_an_open_channel_moves(loopback: Any, echo: Any, opened: bool) -> None:
    loop, guest = ready(loopback, echo(1))
    if opened:
        loop.open(guest)
    loop.client.post(wire.MODIFYCHANNEL, relid=guest.relid, target_vp=1)
    loop.run()
    assert (loop.client.last(wire.MODIFYCHANNEL_RESPONSE)["status"] == 0) == opened


def test_a_bus_has_as_many_channels_as_relids_and_an_old_relid_comes_back_last(echo: Any) -> None:
    server = Server(lambda gpa, size: True, 1)
    server.connect(vmbus.VERSION_WIN10_V5_3, 0, b"", (0, 2))
    server.channels.offering = True
    offers = [echo().offer._replace(instance=number.to_bytes(16, "little")) for number in range(2049)]
    channels = [server.offer(offer) for offer in offers[:3]]
    message = wire.parse(wire.build(wire.RELID_RELEASED, relid=channels[2].relid))
    assert message is not None
    server.rescind(channels[2])
    server.receive(message)
    more = [server.offer(offer) for offer in offers[3:2048]]
    assert [channel.relid for channel in (*channels[:2], *more)] == [1, 2, *range(4, 2048), 3]
    with pytest.raises(ValueError, match="at most 2047 channels"):
        server.offer(offers[2048])


def test_a_move_that_the_host_cannot_make_is_refused_and_the_old_vp_stays(
    loopback: Any, echo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = loopback()
    loop.host.add(echo())
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    (channel,) = loop.client.offers.values()
    loop.open(channel)
    real, full = loop.synic.open_route, [True]

    def open_route(vp_index: int, *rest: Any) -> Any:
        if full[0] and vp_index == 1:
            raise RouteError("Too many open files")
        return real(vp_index, *rest)

    monkeypatch.setattr(loop.synic, "open_route", open_route)

    def move() -> int:
        loop.client.post(wire.MODIFYCHANNEL, relid=channel.relid, target_vp=1)
        loop.run()
        status: int = loop.client.last(wire.MODIFYCHANNEL_RESPONSE)["status"]
        return status

    assert move() == vmbus.STATUS_INSUFFICIENT_RESOURCES
    (described,) = loop.host.snapshot()["channels"]
    assert (described["target_vp"], described["open"]["interrupt_vp"]) == (0, 0)
    full[0] = False
    assert move() == 0
    (described,) = loop.host.snapshot()["channels"]
    assert (described["target_vp"], described["open"]["interrupt_vp"]) == (1, 1)
    assert loop.client.count(wire.MODIFYCHANNEL_RESPONSE) == 2


def break_ring(loop: Any, channel: Any) -> None:
    channel.opened.writer.words[WORD_WRITE_INDEX] = 0xFFFFFFFF
    loop.synic.signal(channel.connection_id)
    loop.run()
    assert channel.rescinded


@pytest.mark.parametrize("released", [False, True])
def test_what_one_guest_broke_the_next_is_offered_again(loopback: Any, echo: Any, released: bool) -> None:
    loop = loopback()
    device = echo()
    loop.host.add(device)
    loop.connect(vmbus.VERSION_WIN10)
    for _ in range(3):
        (channel,) = loop.client.offers.values()
        loop.open(channel)
        break_ring(loop, channel)
        if released:
            loop.client.release(channel)
            loop.run()
            loop.client.post(wire.REQUESTOFFERS)
            loop.run()
            assert not loop.client.offers  # not to this one, which would break it again
        loop.connect(vmbus.VERSION_WIN10)
    (channel,) = loop.client.offers.values()
    loop.open(channel)
    channel.opened.send(b"12345678")
    loop.run()
    assert len(device.got) == 1


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("anew", [False, True])
def test_what_the_host_takes_back_stays_away_broken_or_not(
    loopback: Any, echo: Any, released: bool, anew: bool
) -> None:
    loop = loopback()
    taken = loop.host.add(echo())
    loop.connect(vmbus.VERSION_WIN10)
    (channel,) = loop.client.offers.values()
    loop.open(channel)
    break_ring(loop, channel)
    if released:
        loop.client.release(channel)
        loop.run()
    if anew:  # a twin, as by a device that is plugged in again
        loop.host.add(echo())
    else:
        loop.host.remove(taken)
    loop.connect(vmbus.VERSION_WIN10)
    assert len(loop.client.offers) == len(loop.host.server.channels.all) == anew
    assert len(loop.host.devices._devices) == anew
