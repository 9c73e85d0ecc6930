"""Versions 0.13 and 1.1: channels signalled by the bits of a shared page, whatever the guest does to it."""

from __future__ import annotations

import errno
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from saved_bus import swap

from hvkvm.abi import vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.errors import GuestMemoryError
from hvkvm.memory.guest import GuestMemory
from hvkvm.observe.bus_text import bus_lines
from hvkvm.vmbus.host import VmbusHost
from hvkvm.vmbus.interrupt_page import InterruptPage
from hvkvm.vmbus.server import BusState

OLD = [vmbus.VERSION_WS2008, vmbus.VERSION_WIN7]
old = pytest.mark.parametrize("version", OLD, ids=vmbus.version_text)
PAGE = 0x3000
HALF = vmbus.SEND_HALF


def opened(loop: Any, echo: Any, version: int, count: int = 3) -> list[Any]:
    """Connected, with so many echoes open."""
    for number in range(1, count + 1):
        loop.host.add(echo(number))
    loop.connect(version)
    channels = list(loop.client.offers.values())
    for channel in channels:
        loop.open(channel, vp_index=0x12345678)  # no VP before 2.4, but a field of another meaning
    return channels


@old
@pytest.mark.parametrize("random", [None, Random(1), Random(2)], ids=["in order", "1", "2"])
def test_channels_are_signalled_by_their_bits(
    loopback: Any, echo: Any, version: int, random: Random | None
) -> None:
    loop = loopback(random=random)
    channels = opened(loop, echo, version)
    loop.synic.rung.clear()
    for number in range(40):
        channel = channels[number % 3]
        assert channel.opened.send(bytes([number]) * 8, trans_id=number)
        for _ in range(number % 4):
            loop.step()
    loop.run()
    for index, channel in enumerate(channels):
        assert [packet.trans_id for packet in channel.received] == list(range(index, 40, 3))
    # Every flag is flag 0 of the boot VP's SINT 2; 1.1 has a doorbell for each channel.
    assert set(loop.synic.flags_set) == {(0, 2, 0)}
    dedicated = {channel.connection_id for channel in channels}
    assert set(loop.synic.rung) == ({2} if version == vmbus.VERSION_WS2008 else dedicated)
    assert loop.memory.read(0x1000, 4096) == bytes(4096)
    assert not loop.notes.events


@old
def test_offers_say_how_a_channel_is_signalled(loopback: Any, echo: Any, version: int) -> None:
    loop = loopback()
    loop.host.add(echo())
    loop.connect(version)
    offer = loop.client.last(wire.OFFERCHANNEL)
    assert not offer["monitor_allocated"]
    own = version == vmbus.VERSION_WIN7
    assert offer["is_dedicated"] == own
    assert offer["connection_id"] == (0x2001 if own else 2)
    assert any("interrupt page 0x1000" in line for line in bus_lines(loop.host.snapshot()))


@old
@pytest.mark.parametrize("gpa", [0, 8, 0x1800, 1 << 63, 4 << 20, (4 << 20) - 2048], ids=hex)
def test_a_page_that_is_none_is_refused(loopback: Any, version: int, gpa: int) -> None:
    """Address 0, none of a page's, far away, right behind RAM, and over its end."""
    loop = loopback()
    loop.client.contact(version, interrupt_page=gpa)
    loop.run()
    response = loop.client.last(wire.VERSION_RESPONSE)
    assert (response["version_supported"], response["connection_state"]) == (0, 2)
    assert loop.host.server.state is BusState.DISCONNECTED
    assert loop.synic.events == {}
    loop.connect(version)
    loop.connect(version, interrupt_page=(4 << 20) - 4096)


def test_later_versions_need_no_page(loopback: Any) -> None:
    loop = loopback()
    loop.connect(vmbus.VERSION_WIN8, interrupt_page=0xFFFF_FFFF_FFFF_FFFF)
    assert loop.host.server.interrupt_page == 0


