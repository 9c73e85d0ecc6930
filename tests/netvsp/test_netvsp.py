"""The NIC against a driver in the loopback: agreement, frames both ways, room both ways, its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hvkvm.abi import nvsp, rndis
from hvkvm.devices.synth.netvsp_channel import LOSE_SECONDS, MAX_WAITING
from hvkvm.testing.netvsc_driver import data_message

Make = Callable[..., Any]
PEER = bytes.fromhex("020000000001")


def frame(size: int = 60, *, to: bytes = bytes.fromhex("020304050607"), fill: int = 7) -> bytes:
    """An Ethernet frame of an unknown kind."""
    return (to + PEER + b"\x88\xb5").ljust(size, bytes([fill]))


@pytest.mark.parametrize("version", nvsp.NVSP_VERSIONS)
def test_every_version_is_agreed_on_and_carries_frames_both_ways(lan: Make, version: int) -> None:
    net = lan()
    driver = net.driver.start(version)
    driver.send_pages_of(data_message(frame(to=PEER)))
    assert net.port.sent == [(bytes(12), frame(to=PEER))]
    assert net.inject(frame(), frame(fill=8)) == [(frame(), {}), (frame(fill=8), {})]
    assert driver.transfers  # both frames in one packet, beside the RNDIS answers
    assert net.complaints == {}


def test_a_version_that_nobody_knows_is_refused_and_the_next_is_taken(lan: Make) -> None:
    net = lan()
    net.driver.open()
    assert net.driver.init(0x70000) == nvsp.NVSP_STAT_PROTOCOL_UNSUPPORTED
    assert net.driver.init(nvsp.NVSP_PROTOCOL_VERSION_6) == nvsp.NVSP_STAT_SUCCESS


def test_what_linux_asks_is_answered_as_it_wants_it(lan: Make) -> None:
    net = lan(mtu=9000)
    driver = net.driver.start()
    word = {
        rndis.RNDIS_OID_GEN_MAXIMUM_FRAME_SIZE: 9000,
        rndis.RNDIS_OID_GEN_MEDIA_CONNECT_STATUS: 0,
        rndis.RNDIS_OID_GEN_LINK_SPEED: 100_000_000,
    }
    for oid, value in word.items():
        assert driver.query(oid) == value.to_bytes(4, "little")
    assert driver.query(rndis.RNDIS_OID_802_3_PERMANENT_ADDRESS) == bytes.fromhex("020304050607")
    caps = driver.query(rndis.OID_TCP_OFFLOAD_HARDWARE_CAPABILITIES, bytes([0xA7, 3, 156, 0]) + bytes(152))
    assert caps is not None
    assert (caps[0], caps[1], int.from_bytes(caps[2:4], "little"), len(caps)) == (0xA7, 3, 156, 156)
    assert caps[144:146] == b"\x01\x01"
    assert driver.query(rndis.OID_GEN_RECEIVE_SCALE_CAPABILITIES) is None
    assert driver.query(0x12345678) is None


def test_several_messages_in_a_section_and_one_that_goes_on_in_pages(lan: Make) -> None:
    net = lan()
    driver = net.driver.start()
    frames = [frame(60 + 8 * n, to=PEER, fill=n) for n in range(5)]
    last = frame(1400, to=PEER, fill=9)
    messages = b"".join(data_message(one, pad=4) for one in frames)
    ident = driver.send_section(2, messages + data_message(last, split=True), driver.put(last, at=3000))
    assert [data for _vnet, data in net.port.sent] == [*frames, last]
    assert [one for one, _ in driver.completions].count(ident) == 1


def test_a_guest_that_wants_others_than_before_gets_those(lan: Make) -> None:
    net = lan(mtu=9000)
    driver = net.driver.start(mtu=9000)
    ours, other = frame(), frame(to=bytes.fromhex("020304050608"))

    def came(filter_: int, *frames: bytes) -> list[bytes]:
        driver.set(rndis.RNDIS_OID_GEN_CURRENT_PACKET_FILTER, filter_.to_bytes(4, "little"))
        return [data for data, _marks in net.inject(*frames, *frames)]

    assert came(rndis.NDIS_PACKET_TYPE_DIRECTED, ours, other) == [ours, ours]
    assert came(rndis.NDIS_PACKET_TYPE_PROMISCUOUS, ours, other) == [ours, other] * 2
    assert came(rndis.NDIS_PACKET_TYPE_BROADCAST, ours, other) == []
    assert came(rndis.NDIS_PACKET_TYPE_DIRECTED, ours, frame(9000)) == [ours, frame(9000)] * 2
    tagged = ours[:12] + bytes.fromhex("81000005") + ours[12:]
    for told, got in ((0, tagged), (nvsp.NDIS_CONFIG_IEEE8021Q, ours)):
        driver.post(nvsp.ndis_config.pack(nvsp.NVSP_MSG2_TYPE_SEND_NDIS_CONFIG, 9014, 0, told))
        assert [data for data, _marks in net.inject(tagged, tagged)] == [got, got]


def test_a_full_wire_holds_completions_back_and_loses_nothing(lan: Make) -> None:
    net = lan()
    driver = net.driver.start()
    net.port.room = 3
    idents = [driver.send_section(n % 4, data_message(frame(100, to=PEER, fill=n))) for n in range(40)]
    done = [one for one, _ in driver.completions]
    assert [ident in done for ident in idents] == [True] * 3 + [False] * 37
    net.port.make_room(None)
    net.loop.run()
    done = [one for one, _ in driver.completions]
    assert [done.count(ident) for ident in idents] == [1] * 40
    assert [data[20] for _vnet, data in net.port.sent[:3]] == [0, 1, 2]
    assert len(net.port.sent) == 40


def test_a_guest_without_room_stops_the_wire_until_it_completes(lan: Make) -> None:
    net = lan()
    driver = net.driver.start()
    driver.complete = False
    frames = [frame(1500, fill=n % 256) for n in range(3000)]
    got = net.inject(*frames)
    assert 0 < len(got) < 3000
    assert net.port.waiting
    driver.complete = True
    driver.complete_all()
    assert not net.port.waiting
    assert [data[20] for data, _ in driver.received] == [n % 256 for n in range(3000)]
    assert net.nic.receive.pieces.lent == 0


@pytest.mark.parametrize("count", [MAX_WAITING, MAX_WAITING + 100])
def test_what_waits_for_a_wire_keeps_nothing_from_a_guest_that_lacks_room(lan: Make, count: int) -> None:
    """Its completions come behind its frames, and the peer reads none before its own have been taken."""
    net = lan()
    driver = net.driver.start()
    driver.complete = False
    net.port.room = 0
    idents = [driver.send_section(0, data_message(frame(to=PEER))) for _ in range(count)]
    frames = [frame(1500, fill=n % 256) for n in range(3000)]
    net.inject(*frames)
    assert net.port.waiting
    driver.complete = True
    driver.complete_all()
    assert [data for data, _ in driver.received] == frames
    lost = net.nic.inspect()["sent"]["lost"]
    assert MAX_WAITING <= lost <= count
    net.port.make_room(None)
    net.loop.run()
    done = [one for one, _ in driver.completions]
    assert [done.count(ident) for ident in idents] == [1] * count
    assert len(net.port.sent) == count - lost
    assert net.complaints == {}


@pytest.mark.parametrize("takes", [False, True])
def test_a_wire_that_takes_something_in_time_loses_nothing(lan: Make, takes: bool) -> None:
    """Another VM that waits for this one takes nothing for ever; passt on a busy host does soon."""
    net = lan(keep=True)
    driver = net.driver.start()
    net.port.room = 0
    count = MAX_WAITING + 100
    idents = [driver.send_section(0, data_message(frame(to=PEER))) for _ in range(count)]
    driver.complete = False
    net.inject(*[frame(1500)] * 3000)
    assert net.port.waiting
    for _ in range(10):
        net.loop.advance(LOSE_SECONDS * 0.75)
        net.loop.run()
        if takes:
            net.port.make_room(1)
            net.loop.run()
    assert net.nic.inspect()["sent"]["lost"] == (0 if takes else MAX_WAITING)
    net.port.make_room(None)
    driver.complete = True
    driver.complete_all()
    net.loop.advance(1.0)
    net.loop.run()
    done = [one for one, _ in driver.completions]
    assert [done.count(ident) for ident in idents] == [1] * count
    assert len(net.port.sent) == count - net.nic.inspect()["sent"]["lost"]
    assert net.complaints == {}


def test_a_slow_wire_alone_loses_nothing(lan: Make) -> None:
    """Nor does it after the guest has lacked room once, and has given all of it back."""
    net = lan()
    driver = net.driver.start()
    driver.complete = False
    net.inject(*[frame(1500)] * 3000)
    assert net.port.waiting
    net.port.waiting.clear()
    driver.complete = True
    driver.complete_all()
    net.port.room = 0
    count = MAX_WAITING + 100
    idents = [driver.send_section(0, data_message(frame(to=PEER))) for _ in range(count)]
    assert net.nic.inspect()["waiting"] == MAX_WAITING
    assert net.inject(frame()) == [(frame(), {})]
    net.port.make_room(None)
    net.loop.run()
    done = [one for one, _ in driver.completions]
    assert [done.count(ident) for ident in idents] == [1] * count
    assert len(net.port.sent) == count
    assert net.nic.inspect()["sent"]["lost"] == 0


def test_the_filter_is_obeyed(lan: Make) -> None:
    net = lan()
    driver = net.driver.start(filter=rndis.NDIS_PACKET_TYPE_DIRECTED)
    group, other = bytes.fromhex("01005e000001"), bytes.fromhex("020000009999")
    everyone = b"\xff" * 6

    def kinds() -> list[bytes]:
        found = net.inject(*(frame(to=to) for to in (net.nic.address, group, other, everyone)))
        return [data[:6] for data, _ in found]

    def let(bits: int) -> None:
        assert driver.set(rndis.RNDIS_OID_GEN_CURRENT_PACKET_FILTER, bits.to_bytes(4, "little")) == 0

    assert kinds() == [net.nic.address]
    let(rndis.NDIS_PACKET_TYPE_DIRECTED | rndis.NDIS_PACKET_TYPE_BROADCAST | rndis.NDIS_PACKET_TYPE_MULTICAST)
    assert kinds() == [net.nic.address, everyone]
    assert driver.set(rndis.RNDIS_OID_802_3_MULTICAST_LIST, group) == 0
    assert kinds() == [net.nic.address, group, everyone]
    let(rndis.NDIS_PACKET_TYPE_PROMISCUOUS)
    assert kinds() == [net.nic.address, group, other, everyone]
    let(0)
    assert kinds() == []


def test_the_link_is_indicated_when_it_changes(lan: Make) -> None:
    net = lan()
    driver = net.driver.start()
    driver.indications.clear()
    for up in (False, True, True, False):
        net.loop.call_soon(net.nic.link, up)
        net.loop.run()
    connect, disconnect = rndis.RNDIS_STATUS_MEDIA_CONNECT, rndis.RNDIS_STATUS_MEDIA_DISCONNECT
    assert driver.indications == [disconnect, connect, disconnect]
    assert driver.query(rndis.RNDIS_OID_GEN_MEDIA_CONNECT_STATUS) == b"\1\0\0\0"


def test_a_peer_that_comes_and_goes_does_not_cost_the_guest_its_nic(lan: Make) -> None:
    """While the guest's vCPU is away one indication is on its way; then it hears how the link is."""
    net = lan()
    driver = net.driver.start()
    driver.indications.clear()
    take, driver.channel.on_interrupt = driver.channel.on_interrupt, lambda: None
    lent = net.nic.receive.pieces.lent
    for up in [False, True] * 50 + [False]:
        net.loop.call_soon(net.nic.link, up)
        net.loop.run()
    assert net.nic.receive.pieces.lent == lent + 1
    driver.channel.on_interrupt = take
    driver.take(driver.channel)
    net.loop.run()
    assert driver.indications == [rndis.RNDIS_STATUS_MEDIA_DISCONNECT]
    assert net.complaints == {}


