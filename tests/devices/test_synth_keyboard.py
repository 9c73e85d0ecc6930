"""The synthetic keyboard against a guest's driver in the loopback."""

from __future__ import annotations

from random import Random
from struct import pack, unpack
from typing import Any

import pytest

from hvkvm.abi import keyboard as wire
from hvkvm.abi import vmbus
from hvkvm.abi.ring import VM_PKT_COMP
from hvkvm.devices.synth.keyboard import MAX_WAITING, TURN_EVENTS, Keyboard
from hvkvm.testing.vmbus_loopback import Loopback


class Driver:
    """The guest's side: asks for a version, reads events as hyperv-keyboard.c does."""

    def __init__(self, loop: Loopback, device: Keyboard, *, in_pages: int = 10) -> None:
        self.loop = loop
        loop.host.add(device)
        loop.connect(vmbus.VERSION_WIN10_V5_3)
        self.channel = loop.client.by_interface(device.INTERFACE)
        loop.open(self.channel, out_pages=10, in_pages=in_pages)

    def request(self, version: int = wire.SYNTH_KBD_VERSION, **options: int) -> None:
        self.send(pack("<II", 1, version), **options)

    def send(self, payload: bytes, **options: int) -> None:
        self.channel.opened.send(payload, **options)
        self.loop.run()

    def packets(self) -> list[Any]:
        self.loop.run()
        packets, self.channel.received = self.channel.received, []
        return packets

    def bytes_for_atkbd(self) -> bytes:
        """What the serio port is fed with."""
        stream = bytearray()
        for packet in self.packets():
            kind, code, reserved, info = unpack("<IHHI", packet.payload[:12])
            assert (kind, reserved) == (3, 0)
            if info & 4:
                stream.append(0xE0)
            stream.append(code | (0x80 if info & 2 else 0))
        return bytes(stream)


@pytest.fixture
def loop() -> Any:
    loop = Loopback()
    yield loop
    loop.close()


def connected(loop: Loopback, **options: Any) -> tuple[Keyboard, Driver]:
    device = Keyboard()
    driver = Driver(loop, device, **options)
    driver.request()
    (answer,) = driver.packets()
    assert answer.payload == pack("<II", 2, 1)
    return device, driver


def test_another_version_is_refused_and_ours_taken_behind_it(loop: Loopback) -> None:
    device = Keyboard()
    driver = Driver(loop, device)
    assert not device.type("a")  # nobody asked for a version yet
    driver.request(0x00020000)
    assert [packet.payload for packet in driver.packets()] == [pack("<II", 2, 0)]
    assert not device.ready_for_requests
    driver.request(flags=1, trans_id=77)
    completion, answer = driver.packets()
    assert (completion.type, completion.trans_id) == (VM_PKT_COMP, 77)
    assert answer.payload == pack("<II", 2, 1)
    assert device.ready_for_requests


def test_text_is_typed_with_shift_where_it_belongs(loop: Loopback) -> None:
    device, driver = connected(loop)
    done: list[bool] = []
    assert device.type("aB!\n", done.append)
    assert driver.bytes_for_atkbd() == bytes.fromhex("1e9e 2a30b0aa 2a0282aa 1c9c")
    assert done == [True]
    assert device.events == 12


def test_every_printable_character_is_on_a_key(loop: Loopback) -> None:
    device, driver = connected(loop)
    text = "".join(map(chr, range(0x20, 0x7F)))
    assert device.type(text)
    assert len(driver.bytes_for_atkbd()) == 2 * 95 + 2 * sum(wire.TYPED[c][1] for c in text)
    assert len({wire.TYPED[c] for c in text}) == 95


def test_chords_are_let_go_in_the_other_order(loop: Loopback) -> None:
    device, driver = connected(loop)
    assert device.press("ctrl-alt-Delete")
    assert driver.bytes_for_atkbd() == bytes.fromhex("1d38e053 e0d3b89d")
    assert device.press(wire.parse_scan_codes("1d,38, e053"))
    assert driver.bytes_for_atkbd() == bytes.fromhex("1d38e053 e0d3b89d")


@pytest.mark.parametrize("text", ["ä", "\0", "a\x7f"])
def test_what_is_on_no_key_is_refused_whole(loop: Loopback, text: str) -> None:
    device, driver = connected(loop)
    with pytest.raises(ValueError, match="no key"):
        device.type(text)
    assert driver.packets() == []


@pytest.mark.parametrize("name", ["", "-", "ctrl-", "hyper", "ctrl+c"])
def test_a_chord_of_unknown_keys(name: str) -> None:
    with pytest.raises(ValueError, match="no such key"):
        wire.parse_chord(name)


@pytest.mark.parametrize("codes", ["", ",", "0", "80", "e000", "e0e0", "zz", "-1", "1_0", "e1", "\u0661"])
def test_make_codes_that_are_none(codes: str) -> None:
    with pytest.raises(ValueError, match="not a make code"):
        wire.parse_scan_codes(codes)


