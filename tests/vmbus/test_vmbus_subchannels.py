"""Sub-channels: offered by their device, gone with their primary, and back in a restored machine."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from saved_bus import swap

from hvkvm.abi import vmbus
from hvkvm.testing.vmbus_loopback import Loopback
from hvkvm.vmbus.channel_io import ChannelIo

MOST = 3


class ManyState(NamedTuple):
    notes: tuple[str, ...]


def many(echo: type[Any]) -> Any:
    """An echo with sub-channels that echo too, and say who they are."""

    class Sub(echo):  # type: ignore[misc]
        State = ManyState

        def received(self, packet: Any) -> None:
            super().received(
                packet._replace(payload=packet.payload[:7] + b"%d" % self.offer.sub_channel_index)
            )

        def load(self, io: ChannelIo | None, state: None) -> None:
            assert state is None, "a sub-channel's state is its primary's"
            self.io = io

        def save(self) -> ManyState:
            raise AssertionError("a sub-channel's state is its primary's")

    class Many(echo):  # type: ignore[misc]
        State = ManyState

        def __init__(self, number: int = 1) -> None:
            super().__init__(number)
            self.number = number
            self.subs: Any = None
            self.made: dict[int, Any] = {}

        def bind(self, sub_channels: Any) -> None:
            self.subs = sub_channels

        def sub_channel(self, index: int) -> Any:
            if not 1 <= index <= MOST:
                raise ValueError(f"no sub-channel {index}")
            self.made[index] = Sub(self.number, index=index)
            return self.made[index]

        def save(self) -> ManyState:
            return ManyState(tuple(self.log))

        def load(self, io: ChannelIo | None, state: ManyState) -> None:
            self.io, self.log = io, list(state.notes)

    return Many


def opened(loop: Loopback, device: Any) -> Any:
    loop.host.add(device)
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    channel = loop.client.by_interface(device.offer.interface)
    loop.open(channel)
    return channel


def subs(loop: Loopback) -> list[Any]:
    return [c for c in loop.client.offers.values() if c.offer["sub_channel_index"] and not c.rescinded]


def says(loop: Loopback, channel: Any) -> bytes:
    channel.received.clear()
    channel.opened.send(b"who?....")
    loop.run()
    (packet,) = channel.received
    payload: bytes = packet.payload
    return payload


def test_sub_channels_come_when_the_device_says_and_carry_packets(loopback: Any, echo: Any) -> None:
    loop = loopback()
    device = many(echo)()
    loop.host.add(device)
    assert not device.subs.add(1), "there is no primary open"
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    primary = loop.client.by_interface(device.offer.interface)
    assert not device.subs.add(1)
    loop.open(primary)
    assert device.subs.add(1)
    assert device.subs.add(2)
    assert not device.subs.add(2), "it is offered already"
    with pytest.raises(ValueError, match="no sub-channel 4"):
        device.subs.add(4)
    loop.run()
    assert [c.offer["sub_channel_index"] for c in subs(loop)] == [1, 2]
    for channel in subs(loop):
        loop.open(channel, vp_index=1)
        assert says(loop, channel) == b"who?...%d" % channel.offer["sub_channel_index"]
    assert says(loop, primary) == b"who?...."
    device.subs.remove(1)
    loop.run()
    assert [c.offer["sub_channel_index"] for c in subs(loop)] == [2]
    assert not loop.notes.events


@pytest.mark.parametrize("subs_first", [True, False])
def test_they_go_with_their_primary_and_come_when_asked(loopback: Any, echo: Any, subs_first: bool) -> None:
    loop = loopback()
    device = many(echo)()
    primary = opened(loop, device)
    for round_ in range(3):
        for index in (1, 2, 3):
            assert device.subs.add(index)
        loop.run()
        offered = subs(loop)
        assert len(offered) == MOST
        for channel in offered[:2]:  # the third is never opened
            loop.open(channel)
        if subs_first:  # as Linux does
            for channel in offered[:2]:
                loop.client.close(channel)
        loop.client.close(primary)
        loop.run()
        assert all(channel.rescinded for channel in offered)
        assert [one.log for one in device.made.values()] == [["opened", "closed"]] * 2 + [[]]
        assert len(loop.synic.events) == 0
        for channel in offered:
            loop.client.release(channel)
        loop.run()
        assert len(loop.host.server.channels.all) == len(list(loop.host.devices)) == 1, round_
        assert not subs(loop)
        loop.open(primary)
    assert not loop.notes.events


@pytest.mark.parametrize("leaves_by", ["contact", "reset"])
def test_the_next_kernel_is_not_offered_them(loopback: Any, echo: Any, leaves_by: str) -> None:
    loop = loopback()
    device = many(echo)()
    opened(loop, device)
    device.subs.add(1)
    device.subs.add(2)
    loop.run()
    loop.open(subs(loop)[0])
    if leaves_by == "reset":
        loop.host.stop(lambda: None)
        loop.host.reset()
        loop.host.go_on()
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    assert [c.offer["sub_channel_index"] for c in loop.client.offers.values()] == [0]
    assert len(list(loop.host.devices)) == 1


def test_a_broken_sub_channel_ends_its_device_for_this_guest(loopback: Any, echo: Any) -> None:
    loop = loopback()
    device = many(echo)()
    primary = opened(loop, device)
    device.subs.add(1)
    loop.run()
    (sub,) = subs(loop)
    loop.open(sub)
    sub.opened.writer.words[0] = 12345  # no index of a ring
    loop.synic.signal(sub.connection_id)
    loop.run()
    assert sub.rescinded
    assert primary.rescinded
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    assert [c.offer["sub_channel_index"] for c in loop.client.offers.values()] == [0]


@pytest.mark.usefixtures("mistakes_are_ours")
def test_a_fault_in_a_sub_channel_ends_its_device(loopback: Any, echo: Any) -> None:
    loop = loopback()
    device = many(echo)()
    primary = opened(loop, device)
    device.subs.add(1)
    loop.run()
    (sub,) = subs(loop)
    device.made[1].received = lambda _packet: 1 // 0
    loop.open(sub)
    sub.opened.send(b"12345678")
    loop.run()
    assert sub.rescinded
    assert primary.rescinded
    assert device.log == ["opened", "closed"]
    assert device.made[1].log == ["opened", "closed"]


def test_a_restored_machine_has_them_open(loopback: Any, echo: Any) -> None:
    loop = loopback()
    device = many(echo)()
    primary = opened(loop, device)
    device.subs.add(1)
    device.subs.add(2)
    loop.run()
    sub, unopened = subs(loop)
    loop.open(sub, vp_index=1)
    swapped = many(echo)()
    swap(loop, [swapped])
    loop.run()
    assert says(loop, primary) == b"who?...."
    assert says(loop, sub) == b"who?...1"
    loop.open(unopened)
    assert says(loop, unopened) == b"who?...2"
    assert swapped.subs.add(3)
    loop.client.close(primary)
    loop.run()
    assert sub.rescinded
    assert unopened.rescinded
    assert not loop.notes.events


def test_a_sub_channel_that_a_device_never_has_is_rescinded(loopback: Any, echo: Any) -> None:
    loop = loopback()
    device = many(echo)()
    opened(loop, device)
    device.subs.add(1)
    loop.run()
    (sub,) = subs(loop)

    def more(tree: Any) -> Any:
        tree["server"]["channels"][1]["offer"]["sub_channel_index"] = 77
        return tree

    swap(loop, [many(echo)()], more)
    loop.run()
    assert sub.rescinded


@pytest.mark.parametrize("change", ["two", "no primary"])
def test_made_up_sub_channels_harm_nobody(loopback: Any, echo: Any, change: str) -> None:
    loop = loopback()
    device = many(echo)()
    opened(loop, device)
    device.subs.add(1)
    loop.run()

    def changed(tree: Any) -> Any:
        channels = tree["server"]["channels"]
        if change == "two":
            channels.append({**channels[1], "relid": 77})
        else:
            del channels[0]
            tree["server"]["gpadls"] = [one for one in tree["server"]["gpadls"] if one["relid"] != 1]
        return tree

    swap(loop, [many(echo)()], changed)
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    assert [c.offer["sub_channel_index"] for c in loop.client.offers.values()] == [0]
