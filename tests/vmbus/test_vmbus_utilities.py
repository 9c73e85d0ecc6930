"""Heartbeat, shutdown and time against a guest's driver in the loopback."""

from __future__ import annotations

from collections.abc import Callable
from struct import pack, unpack_from
from typing import Any

import pytest

from hvkvm.abi import ic
from hvkvm.devices.synth.heartbeat import Heartbeat
from hvkvm.devices.synth.ic import MAX_WAITING
from hvkvm.devices.synth.shutdown import Shutdown
from hvkvm.devices.synth.timesync import TimeSync
from hvkvm.devices.synth.vss import Vss
from hvkvm.testing.ic_driver import IcDriver


class Clock:
    """Timers that go off when the test says so."""

    def __init__(self) -> None:
        self.timers: list[Timer] = []

    def call_later(self, seconds: float, fn: Callable[..., object], *args: Any) -> Timer:
        self.timers.append(Timer(self, fn, args))
        return self.timers[-1]

    def tick(self) -> None:
        due, self.timers = self.timers, []
        for timer in due:
            timer.fn(*timer.args)


class Timer:
    def __init__(self, clock: Clock, fn: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.clock, self.fn, self.args = clock, fn, args

    def cancel(self) -> None:
        if self in self.clock.timers:
            self.clock.timers.remove(self)


def test_the_offer_is_a_message_pipe(loopback: Any) -> None:
    driver = IcDriver(loopback(), Shutdown())
    offer = driver.channel.offer
    assert offer["flags"] == 0x11
    assert offer["user_defined"][:4] == pack("<I", 4)


def test_heartbeats_are_counted_and_missed_ones_too(loopback: Any) -> None:
    clock = Clock()
    device = Heartbeat(clock.call_later)
    driver = IcDriver(loopback(), device)
    assert not device.alive
    driver.negotiate()
    for beat in range(1, 4):
        (payload,) = driver.requests()
        (sequence,) = unpack_from("<Q", payload, 28)
        assert sequence == beat
        assert len(payload) == 72  # 28 + 40, padded
        driver.answer(payload, pack("<Q", sequence + 1))
        assert device.beats == beat
        assert device.alive
        clock.tick()
        driver.loop.run()
    clock.tick()
    clock.tick()
    assert not device.alive
    assert len(driver.requests()) == 1  # a guest that hangs is not flooded
    driver.loop.client.close(driver.channel)
    driver.loop.run()
    assert clock.timers == []


def test_a_shutdown_is_asked_for_and_answered(loopback: Any) -> None:
    device = Shutdown()
    driver = IcDriver(loopback(), device, (3, 2))
    replies: list[int] = []

    def reply(status: int, _body: bytes) -> None:
        replies.append(status)

    assert not device.request("reboot")  # no version yet
    driver.negotiate()
    for what, flags in (("power-off", 1), ("reboot", 3), ("hibernate", 4)):
        assert device.request(what, reply)
        driver.loop.run()
        (payload,) = driver.requests()
        assert unpack_from("<H", payload, 12) == (ic.ICMSGTYPE_SHUTDOWN,)
        assert unpack_from("<HHHHH", payload, 8) == (3, 0, 3, 3, 2)
        assert unpack_from("<I", payload, 36) == (flags,)
        assert unpack_from("<H", payload, 18) == (2060,)
        driver.answer(payload, status=ic.HV_E_FAIL if what == "hibernate" else 0)
    assert replies == [0, 0, ic.HV_E_FAIL]
    with pytest.raises(ValueError, match="explode"):
        device.request("explode")


def test_one_request_is_under_way_and_the_rest_waits_or_is_refused(loopback: Any) -> None:
    device = Shutdown()
    driver = IcDriver(loopback(), device)
    driver.negotiate()
    replies: list[int] = []
    taken = [device.request("reboot", lambda status, body: replies.append(status)) for _ in range(30)]
    driver.loop.run()
    assert taken == [True] * (MAX_WAITING + 1) + [False] * (29 - MAX_WAITING)
    assert len(driver.requests()) == 1
    driver.loop.client.close(driver.channel)
    driver.loop.run()
    assert replies == [ic.HV_E_FAIL] * (MAX_WAITING + 1)  # nobody waits for ever


@pytest.mark.parametrize("version", [(3, 0), (4, 0)])
def test_time_is_set_once_and_sampled_afterwards(loopback: Any, version: tuple[int, int]) -> None:
    clock = Clock()
    device = TimeSync(clock.call_later, lambda: 777, lambda: 133_000_000_000_000_000)
    driver = IcDriver(loopback(), device, version)
    driver.negotiate()
    where = 44 if version >= (4, 0) else 52
    for flags in (ic.ICTIMESYNCFLAG_SYNC, ic.ICTIMESYNCFLAG_SAMPLE):
        (payload,) = driver.requests()
        assert unpack_from("<Q", payload, 28) == (133_000_000_000_000_000,)
        assert payload[where] == flags
        if version >= (4, 0):
            assert unpack_from("<Q", payload, 36) == (777,)
        driver.answer(payload)
        clock.tick()
        driver.loop.run()


@pytest.mark.parametrize(
    "counts", [(0, 0), (2, 1), (0xFFFF, 0xFFFF)], ids=["none in common", "two", "overflow"]
)
def test_a_guest_without_a_common_version_is_left_alone(loopback: Any, counts: tuple[int, int]) -> None:
    device = Shutdown()
    driver = IcDriver(loopback(), device)
    driver.negotiate(counts)
    assert not device.ready_for_requests
    assert not device.request("reboot")


def test_a_version_nobody_offered_is_not_taken(loopback: Any) -> None:
    device = Shutdown()
    IcDriver(loopback(), device, (9, 9)).negotiate()
    assert not device.ready_for_requests


def test_a_frame_version_nobody_offered_is_not_taken(loopback: Any) -> None:
    shutdown = Shutdown()
    driver = IcDriver(loopback(), shutdown)
    (payload,) = driver.requests()
    driver.answer(payload, pack("<HHIHHHH", 1, 1, 0, 2, 0, *shutdown.MESSAGE_VERSIONS[0]))
    assert (shutdown.frame_version, shutdown.ready_for_requests) == (None, False)


def test_junk_and_answers_to_nothing_are_ignored(loopback: Any) -> None:
    device = Shutdown()
    driver = IcDriver(loopback(), device)
    driver.negotiate()
    for junk in (b"", b"x" * 27, b"\xff" * 200, bytes(28)):
        driver.channel.opened.send(junk, trans_id=1)
        driver.channel.opened.send(junk, trans_id=2**64 - 1)
    driver.loop.run()
    assert device.request("reboot")


def test_a_reopened_channel_negotiates_again(loopback: Any) -> None:
    device = Shutdown()
    driver = IcDriver(loopback(), device)
    driver.negotiate()
    driver.loop.client.close(driver.channel)
    driver.loop.run()
    assert not device.ready_for_requests
    driver.open()
    driver.negotiate()
    assert device.request("reboot")


@pytest.mark.parametrize("status", [ic.HV_E_FAIL, 1, 0xFFFFFFFF])
def test_a_heartbeat_answered_badly_is_asked_for_again(loopback: Any, status: int) -> None:
    clock = Clock()
    device = Heartbeat(clock.call_later)
    driver = IcDriver(loopback(), device)
    driver.negotiate()
    answers = [0, status, 0, status, status, status, 0, 0]
    seen = []
    for answer in answers:
        (payload,) = driver.requests()
        driver.answer(payload, None, answer)
        seen.append((device.beats, device.missed, device.alive))
        clock.tick()
        driver.loop.run()
    assert [missed for _, missed, _ in seen] == [0, 1, 0, 1, 2, 3, 0, 0]
    assert [alive for _, _, alive in seen] == [True, True, True, True, False, False, True, True]
    assert device.beats == 4


@pytest.mark.parametrize(
    "change",
    [lambda _: b"", lambda p: p[:24], lambda p: p[:25] + b"\0" + p[26:], lambda p: p[:12] + b"\x09" + p[13:]],
    ids=["empty", "short", "no response", "another type"],
)
def test_an_answer_that_makes_no_sense_spoils_its_request_alone(
    loopback: Any, change: Callable[[bytes], bytes]
) -> None:
    device = Shutdown()
    driver = IcDriver(loopback(), device)
    driver.negotiate()
    replies: list[tuple[int, str]] = []
    for _ in range(2):
        assert device.request("reboot", lambda status, _body: replies.append((status, device.failure)))
    driver.loop.run()
    (payload,) = driver.requests()
    answer = bytearray(payload)
    answer[25] = ic.ICMSGHDRFLAG_RESPONSE
    driver.answer_raw(change(bytes(answer)))
    (payload,) = driver.requests()
    driver.answer(payload)
    (first, why), second = replies
    assert (first, second) == (ic.HV_E_FAIL, (0, ""))
    assert "makes no sense" in why


@pytest.mark.parametrize("version", [(3, 0), (4, 0)])
def test_the_time_is_that_of_sending(loopback: Any, version: tuple[int, int]) -> None:
    clock, now = Clock(), [1000]
    device = TimeSync(clock.call_later, lambda: now[0] + 7, lambda: now[0])
    driver = IcDriver(loopback(), device, version)
    driver.negotiate()
    assert device.sync()  # behind the first, which the guest is slow to answer
    now[0] = 9000
    (payload,) = driver.requests()
    assert unpack_from("<Q", payload, 28) == (1000,)
    driver.answer(payload)
    (payload,) = driver.requests()
    assert unpack_from("<Q", payload, 28) == (9000,)
    if version >= (4, 0):
        assert unpack_from("<Q", payload, 36) == (9007,)


def test_the_time_that_found_no_room_is_told_anew(loopback: Any) -> None:
    clock, now = Clock(), [1000]
    device = TimeSync(clock.call_later, lambda: 0, lambda: now[0])
    driver = IcDriver(loopback(), device)
    driver.negotiate()
    driver.answer(driver.requests()[0])
    io = device._io
    assert io is not None
    while io.send(b""):
        pass
    assert device.sync()
    now[0] = 5000
    driver.loop.run()  # the guest reads, and rings for the room
    assert unpack_from("<Q", driver.requests()[-1], 28) == (5000,)


def test_all_but_kvp_work_on_the_smallest_ring(loopback: Any) -> None:
    clock = Clock()
    told: list[int] = []

    def reply(status: int, _body: bytes) -> None:
        told.append(status)

    heartbeat, shutdown = Heartbeat(clock.call_later), Shutdown()
    timesync, vss = TimeSync(clock.call_later, lambda: 0), Vss()
    asks: dict[Any, Callable[[], object]] = {
        heartbeat: lambda: told.append(0),
        shutdown: lambda: shutdown.request("reboot", reply),
        timesync: lambda: timesync.sync(reply),
        vss: lambda: vss.thaw(lambda result: told.append(result.status)),
    }
    for device, ask in asks.items():
        driver = IcDriver(loopback(), device, device.MESSAGE_VERSIONS[-1], in_pages=2)
        driver.negotiate()
        ask()
        driver.serve(lambda _body: (0, None))
    assert told == [0, 0, 0, 0]
    assert heartbeat.beats == 1