def test_a_wire_that_was_down_for_a_moment_is_told_as_such(lan: Make) -> None:
    """It may lead elsewhere now. The indication before it has to come back first."""
    net = lan()
    driver = net.driver.start()
    net.loop.call_soon(net.nic.link, False)
    net.loop.run()
    driver.indications.clear()
    driver.complete = False
    for up in (True, False, True):
        net.loop.call_soon(net.nic.link, up)
        net.loop.run()
    connect, disconnect = rndis.RNDIS_STATUS_MEDIA_CONNECT, rndis.RNDIS_STATUS_MEDIA_DISCONNECT
    assert driver.indications == [connect]
    driver.complete = True
    driver.complete_all()
    assert driver.indications == [connect, disconnect, connect]


def test_a_link_that_changed_is_told_by_the_nic_that_goes_on(lan: Make) -> None:
    net = lan()
    driver = net.driver.start()
    driver.indications.clear()
    driver.complete = False
    for up in (False, True):
        net.loop.call_soon(net.nic.link, up)
        net.loop.run()
    disconnect = rndis.RNDIS_STATUS_MEDIA_DISCONNECT
    assert driver.indications == [disconnect]
    net.go_on_with_another()
    driver.complete = True
    driver.complete_all()
    assert driver.indications == [disconnect, rndis.RNDIS_STATUS_MEDIA_CONNECT]
    assert net.nic.receive.pieces.lent == 0


