"""A test's own VMBus device and its faults, against a guest's client in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from hvkvm.abi import vmbus
from hvkvm.abi.ring import VM_PKT_COMP, Packet
from hvkvm.testing.device import ScriptedDevice
from hvkvm.testing.flight import FlightRecorder
from hvkvm.testing.vmbus_client import GuestChannel
from hvkvm.testing.vmbus_loopback import Loopback
from hvkvm.vmbus.channel_io import ChannelIo
from hvkvm.vmbus.offer import Offer

KIND = "11111111-2222-3333-4444-555555555555"


@pytest.fixture
def loop() -> Iterator[Loopback]:
    loop = Loopback()
    yield loop
    loop.close()


@pytest.fixture
def device(loop: Loopback) -> ScriptedDevice:
    device = ScriptedDevice(KIND, name="echo")
    device.offer(loop)
    return device


@pytest.fixture
def driver(loop: Loopback, device: ScriptedDevice) -> GuestChannel:
    """The guest's end, open."""
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    channel = loop.client.by_interface(vmbus.guid(KIND))
    loop.open(channel)
    return channel


def heard(loop: Loopback, driver: GuestChannel) -> list[bytes]:
    """What has come to the guest since the last call, without the ring's padding."""
    loop.run()
    packets, driver.received = driver.received, []
    return [packet.payload.rstrip(b"\0") for packet in packets]


def test_it_is_opened_and_talks_both_ways(
    loop: Loopback, device: ScriptedDevice, driver: GuestChannel
) -> None:
    device.wait_open()
    driver.opened.send(b"question", trans_id=7, flags=1)
    packet = device.expect(b"question")
    assert packet.wants_completion
    device.complete(packet, b"answer")
    device.send(b"more")
    loop.run()
    answer, more = driver.received
    assert (answer.type, answer.trans_id, answer.payload.rstrip(b"\0")) == (VM_PKT_COMP, 7, b"answer")
    assert more.payload.rstrip(b"\0") == b"more"


def test_what_was_not_expected_is_told_in_words(device: ScriptedDevice, driver: GuestChannel) -> None:
    driver.opened.send(b"something")
    with pytest.raises(AssertionError, match=r"VM_PKT_DATA_INBAND.*736f6d65 7468696e 67"):
        device.expect(b"else")
    driver.opened.send(b"something")
    with pytest.raises(AssertionError, match="nothing was expected"):
        device.expect_nothing(1)
    with pytest.raises(AssertionError, match="no packet for echo"):
        ScriptedDevice.expect(device, lambda _: True) and device.expect(seconds=0.2)