def test_what_the_ring_cannot_take_waits_in_order_and_in_bounds(loop: Loopback) -> None:
    device, driver = connected(loop, in_pages=2)
    text = "the quick brown fox\n" * 40
    done: list[bool] = []
    # The guest does not read: its interrupt is not run.
    taken = 0
    while device.type(text, done.append):
        taken += 1
    assert 0 < device.waiting <= MAX_WAITING
    assert len(done) < taken
    stream = driver.bytes_for_atkbd()
    expected = b"".join(bytes([wire.TYPED[c][0].code, wire.TYPED[c][0].code | 0x80]) for c in text * taken)
    assert stream == expected
    assert done == [True] * taken
    assert not device.waiting


def test_who_waits_is_told_when_the_guest_leaves(loop: Loopback) -> None:
    device, driver = connected(loop, in_pages=2)
    done: list[bool] = []
    while device.type("x" * 500, done.append):
        pass
    whole = len(done)
    driver.loop.client.close(driver.channel)
    while driver.loop.deferred:
        driver.loop._run_deferred()
    assert done[:whole] == [True] * whole
    assert False in done[whole:]
    assert not device.type("a")
    assert not device.waiting


def test_keys_that_nobody_waits_for_are_not_typed(loop: Loopback) -> None:
    """Those that have begun to go do so to their end: half a line would be another command."""
    device, driver = connected(loop, in_pages=2)
    told: dict[str, bool] = {}
    waited_for = {"a" * 500: True, "b" * 500: True, "c": True}
    for text in waited_for:
        whole = lambda whole, text=text: told.update({text[0]: whole})  # noqa: E731
        wanted = lambda text=text: waited_for[text]  # noqa: E731
        assert device.send_events(wire.text_events(text), whole, wanted)
    assert told == {}, "the guest has yet to read"
    waited_for.update({"a" * 500: False, "b" * 500: False})
    assert device.save().waiting.count(wire.text_events("b")[0]) == 0
    assert driver.bytes_for_atkbd() == bytes.fromhex("1e9e") * 500 + bytes.fromhex("2eae")
    assert told == {"a": True, "b": False, "c": True}
    assert device.waiting == 0


def test_a_driver_that_comes_anew_gets_no_old_keys(loop: Loopback) -> None:
    device, driver = connected(loop, in_pages=2)
    while device.type("x" * 500):
        pass
    driver.packets()
    assert device.type("y")
    driver.request()
    assert device.ready_for_requests
    assert not device.waiting


@pytest.mark.parametrize("junk", [b"", b"\x02", b"\x04\0\0\0", pack("<II", 3, 0), b"\xff" * 300])
def test_junk_is_ignored(loop: Loopback, junk: bytes) -> None:
    device, driver = connected(loop)
    driver.send(junk)
    assert driver.packets() == []
    assert device.type("a")


def test_a_guest_that_asks_without_end_gets_bounded_answers(loop: Loopback) -> None:
    device, driver = connected(loop, in_pages=2)
    for _ in range(50):
        for _ in range(20):
            driver.channel.opened.send(pack("<II", 1, wire.SYNTH_KBD_VERSION))
        loop.step()
    assert device.waiting == 0
    assert device.ready_for_requests


def test_leds_are_noted(loop: Loopback) -> None:
    device, driver = connected(loop)
    driver.send(pack("<IHH", 4, 4, 0))
    assert device.leds == 4


@pytest.mark.parametrize("seed", range(40))
def test_every_key_comes_once_and_in_order_whatever_the_timing(seed: int) -> None:
    """Host and guest in any order, in a ring that a few keys fill."""
    random = Random(seed)
    loop = Loopback(random=random)
    try:
        device = Keyboard()
        driver = Driver(loop, device, in_pages=2)
        driver.request()
        driver.packets()
        expected = b""
        stream = b""
        done: list[bool] = []
        for _ in range(30):
            text = "".join(random.choices("abc XYZ\n", k=random.randrange(60)))
            assert device.type(text, done.append)
            for character in text:
                key, shifted = wire.TYPED[character]
                inner = bytes([key.code, key.code | 0x80])
                expected += b"\x2a" + inner + b"\xaa" if shifted else inner
            for _ in range(random.randrange(4)):
                loop.step()
            if random.random() < 0.3:
                stream += driver.bytes_for_atkbd()
        stream += driver.bytes_for_atkbd()
        assert stream == expected
        assert done == [True] * 30
        assert device.waiting == 0
    finally:
        loop.close()


def test_a_large_ring_takes_no_more_events_a_turn_than_a_small_one(loop: Loopback) -> None:
    device, driver = connected(loop, in_pages=200)
    assert device.type("x" * 3000)
    counts, before = [], 0
    while True:
        counts.append(device.events - before)
        before = device.events
        if not loop.step():
            break
    assert max(counts) == TURN_EVENTS
    assert device.events == 6000
    assert driver.bytes_for_atkbd() == b"\x2d\xad" * 3000
