"""OPENCHANNEL: what is refused, what a guest of 6.0 may choose, and a channel that goes while it opens."""

from __future__ import annotations

from typing import Any

import pytest

from hvkvm.abi import vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.testing.vmbus_client import GuestChannel
from hvkvm.vmbus.offer import ChannelState


def ready(loopback: Any, device: Any, **options: Any) -> tuple[Any, Any]:
    loop = loopback(**options)
    loop.host.add(device)
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    return loop, next(iter(loop.client.offers.values()))


REFUSED = {
    "no such channel": {"relid": 99},
    "no such gpadl": {"ring_gpadl": 1},
    "no room for the first ring": {"downstream_page_offset": 1},
    "no room for the second ring": {"downstream_page_offset": 3},
    "split beyond the end": {"downstream_page_offset": 0xFFFFFFFF},
    "no such VP": {"target_vp": 2},
}


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_opens_are_answered(loopback: Any, echo: Any, name: str) -> None:
    device = echo(1)
    loop, guest = ready(loopback, device)
    loop.client.prepare_rings(guest)
    fields = {
        "relid": guest.relid,
        "openid": 1234,
        "ring_gpadl": guest.gpadl,
        "target_vp": 0,
        "downstream_page_offset": 2,
    }
    loop.client.post(wire.OPENCHANNEL, **(fields | REFUSED[name]))
    loop.run()
    result = loop.client.last(wire.OPENCHANNEL_RESULT)
    assert result["status"] != 0
    assert result["openid"] == 1234
    assert device.log == []
    loop.client.post(wire.OPENCHANNEL, **fields)
    loop.client.post(wire.OPENCHANNEL, **fields)  # open already
    loop.run()
    results = [m for m in loop.client.messages if m.kind.type == wire.OPENCHANNEL_RESULT]
    assert [bool(m["status"]) for m in results] == [True, False, True]
    assert [m["openid"] for m in results] == [1234] * 3
    (channel,) = loop.host.server.channels.all
    assert (channel.state, device.log) == (ChannelState.OPEN, ["opened"]), "which it stays"


def test_an_open_that_crosses_a_rescind_is_refused(loopback: Any, echo: Any) -> None:
    device = echo(1)
    loop, guest = ready(loopback, device)
    loop.client.prepare_rings(guest)
    loop.run()
    loop.host.remove(loop.host.server.channels.all[0])
    loop.client.open(guest)
    loop.run()
    assert loop.client.last(wire.OPENCHANNEL_RESULT)["status"] != 0
    assert (device.log, loop.synic.events) == ([], {})


def test_a_6_0_guest_chooses_its_signals(loopback: Any, echo: Any) -> None:
    loop = loopback()
    loop.host.add(echo(1))
    loop.connect(vmbus.VERSION_COPPER, features=vmbus.FEATURE_GUEST_SPECIFIED_SIGNAL_PARAMETERS)
    (guest,) = loop.client.offers.values()
    loop.client.prepare_rings(guest)
    others = vmbus.CHANNEL_CONNECTION_ID_BASE | vmbus.MAX_RELID
    for connection_id, event_flag in ((4, 9), (1 << 24, 9), (0x3000, 2048), (others, 9)):
        loop.client.open(guest, connection_id=connection_id, event_flag=event_flag)
        loop.run()
        assert loop.client.last(wire.OPENCHANNEL_RESULT)["status"] != 0
    loop.client.open(guest, connection_id=0x3000, event_flag=9)
    loop.run()
    assert loop.client.last(wire.OPENCHANNEL_RESULT)["status"] == 0
    guest.opened.send(b"x")
    loop.run()
    assert loop.synic.rung == [0x3000]
    assert loop.synic.flags_set == [(0, 2, 9)]
    (channel,) = loop.host.server.channels.all
    for own in (guest.connection_id, 0):
        loop.client.close(guest)
        loop.client.prepare_rings(guest)
        loop.client.open(guest, connection_id=own, event_flag=2047)
        loop.run()
        assert loop.client.last(wire.OPENCHANNEL_RESULT)["status"] == 0
        assert (channel.connection_id, channel.event_flag) == (guest.connection_id, 2047)