@old
def test_a_host_without_a_doorbell_left_says_so(
    loopback: Any, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    loop = loopback()

    def full(_conn_id: int, _callback: Any) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(loop.synic, "add_event", full)
        loop.client.contact(version)
        loop.run()
    response = loop.client.last(wire.VERSION_RESPONSE)
    assert (response["version_supported"], response["connection_state"]) == (0, 1)
    assert loop.host.server.state is BusState.DISCONNECTED
    assert loop.host.server.reports.counts == {"INITIATE_CONTACT failed": 1}
    loop.connect(version)


@old
def test_bits_of_no_channel_and_of_closed_ones_mean_nothing(loopback: Any, echo: Any, version: int) -> None:
    loop = loopback()
    first, second, third = opened(loop, echo, version)
    loop.client.close(second)
    loop.run()
    loop.memory.write(0x1000 + HALF, b"\xff" * HALF)
    loop.synic.signal(vmbus.VMBUS_EVENT_CONNECTION_ID)
    loop.run()
    assert loop.memory.read(0x1000 + HALF, 256) == bytes(256)
    assert loop.memory.read(0x1000 + HALF + 256, HALF - 256) == b"\xff" * (HALF - 256)
    for channel in (first, third):
        assert channel.opened.send(b"x" * 8)
    loop.run()
    assert len(first.received) == len(third.received) == 1
    assert not loop.notes.events


@old
def test_the_page_is_left_alone_once_its_connection_is_over(loopback: Any, echo: Any, version: int) -> None:
    loop = loopback()
    (channel,) = opened(loop, echo, version, 1)
    assert channel.opened.send(b"x" * 8)
    loop.client.post(wire.UNLOAD)
    loop.memory.write(0x1000, b"\xa5" * 4096)
    loop.run()
    assert loop.client.count(wire.UNLOAD_RESPONSE) == 1
    assert loop.memory.read(0x1000, 4096) == b"\xa5" * 4096
    assert loop.synic.events == {}
    assert loop.synic.signal(vmbus.VMBUS_EVENT_CONNECTION_ID) != 0
    loop.client.offers.clear()
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    assert loop.host.server.interrupt_page == 0
    loop.open(next(iter(loop.client.offers.values())))
    loop.host.reset()
    assert loop.synic.events == {}


@old
def test_the_page_moves_with_a_new_contact(loopback: Any, echo: Any, version: int) -> None:
    loop = loopback()
    (channel,) = opened(loop, echo, version, 1)
    loop.connect(version, interrupt_page=PAGE)
    channel = next(iter(loop.client.offers.values()))
    loop.open(channel)
    loop.memory.write(0x1000, b"\xa5" * 4096)
    assert channel.opened.send(b"x" * 8)
    loop.run()
    assert len(channel.received) == 1
    assert loop.memory.read(0x1000, 4096) == b"\xa5" * 4096


@old
@pytest.mark.parametrize("seed", range(3))
def test_a_saved_connection_goes_on(loopback: Any, echo: Any, version: int, seed: int) -> None:
    random = Random(seed)
    loop = loopback(random=random)
    channels = opened(loop, echo, version, 2)
    sent = 0
    for _ in range(200):
        channel = channels[sent % 2]
        sent += channel.opened.send(b"x" * 8, trans_id=sent)
        for _ in range(random.randrange(8)):
            loop.step()
        loop.run()
        if random.random() < 0.1:
            swap(loop, [echo(1), echo(2)])
    loop.run()
    assert [len(channel.received) for channel in channels] == [sent // 2, sent // 2]
    assert loop.host.server.version == version


def test_bits_set_while_the_machine_is_at_rest_are_heeded_afterwards(loopback: Any, echo: Any) -> None:
    loop = loopback()
    (channel,) = opened(loop, echo, vmbus.VERSION_WS2008, 1)
    rested: list[bool] = []
    loop.host.stop(lambda: rested.append(True))
    loop.run()
    assert rested
    assert channel.opened.send(b"x" * 8)
    before = loop.memory.read(0x1000, 4096)
    assert before != bytes(4096)
    loop.run()
    assert loop.memory.read(0x1000, 4096) == before
    loop.host.go_on()
    loop.run()
    assert len(channel.received) == 1


@pytest.mark.parametrize(
    ("version", "page"),
    [
        (vmbus.VERSION_WS2008, 0),
        (vmbus.VERSION_WIN7, 4 << 20),
        (vmbus.VERSION_WIN7, 0x1001),
        (vmbus.VERSION_WIN10, 0x1000),
        (vmbus.VERSION_WS2008, -4096),
    ],
)
def test_a_saved_page_that_cannot_be_is_refused(loopback: Any, version: int, page: int) -> None:
    def change(tree: Any) -> Any:
        tree["server"]["interrupt_page"] = page
        return tree

    loop = loopback()
    loop.connect(version)
    with pytest.raises(ValueError, match="interrupt page"):
        swap(loop, [], change)


@given(sent=st.sets(st.integers(0, 0x3FFF)), told=st.lists(st.integers(1, vmbus.MAX_RELID)))
def test_property_bits_are_taken_once_and_marked_bits_stand(
    memory: GuestMemory, sent: set[int], told: list[int]
) -> None:
    page = InterruptPage(memory, PAGE)
    memory.zero(PAGE, 4096)
    for bit in sent:
        at = PAGE + HALF + bit // 8
        memory.write(at, bytes([memory.read(at, 1)[0] | 1 << bit % 8]))
    assert page.take() == sorted(bit for bit in sent if bit <= vmbus.MAX_RELID)
    assert page.take() == []
    for relid in told:
        page.mark(relid)
    bits = int.from_bytes(memory.read(PAGE, HALF), "little")
    assert {relid for relid in range(HALF * 8) if bits >> relid & 1} == set(told)
    left = int.from_bytes(memory.read(PAGE + HALF, HALF), "little")
    assert {bit for bit in range(HALF * 8) if left >> bit & 1} == {
        bit for bit in sent if bit > vmbus.MAX_RELID
    }


def test_a_page_outside_ram_is_an_error(memory: GuestMemory) -> None:
    with pytest.raises(GuestMemoryError):
        InterruptPage(memory, 1 << 20)


def test_one_doorbell_for_all_channels_gives_each_a_turn_of_its_own(loopback: Any, echo: Any) -> None:
    """A guest that sets every bit makes a turn of the I/O loop no longer than the bits take."""
    loop = loopback()
    channels = opened(loop, echo, vmbus.VERSION_WS2008, 40)
    for channel in channels:
        assert channel.opened.send(b"x" * 8)
    host: VmbusHost = loop.host
    got = [host.devices.of(channel) for channel in host.server.channels.all]
    loop._deliver_doorbell()
    assert sum(len(device.got) for device in got) == 0
    assert len(loop.deferred) == 40
    loop.run()
    assert all(len(channel.received) == 1 for channel in channels)
