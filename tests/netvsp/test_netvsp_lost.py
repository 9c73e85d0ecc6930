"""A guest whose connection ends without a word, as by kexec: its pages are another kernel's from then on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hvkvm.abi import vmbus
from hvkvm.testing.netvsc_driver import data_message

FRAME = bytes.fromhex("020000000001020304050607") + b"\x88\xb5".ljust(48, b"x")
FOR_GUEST = bytes.fromhex("020304050607020000000001") + b"\x88\xb5".ljust(48, b"y")


@pytest.mark.parametrize("what", ["a frame", "a completion that was kept back", "its cable"])
def test_nothing_is_written_between_the_end_of_a_connection_and_that_of_its_channels(
    lan: Callable[..., Any], what: str
) -> None:
    net = lan(keep=True)
    driver = net.driver.start(send_pages=24 * 6144 // 4096)
    net.loop.run()
    driver.send_pages_of(data_message(FRAME))
    driver.send_section(0, data_message(FRAME))
    net.loop.client.contact(vmbus.VERSION_WIN10_V5_3)
    while not net.loop.host.devices._leaving:
        assert net.loop.step()
    pages = [*driver.channel.pages, *driver.receive_pages, *driver.send_pages]
    before = [bytes(net.loop.memory.read(page * 4096, 4096)) for page in pages]
    match what:
        case "a frame":
            assert net.nic.frames([(memoryview(bytes(12)), memoryview(FOR_GUEST))]) == 1
        case "its cable":
            net.nic.link(False)
            net.nic.finish()
        case _:
            channel = net.nic._channels[0]
            assert channel.kept
            channel._late()
            net.loop.synic.events[driver.channel.connection_id]()
            with channel.io:
                channel.rung()
    assert [bytes(net.loop.memory.read(page * 4096, 4096)) for page in pages] == before
    net.loop.run()
    assert not net.nic.in_use
