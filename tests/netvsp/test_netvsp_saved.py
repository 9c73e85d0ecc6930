"""A NIC that is saved and gone on with by another, at any moment: each packet is completed once."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from hvkvm.abi import nvsp, rndis
from hvkvm.devices.synth.netvsp import Netvsp
from hvkvm.devices.synth.netvsp_channel import MAX_WAITING
from hvkvm.testing.netvsc_driver import data_message

Make = Callable[..., Any]
OURS, PEER = bytes.fromhex("020304050607"), bytes.fromhex("020000000001")


def frame(number: int, size: int = 100) -> bytes:
    return (OURS + PEER + b"\x88\xb5" + number.to_bytes(4, "little")).ljust(size, b"\x55")


@pytest.mark.parametrize("queues", [1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_every_packet_is_completed_once_through_many_machines(lan: Make, seed: int, queues: int) -> None:
    random = Random(seed)
    net = lan(queues=queues)
    driver = net.driver.start(rsc=True)
    if queues > 1:
        driver.ask(nvsp.subchannel.pack(nvsp.NVSP_MSG5_TYPE_SUBCHANNEL, 1, queues - 1))
        for index in range(1, queues):
            driver.open_sub(index)
    channels = [driver.channel, *driver.subs.values()]
    idents = []
    for number in range(200):
        driver.complete = random.random() < 0.7
        net.port.room = random.choice([None, 0, 1, 5])
        if random.random() < 0.5:
            message = data_message(frame(number))
            idents.append(driver.send_section(number % 16, message, channel=random.choice(channels)))
        else:
            net.port.inject(*(frame(number) for _ in range(random.randrange(4))))
        for _ in range(random.randrange(6)):
            net.loop.step()
        if random.random() < 0.1:
            net.go_on_with_another()
        if driver.complete:
            driver.complete_all()
        net.port.make_room(None)
    driver.complete = True
    driver.complete_all()
    done = [one for one, _ in driver.completions]
    assert [done.count(ident) for ident in idents] == [1] * len(idents)
    assert net.nic.receive.pieces.lent == 0
    assert net.inject(frame(1), frame(2)) == [(frame(1), {}), (frame(2), {})]
    assert net.port.wanted[-1] == (True, True, True)
    assert net.complaints == {}


def test_what_was_agreed_and_set_is_there_afterwards(lan: Make) -> None:
    net = lan()
    driver = net.driver.start(filter=rndis.NDIS_PACKET_TYPE_DIRECTED | rndis.NDIS_PACKET_TYPE_MULTICAST)
    group = bytes.fromhex("01005e000001")
    driver.set(rndis.RNDIS_OID_802_3_MULTICAST_LIST, group)
    net.go_on_with_another()
    net.loop.run()
    assert driver.query(rndis.RNDIS_OID_802_3_MULTICAST_LIST) == group
    assert [data[:6] for data, _ in net.inject(group + frame(1)[6:], bytes([1]) + frame(1)[1:])] == [group]


def test_an_mtu_that_is_said_too_late_changes_nothing(lan: Make) -> None:
    """The receive buffer is cut into sections for the one before, here and in the machine that goes on."""
    net = lan()
    driver = net.driver.start(receive_pages=64)
    driver.channel.io.send(nvsp.ndis_config.pack(nvsp.NVSP_MSG2_TYPE_SEND_NDIS_CONFIG, 65535, 0, 0))
    net.loop.run()
    assert net.nic.agreed.mtu == 1500
    net.go_on_with_another()
    net.loop.run()
    assert net.inject(frame(1)) == [(frame(1), {})]
    assert net.complaints == {}


@pytest.mark.parametrize("after", [False, True])
def test_a_guest_that_lacks_room_behind_a_full_wire_goes_on(lan: Make, after: bool) -> None:
    """Saved while its ring is left alone, or once what waited was lost and its completions are owed."""
    net = lan()
    driver = net.driver.start()
    driver.complete = False
    net.port.room = 0
    count = MAX_WAITING + 100
    idents = [driver.send_section(0, data_message(frame(n))) for n in range(count)]
    if after:
        net.inject(*[frame(1, 1500)] * 3000)
        assert net.nic.inspect()["sent"]["lost"] == MAX_WAITING
    net.go_on_with_another()
    driver.complete = True
    driver.complete_all()
    net.port.make_room(None)
    net.loop.run()
    done = [one for one, _ in driver.completions]
    assert [done.count(ident) for ident in idents] == [1] * count
    assert net.nic.receive.pieces.lent == 0
    driver.received.clear()
    assert net.inject(frame(1)) == [(frame(1), {})]
    assert net.complaints == {}


@pytest.mark.parametrize(
    "change",
    [
        {"version": 7},
        {"mtu": 5},
        {"receive_gpadl": 12345},
        {"pieces": ((1, 1 << 30, 0), (2, 0, 0))},
        {"pieces": ((5, 0, 0), (5, 8, 0), (6, 0, 0))},
        {"waiting": (b"",) * 100},
        {"receive_set": 1 << 20},
        {"send_gpadl": 0x77},
    ],
)
def test_what_no_nic_was_is_refused(lan: Make, change: dict[str, Any]) -> None:
    net = lan()
    net.driver.start()
    state = net.nic.save()._replace(**change)
    other: Netvsp = net.make()
    other.bind(net.nic.agreed.sub_channels)
    with pytest.raises(ValueError, match=r"net0|receive buffer"):
        other.load(net.nic._channels[0].io, state)


@pytest.mark.parametrize(
    "change",
    [
        {"address": b"12"},
        {"multicast": (b"1",)},
        {"scaling": True},
        {"scaling": True, "table": (0,)},
        {"key": b"1"},
        {"packet_filter": -1},
    ],
)
def test_settings_that_no_guest_made_are_refused(lan: Make, change: dict[str, Any]) -> None:
    net = lan()
    net.driver.start()
    state = net.nic.save()
    with pytest.raises(ValueError, match="settings"):
        net.make().load(None, state._replace(control=state.control._replace(**change)))