@pytest.mark.parametrize("version", [vmbus.VERSION_WIN10_V5_3, vmbus.VERSION_COPPER])
def test_signals_that_were_not_negotiated_are_padding(loopback: Any, echo: Any, version: int) -> None:
    """UEFI sends 240 bytes whatever it says in them."""
    loop = loopback()
    loop.host.add(echo(1))
    loop.connect(version)
    (guest,) = loop.client.offers.values()
    loop.client.prepare_rings(guest)
    payload = wire.build(
        wire.OPENCHANNEL,
        relid=guest.relid,
        openid=1,
        ring_gpadl=guest.gpadl,
        target_vp=0,
        downstream_page_offset=2,
        connection_id=4,
        event_flag=4000,
    )
    assert len(payload) == 156
    loop.post(payload)
    loop.run()
    assert loop.client.last(wire.OPENCHANNEL_RESULT)["status"] == 0
    (channel,) = loop.host.server.channels.all
    assert (channel.connection_id, channel.event_flag) == (guest.connection_id, guest.relid)


def test_a_chosen_doorbell_is_taken_while_its_channel_is_open(loopback: Any, echo: Any) -> None:
    loop = loopback()
    for number in (1, 2):
        loop.host.add(echo(number))
    loop.connect(vmbus.VERSION_COPPER, features=vmbus.FEATURE_GUEST_SPECIFIED_SIGNAL_PARAMETERS)
    first, second = loop.client.offers.values()

    def opens(guest: GuestChannel) -> bool:
        loop.client.prepare_rings(guest)
        loop.client.open(guest, connection_id=0x3000, event_flag=9)
        loop.run()
        return bool(loop.client.last(wire.OPENCHANNEL_RESULT)["status"] == 0)

    assert opens(first)
    assert not opens(second)
    loop.client.close(first)
    loop.run()
    assert opens(second)
    assert not opens(first)


def test_a_channel_that_is_taken_back_while_it_opens_is_answered(loopback: Any, echo: Any) -> None:
    loop, guest = ready(loopback, echo(1))
    loop.client.prepare_rings(guest)
    loop.run()
    server = loop.host.server
    (channel,) = server.channels.all
    message = wire.parse(
        wire.build(
            wire.OPENCHANNEL, relid=guest.relid, ring_gpadl=guest.gpadl, downstream_page_offset=2, openid=5
        )
    )
    assert message is not None
    server.receive(message)
    assert channel.state is ChannelState.OPENING
    server.rescind(channel)
    kinds = [type(action).__name__ for action in server.take()]
    assert kinds == ["OpenChannel", "SendMessage", "CloseChannel", "SendMessage"]
    server.opened(channel)  # too late
    assert server.take() == []
    server.receive(message)  # crosses our RESCIND: answered, for its sender waits, and nobody's mistake
    assert [type(action).__name__ for action in server.take()] == ["SendMessage"]
    assert server.reports.total == 0
    released = wire.parse(wire.build(wire.RELID_RELEASED, relid=guest.relid))
    assert released is not None
    server.receive(released)
    assert channel in server.channels.all  # its device still runs
    server.closed(channel)
    assert server.channels.all == []


def test_a_channel_that_the_guest_closes_while_it_opens_is_answered(loopback: Any, echo: Any) -> None:
    loop, guest = ready(loopback, echo(1))
    loop.client.prepare_rings(guest)
    loop.run()
    server = loop.host.server
    (channel,) = server.channels.all
    fields = {"ring_gpadl": guest.gpadl, "downstream_page_offset": 2, "openid": 5}

    def says(kind: int, **more: int) -> list[str]:
        message = wire.parse(wire.build(kind, relid=guest.relid, **more))
        assert message is not None
        server.receive(message)
        actions = server.take()
        for action in actions:
            if type(action).__name__ == "SendMessage":
                answer = wire.parse(action.payload)
                assert answer is not None
                assert (answer["openid"], answer["status"]) == (5, vmbus.STATUS_UNSUCCESSFUL)
        return [type(action).__name__ for action in actions]

    assert says(wire.OPENCHANNEL, **fields) == ["OpenChannel"]
    assert says(wire.RELID_RELEASED) == [], "in use"
    assert says(wire.CLOSECHANNEL) == ["SendMessage", "CloseChannel"]
    assert says(wire.CLOSECHANNEL) == [], "once"
    assert server.reports.total == 2
    server.closed(channel)
    assert says(wire.OPENCHANNEL, **fields) == ["OpenChannel"]
