"""A host saved at any moment and gone on with by another: the guest's client cannot tell."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from struct import pack, unpack
from typing import Any, NamedTuple

import pytest
from saved_bus import swap

from hvkvm.abi import ic, vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.abi.ring import Packet
from hvkvm.devices.synth.heartbeat import Heartbeat
from hvkvm.devices.synth.kvp import Kvp
from hvkvm.devices.synth.shutdown import Shutdown
from hvkvm.devices.synth.timesync import TimeSync
from hvkvm.devices.synth.vss import Vss
from hvkvm.errors import StateError
from hvkvm.testing.ic_driver import IcDriver
from hvkvm.testing.vmbus_loopback import Loopback
from hvkvm.vmbus.channel_io import ChannelIo


class SavedPacket(NamedTuple):
    type: int
    flags: int
    trans_id: int
    payload: bytes


class EchoState(NamedTuple):
    backlog: tuple[SavedPacket, ...]


def saving(echo: type[Any]) -> type[Any]:
    class SavingEcho(echo):  # type: ignore[misc]
        State = EchoState

        def save(self) -> EchoState:
            return EchoState(tuple(SavedPacket(p.type, p.flags, p.trans_id, p.payload) for p in self.backlog))

        def load(self, io: ChannelIo | None, state: EchoState) -> None:
            self.io = io
            self.backlog = [Packet(p.type, p.flags, p.trans_id, b"", p.payload) for p in state.backlog]

    return SavingEcho


@pytest.mark.parametrize("seed", range(12))
def test_echoes_come_once_and_in_order_through_many_hosts(loopback: Any, echo: type[Any], seed: int) -> None:
    random = Random(seed)
    saving_echo = saving(echo)
    loop: Loopback = loopback(random=random)
    loop.host.add(saving_echo())
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    channel = loop.client.by_interface(echo().offer.interface)
    loop.open(channel)
    sent = 0
    swaps = 0
    while sent < 400 or loop.step():
        if sent < 400 and random.random() < 0.5:
            sent += channel.opened.send(pack("<Q", sent), trans_id=sent)
        for _ in range(random.randrange(6)):
            loop.step()
        if random.random() < 0.1:
            swap(loop, [saving_echo()])
            swaps += 1
    loop.run()
    got = [unpack("<Q", packet.payload)[0] for packet in channel.received]
    assert got == list(range(400))
    assert swaps > 5
    assert not loop.notes.events


@pytest.mark.parametrize("connected", [False, True])
def test_offers_come_in_the_order_that_they_had(loopback: Any, echo: type[Any], connected: bool) -> None:
    """Linux names disks by it: a machine that was booted again had them the other way round."""
    saving_echo = saving(echo)
    loop: Loopback = loopback()
    for number in (3, 1, 2):
        loop.host.add(saving_echo(number))
    if connected:
        loop.connect(vmbus.VERSION_WIN10_V5_3)
    swap(loop, [saving_echo(number) for number in (1, 2, 3)])
    if connected:
        loop.host.reset()
        loop.client.offers.clear()
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    instances = [channel.offer["instance"] for channel in loop.client.offers.values()]
    assert instances == [echo(number).offer.instance for number in (3, 1, 2)]


def test_doorbells_that_a_6_0_guest_chose_are_saved(loopback: Any, echo: type[Any]) -> None:
    """Whatever it may choose: a file with another channel's own doorbell would be refused."""
    saving_echo = saving(echo)
    loop: Loopback = loopback()
    for number in (1, 2):
        loop.host.add(saving_echo(number))
    loop.connect(vmbus.VERSION_COPPER, features=vmbus.FEATURE_GUEST_SPECIFIED_SIGNAL_PARAMETERS)
    first, second = loop.client.offers.values()
    for channel, chosen in ((second, 0x3000), (first, second.connection_id), (first, 0x3001)):
        loop.client.prepare_rings(channel)
        loop.client.open(channel, connection_id=chosen, event_flag=channel.relid)
        loop.run()
    swap(loop, [saving_echo(1), saving_echo(2)])
    for channel in (first, second):
        channel.opened.send(b"still here")
        loop.run()
        assert [packet.payload[:10] for packet in channel.received] == [b"still here"]


@pytest.mark.parametrize("seed", range(6))
def test_a_connection_survives_while_it_is_made(loopback: Any, echo: type[Any], seed: int) -> None:
    """Swapped between any two steps of contact, offers, GPADLs in many messages, opening and closing."""
    random = Random(seed)
    saving_echo = saving(echo)
    loop: Loopback = loopback(random=random)
    devices = lambda: [saving_echo(number) for number in (1, 2, 3)]  # noqa: E731
    for device in devices():
        loop.host.add(device)
    step = loop.step

    def stepping() -> bool:
        happened = step()
        if random.random() < 0.15:
            swap(loop, devices())
            return True
        return happened

    loop.step = stepping  # type: ignore[method-assign]
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    channels = list(loop.client.offers.values())
    assert len(channels) == 3
    for channel in channels:
        loop.open(channel, out_pages=40, in_pages=40)
        channel.opened.send(b"hello...")
        loop.run()
        assert [packet.payload for packet in channel.received] == [b"hello..."]
        loop.client.close(channel)
        loop.run()
        loop.client.reclaim(channel)
        loop.run()
        assert loop.client.last(wire.GPADL_TORNDOWN)
    assert not loop.notes.events
    loop.client.post(wire.UNLOAD)
    loop.run()
    assert loop.client.count(wire.UNLOAD_RESPONSE) == 1