def test_packets_beyond_those_that_are_kept_wait_in_the_ring(
    device: ScriptedDevice, driver: GuestChannel, loop: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stayed there: the guest rings for a ring that was empty, and nobody else looked."""
    monkeypatch.setattr("hvkvm.testing.device.MAX_KEPT", 4)
    for number in range(11):
        driver.opened.send(bytes([number] * 8))
    loop.run()
    for number in range(11):
        device.expect(bytes([number] * 8))


def test_quiet_is_quiet(device: ScriptedDevice, driver: GuestChannel) -> None:
    device.expect_nothing(0.5)


def test_packets_are_dropped_doubled_and_changed(
    loop: Loopback, device: ScriptedDevice, driver: GuestChannel
) -> None:
    device.drop()
    device.duplicate()
    device.corrupt(lambda payload: payload.upper())
    for word in (b"one", b"two", b"three", b"four"):
        device.send(word)
    assert heard(loop, driver) == [b"two", b"two", b"THREE", b"four"]


def test_packets_change_places(loop: Loopback, device: ScriptedDevice, driver: GuestChannel) -> None:
    device.reorder(3)
    for word in (b"one", b"two"):
        device.send(word)
    assert heard(loop, driver) == []
    for word in (b"three", b"four"):
        device.send(word)
    assert heard(loop, driver) == [b"three", b"two", b"one", b"four"]


def test_a_late_packet_is_overtaken(loop: Loopback, device: ScriptedDevice, driver: GuestChannel) -> None:
    device.delay(2.0)
    device.send(b"late")
    device.send(b"soon")
    assert heard(loop, driver) == [b"soon"]
    loop.advance(1.9)
    assert heard(loop, driver) == []
    loop.advance(0.2)
    assert heard(loop, driver) == [b"late"]


def test_a_stalled_host_takes_and_gives_nothing(
    loop: Loopback, device: ScriptedDevice, driver: GuestChannel
) -> None:
    device.stall()
    device.send(b"waits")
    for _ in range(200):
        if not driver.opened.send(b"from the guest"):
            break
    else:
        raise AssertionError("the guest's ring has no end")
    assert heard(loop, driver) == []
    device.expect_nothing(0.5)
    device.resume()
    assert heard(loop, driver) == [b"waits"]
    device.expect(b"from the guest")
    assert driver.opened.send(b"there is room again")


def test_a_full_ring_keeps_what_is_sent_in_order(
    loop: Loopback, device: ScriptedDevice, driver: GuestChannel
) -> None:
    driver.on_interrupt = lambda: None  # a guest that does not read
    for number in range(300):
        device.send(b"%d" % number)
    loop.run()
    driver.on_interrupt = None
    driver.interrupt()
    assert heard(loop, driver) == [b"%d" % number for number in range(300)]


def test_it_is_taken_back_and_offered_anew(
    loop: Loopback, device: ScriptedDevice, driver: GuestChannel
) -> None:
    device.rescind()
    loop.run()
    assert driver.rescinded
    loop.client.release(driver)
    device.wait_closed()
    device.offer(loop)
    loop.run()
    again = loop.client.by_interface(vmbus.guid(KIND))
    loop.open(again)
    device.wait_open(count=2)
    device.send(b"hello")
    assert heard(loop, again) == [b"hello"]


def test_a_recorder_keeps_the_last_and_puts_them_into_words() -> None:
    loop = Loopback()
    try:
        recorder = FlightRecorder()
        loop.host.listen(recorder)
        device = ScriptedDevice(vmbus.HV_KBD_GUID, name="keys")
        device.offer(loop)
        loop.connect(vmbus.VERSION_WIN10_V5_3)
        channel = loop.client.by_interface(vmbus.HV_KBD_GUID)
        loop.open(channel)
        channel.opened.send(b"\1\0\0\0\0\0\1\0", trans_id=5)
        device.expect()
        for _ in range(500):
            device.send(b"\2\0\0\0\1\0\0\0")
            loop.run()
        lines = recorder.lines()
    finally:
        loop.close()
    text = "\n".join(lines)
    assert "INITIATE_CONTACT version=5.3" in text
    assert "channel opened: keys, relid 1" in text
    assert "host> keys: VM_PKT_DATA_INBAND type=SYNTH_KBD_PROTOCOL_RESPONSE proto_status=1" in text
    assert len(lines) <= 200


class Strict:
    """A device of a test's, with an assertion in it."""

    offer = Offer(vmbus.guid(KIND), bytes(16), "strict")

    def opened(self, io: ChannelIo) -> None: ...

    def received(self, packet: Packet) -> None:
        assert packet.payload.startswith(b"wanted"), "not what the driver is to say"

    def ready(self) -> None: ...

    def close(self, done: Callable[[], object]) -> None:
        done()


def test_an_assertion_in_a_device_of_the_tests_own_is_raised_to_the_test(loop: Loopback) -> None:
    """Only a note of the host's told of it, and the test waited for what could not come any more."""
    loop.host.add(Strict())
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    channel = loop.client.by_interface(vmbus.guid(KIND))
    loop.open(channel)
    channel.opened.send(b"wanted")
    loop.run()
    channel.opened.send(b"other")
    with pytest.raises(AssertionError, match="not what the driver is to say"):
        loop.wait_until(lambda: False, "what cannot come any more")
    assert channel.rescinded
    loop.run()  # it is told once