def test_a_driver_that_leaves_and_comes_back_finds_a_new_nic(lan: Make) -> None:
    net = lan()
    driver = net.driver.start(rsc=True)
    assert net.port.wanted[-1].tso4
    net.loop.client.close(driver.channel)
    net.loop.run()
    assert not net.port.wanted[-1].tso4
    assert net.inject(frame()) == []
    net.loop.client.reclaim(driver.channel)
    driver.loop.client.free_pages += driver.receive_pages + driver.send_pages
    assert driver.start().query(rndis.RNDIS_OID_GEN_CURRENT_PACKET_FILTER) == b"\x0d\0\0\0"
    assert net.inject(frame()) == [(frame(), {})]


def test_a_wire_that_waits_for_a_driver_goes_on_once_that_has_left(lan: Make) -> None:
    """A kernel is kexec'ed while frames come, and has no room for them at last: the next one got none."""
    net = lan()
    driver = net.driver.start()
    driver.complete = False
    net.inject(*(frame(1500) for _ in range(3000)))
    assert net.port.waiting
    net.loop.client.close(driver.channel)
    net.loop.run()
    assert not net.port.waiting
    net.loop.client.reclaim(driver.channel)
    driver.complete, driver.held = True, []
    driver.loop.client.free_pages += driver.receive_pages + driver.send_pages
    driver.start()
    assert net.inject(frame()) == [(frame(), {})]