def test_a_channel_without_its_device_is_rescinded(loopback: Any, echo: type[Any]) -> None:
    loop: Loopback = loopback()
    loop.host.add(echo(1))
    loop.host.add(echo(2))
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    first, second = loop.client.offers.values()
    loop.open(first)
    loop.open(second)
    swap(loop, [echo(2)])
    loop.run()
    assert loop.client.last(wire.RESCIND_CHANNELOFFER)["relid"] == first.relid
    assert loop.client.count(wire.RESCIND_CHANNELOFFER) == 1
    loop.client.release(first)
    loop.run()
    second.opened.send(b"still he")
    loop.run()
    assert [packet.payload for packet in second.received] == [b"still he"]
    assert len(loop.host.server.channels.all) == 1


def test_a_device_that_comes_while_the_machine_is_at_rest_is_offered(loopback: Any, echo: type[Any]) -> None:
    loop: Loopback = loopback()
    loop.host.add(echo(1))
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    swap(loop, [echo(1), echo(2)], at_rest=lambda: loop.host.add(echo(2)))
    loop.run()
    _first, second = loop.client.offers.values()
    loop.open(second)
    second.opened.send(b"now here")
    loop.run()
    assert [packet.payload for packet in second.received] == [b"now here"]


def test_a_device_that_goes_while_the_machine_is_at_rest_is_rescinded(loopback: Any, echo: type[Any]) -> None:
    loop: Loopback = loopback()
    gone = loop.host.add(echo(1))
    loop.host.add(echo(2))
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    first, second = loop.client.offers.values()
    loop.open(first)
    loop.open(second)
    swap(loop, [echo(2)], at_rest=lambda: loop.host.remove(gone))
    loop.run()
    assert loop.client.last(wire.RESCIND_CHANNELOFFER)["relid"] == first.relid
    assert loop.client.count(wire.RESCIND_CHANNELOFFER) == 1
    second.opened.send(b"still he")
    loop.run()
    assert [packet.payload for packet in second.received] == [b"still he"]


def test_what_a_device_still_closes_is_not_saved(loopback: Any, echo: type[Any]) -> None:
    """A file would say that its channel is neither open nor closed, and nothing could go on from it."""

    class Slow(echo):  # type: ignore[misc]
        def close(self, done: Callable[[], object]) -> None:
            closing.append(done)

    closing: list[Callable[[], object]] = []
    loop: Loopback = loopback()
    channel = loop.host.add(Slow(1))
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    loop.open(*loop.client.offers.values())
    loop.host.stop(lambda: None)
    loop.host.remove(channel)
    with pytest.raises(StateError, match=r"is closing; save again"):
        loop.host.save()
    closing[0]()
    loop.host.save()


def test_a_ring_that_broke_on_the_way_to_rest_is_left_alone_until_the_machine_goes_on(
    loopback: Any, echo: type[Any]
) -> None:
    loop: Loopback = loopback()
    channel = loop.host.add(echo(1))
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    (offer,) = loop.client.offers.values()
    loop.open(offer)
    opened = loop.host.devices.opened(channel)
    opened.io.reader.broken = "a rule"
    opened.io.again()
    loop.host.stop(lambda: None)

    def rings() -> list[bytes]:
        return [bytes(loop.memory.read(page * 4096, 4096)) for page in offer.pages]

    before, raised = rings(), len(loop.synic.flags_set)
    while loop.deferred:
        loop._run_deferred()
    assert rings() == before
    assert len(loop.synic.flags_set) == raised
    assert loop.host.server.reports.total == 0
    loop.host.go_on()
    loop.run()
    assert loop.host.server.reports.counts == {"channel broken": 1}
    assert loop.client.last(wire.RESCIND_CHANNELOFFER)["relid"] == offer.relid


def made(loop: Loopback, name: str) -> tuple[Any, ic.Version]:
    devices: dict[str, tuple[Any, ic.Version]] = {
        "heartbeat": (Heartbeat(loop.call_later), (3, 0)),
        "shutdown": (Shutdown(), (3, 2)),
        "timesync": (TimeSync(loop.call_later, lambda: 7), (4, 0)),
        "kvp": (Kvp(), (4, 0)),
        "vss": (Vss(loop.call_later), (5, 0)),
    }
    return devices[name]


