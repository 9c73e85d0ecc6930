"""Sub-channels and receive scaling: several rings, one NIC."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from hvkvm.abi import ndis, nvsp, rndis
from hvkvm.devices.synth.netvsp_channel import MAX_WAITING
from hvkvm.testing.netvsc_driver import NetvscDriver, data_message

Make = Callable[..., Any]
KEY = bytes(range(40))


def scaled(net: Any, queues: int, **options: Any) -> NetvscDriver:
    """A driver that has as many channels as it gets, and spreads frames over all of them."""
    driver: NetvscDriver = net.driver.start(**options)
    caps = driver.query(rndis.OID_GEN_RECEIVE_SCALE_CAPABILITIES, bytes(18))
    assert caps is not None
    assert struct.unpack_from("<I", caps, 12)[0] == queues
    answer = driver.ask(nvsp.subchannel.pack(nvsp.NVSP_MSG5_TYPE_SUBCHANNEL, 1, queues - 1))
    assert nvsp.subchannel_complete.unpack(answer)[1:] == (nvsp.NVSP_STAT_SUCCESS, queues - 1)
    for index in range(1, queues):
        driver.open_sub(index)
    driver.scale([n % queues for n in range(128)], KEY)
    return driver


def udp(port: int) -> bytes:
    head = bytes.fromhex("020304050607") + bytes.fromhex("020000000001") + b"\x08\0"
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 28, 0, 0, 64, 17, 0) + bytes([10, 0, 0, 1, 10, 0, 0, 2])
    return head + ip + struct.pack(">HHHH", port, 7, 8, 0)


def test_frames_of_one_stream_keep_to_a_channel_and_streams_spread(lan: Make) -> None:
    net = lan(queues=4)
    driver = scaled(net, 4)
    frames = [udp(port) for port in range(64) for _ in range(3)]
    assert len(net.inject(*frames)) == len(frames)
    assert net.complaints == {}
    assert all(len({index for index, data in driver.came if data == udp(port)}) == 1 for port in range(64))
    assert {index for index, _ in driver.came} == {0, 1, 2, 3}
    table = next(data for data in driver.inband if data[0] == nvsp.NVSP_MSG5_TYPE_SEND_INDIRECTION_TABLE)
    assert struct.unpack_from("<II", table, 4) == (16, 40)
    assert struct.unpack_from("<16I", table, 40) == tuple(n % 4 for n in range(16))


def test_a_sub_channel_sends_and_is_answered_on_itself(lan: Make) -> None:
    net = lan(queues=2)
    driver = scaled(net, 2)
    sub = driver.subs[1]
    ident = driver.send_section(0, data_message(udp(1)), channel=sub)
    assert [frame for _vnet, frame in net.port.sent] == [udp(1)]
    assert driver.completed_on[ident] is sub


def test_scaling_is_switched_off_and_bad_tables_are_refused(lan: Make) -> None:
    net = lan(queues=2)
    driver = scaled(net, 2)
    off = bytearray(28)
    ndis.object_header.pack_into(off, 0, ndis.NDIS_OBJECT_TYPE_RSS_PARAMETERS, 2, 28)
    off[4] = ndis.NDIS_RSS_PARAM_FLAG_DISABLE_RSS
    assert driver.scale([7], KEY) == rndis.RNDIS_STATUS_INVALID_DATA
    assert driver.set(rndis.OID_GEN_RECEIVE_SCALE_PARAMETERS, bytes(off)) == 0
    driver.came.clear()
    net.inject(*(udp(port) for port in range(32)))
    assert {index for index, _ in driver.came} == {0}


def test_sub_channels_go_with_their_primary_and_come_back(lan: Make) -> None:
    net = lan(queues=3)
    for _ in range(3):
        driver = scaled(net, 3)
        assert len(net.inject(*(udp(port) for port in range(20)))) == 20
        driver.leave()
        assert net.inject(udp(1)) == []
        assert net.nic.inspect()["channels"] == 0
    assert net.complaints == {}


def test_a_sub_channel_without_room_that_goes_has_the_wire_go_on(lan: Make) -> None:
    net = lan(queues=2)
    driver = scaled(net, 2, receive_pages=400)
    driver.scale([1] * 128, KEY)
    driver.subs[1].on_interrupt = lambda: None
    while not net.port.waiting:
        net.inject(udp(1))
    assert net.nic.receive.pieces.room(2048)[1] >= 2048, "it was to be the ring that is full"
    net.loop.client.close(driver.subs[1])
    net.loop.run()
    assert not net.port.waiting


def test_each_channel_that_keeps_back_what_a_guest_gives_back_is_read_on(lan: Make) -> None:
    """Others than those that are in the way lose nothing."""
    net = lan(queues=4)
    driver = scaled(net, 4, receive_pages=400)
    driver.scale([1, 2] * 64, KEY)
    driver.complete = False
    net.port.room = 0
    idents = []
    for index, count in ((1, MAX_WAITING + 20), (2, MAX_WAITING), (3, 100)):
        for _ in range(count):
            idents.append(driver.send_section(0, data_message(udp(1)), channel=driver.subs[index]))
    frames = [udp(port) + bytes(1400) for port in range(64)] * 20
    net.inject(*frames)
    assert net.port.waiting
    driver.complete = True
    driver.complete_all()
    assert not net.port.waiting
    assert sorted(data for _, data in driver.came) == sorted(frames)
    assert net.nic._channels[3].waiting == 100
    net.port.make_room(None)
    net.loop.run()
    done = [one for one, _ in driver.completions]
    assert [done.count(ident) for ident in idents] == [1] * len(idents)
    assert net.complaints == {}