@pytest.mark.parametrize("name", ["heartbeat", "shutdown", "timesync", "kvp", "vss"])
@pytest.mark.parametrize("answered", [False, True])
def test_a_component_goes_on_with_what_was_agreed(loopback: Any, name: str, answered: bool) -> None:
    loop: Loopback = loopback()
    device, version = made(loop, name)
    driver = IcDriver(loop, device, version)
    if answered:
        driver.negotiate()
        driver.serve(lambda _body: (0, None))
    again, _ = made(loop, name)
    swap(loop, [again])
    loop.run()
    if not answered:
        assert not again.ready_for_requests
        driver.negotiate()  # the question was asked by the host before
    assert again.message_version == version
    assert again.frame_version == device.frame_version or not answered
    asked: list[int] = []
    assert again.ask(3, b"x" * 8, lambda status, _body: asked.append(status))
    driver.serve(lambda _body: (0, None))
    loop.advance(10)
    driver.serve(lambda _body: (0, None))
    assert asked == [0]


def test_a_guest_that_was_saved_frozen_is_thawed(loopback: Any) -> None:
    loop: Loopback = loopback()
    device, version = made(loop, "vss")
    driver = IcDriver(loop, device, version)
    driver.negotiate()
    device.freeze(lambda _result: None)
    driver.serve(lambda _body: (0, None))
    assert device.state == "frozen"
    again, _ = made(loop, "vss")
    swap(loop, [again])
    operations: list[int] = []
    loop.advance(3)
    driver.serve(lambda body: (operations.append(body[0]) or 0, None))
    assert len(operations) == 1
    assert again.state == "thawed"


def test_a_restored_guest_is_told_the_time_at_once(loopback: Any) -> None:
    loop: Loopback = loopback()
    device, version = made(loop, "timesync")
    driver = IcDriver(loop, device, version)
    driver.negotiate()
    driver.serve(lambda _body: (0, None))
    again, _ = made(loop, "timesync")
    swap(loop, [again])
    loop.run()
    assert driver.requests()
    assert again.sent["sync"] == 1


CHANGES: list[tuple[Callable[[Any], object], str]] = [
    (lambda t: t["server"].update(version=0x99), "speaks 0x99"),
    (lambda t: t["server"].update(features=1 << 40), "this host does not"),
    (lambda t: t["server"].update(target=[9, 2]), "VP 9"),
    (lambda t: t["server"].update(target=[0, 16]), "SINT 16"),
    (lambda t: t["server"]["channels"][0].update(relid=0), "relid 0"),
    (lambda t: t["server"]["channels"][0].update(relid=5000), "relid 5000"),
    (lambda t: t["server"]["channels"].append(t["server"]["channels"][0]), "relid 1"),
    (lambda t: t["server"]["channels"][0].update(state="opening"), "is opening"),
    (lambda t: t["server"]["channels"][0].update(split=0), "ring split"),
    (lambda t: t["server"]["channels"][0].update(target_vp=77), "no VP 77"),
    (lambda t: t["server"]["channels"][0].update(ring_gpadl=1), "no whole pages"),
    (lambda t: t["server"]["channels"][0]["offer"].update(interface="AA=="), "no GUIDs"),
    (lambda t: t["server"]["channels"][0]["offer"].update(flags=1 << 17), "does not fit"),
    (lambda t: t["server"]["gpadls"][0].update(relid=7), "of no channel"),
    (lambda t: t["server"]["gpadls"][0].update(need=8), "1 ranges in 8 bytes"),
    (lambda t: t["server"]["gpadls"][0].update(need=1 << 40), "of no channel"),
    (lambda t: t.update(inbox=["AAAA"]), "is none"),
    (lambda t: t.update(outbox=[{"vp_index": 8, "sint": 2, "payload": ""}]), "VP 8"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_a_state_that_no_guest_can_have_made_is_refused(
    loopback: Any, echo: type[Any], change: Callable[[Any], object], words: str
) -> None:
    loop: Loopback = loopback()
    loop.host.add(saving(echo)())
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    (channel,) = loop.client.offers.values()
    loop.open(channel)

    def changed(tree: Any) -> Any:
        change(tree)
        return tree

    with pytest.raises((ValueError, StateError), match=words):
        swap(loop, [saving(echo)()], changed)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_states_are_refused_or_run(loopback: Any, echo: type[Any], seed: int) -> None:
    """Any number or text in it replaced: an error by name, or a host that goes on."""
    random = Random(seed)
    values: list[Any] = [
        0,
        1,
        -1,
        2,
        15,
        4096,
        2047,
        2048,
        0xFFFFFFFF,
        (1 << 64) - 1,
        None,
        True,
        "",
        "AAAA",
        "open",
        [],
    ]

    def places(tree: Any) -> list[tuple[Any, Any]]:
        keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
        found = [(tree, key) for key in keys]
        return found + [place for key in keys for place in places(tree[key])]

    def mutate(tree: Any) -> Any:
        for _ in range(random.randint(1, 3)):
            container, key = random.choice(places(tree))
            container[key] = random.choice(values)
        return tree

    for _ in range(60):
        loop: Loopback = loopback()
        loop.host.add(saving(echo)())
        loop.connect(vmbus.VERSION_WIN10_V5_3)
        (channel,) = loop.client.offers.values()
        loop.open(channel)
        try:
            swap(loop, [saving(echo)()], mutate)
        except (ValueError, StateError) as error:
            assert "\n" not in str(error)
        else:
            loop.run()
            channel.opened.send(b"x")
            loop.run()
        loop.close()
