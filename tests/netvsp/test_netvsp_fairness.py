"""A NIC's turn is bounded by what its packets cost, not by their number alone. In units of work, not time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hvkvm.abi import nvsp, rndis
from hvkvm.abi.ring import (
    VM_PKT_COMP,
    VM_PKT_DATA_INBAND,
    VM_PKT_DATA_USING_GPA_DIRECT,
    GpaRange,
    gpa_direct_header,
)
from hvkvm.devices.synth.netvsp_channel import TURN_PACKETS, TURN_PIECES
from hvkvm.devices.synth.netvsp_send import MAX_RANGES
from hvkvm.testing.netvsc_driver import NetvscDriver, data_message
from hvkvm.vmbus.channel_io import BUDGET_BYTES

Make = Callable[..., Any]
FRAME = bytes.fromhex("020000000001020304050607") + b"\x88\xb5" + bytes(486)
PAGE = 4096


def turns(net: Any) -> list[int]:
    """How many packets each turn takes until the ring is empty."""
    taken = []
    reader = net.nic._channels[0].io.reader
    while True:
        before = reader.packets
        if not net.loop.step():
            return taken
        if reader.packets > before:
            taken.append(reader.packets - before)


def fill(net: Any, payload: bytes, count: int = 1000, **options: Any) -> int:
    """Put as many packets into the ring as there is room for, `count` at most; how many."""
    sent = 0
    with net.driver.channel.opened as io:
        while sent < count and io.send(payload, trans_id=1000 + sent, flags=0, **options):
            sent += 1
    return sent


def message(net: Any, index: int, size: int) -> bytes:
    return bytes(net.driver.rndis(nvsp.RMC_DATA, index, size).ljust(nvsp.MESSAGE_BYTES, b"\0"))


def test_ranges_of_two_bytes_on_two_pages_each(lan: Make) -> None:
    net = lan()
    driver = net.driver.start()
    pages = driver.take_pages(8)
    size = rndis.packet.size
    head = (rndis.RNDIS_MSG_PACKET, size + 512, size - rndis.BODY, 512, 0, 0, 0, 0, 0, 0, 0)
    driver.lay(0, rndis.packet.pack(*head))
    ranges = [GpaRange(2, PAGE - 1, (pages[n % 2 * 2], pages[4 + n % 2 * 2])) for n in range(MAX_RANGES)]
    header = gpa_direct_header(ranges)
    sent = fill(net, message(net, 0, size), kind=VM_PKT_DATA_USING_GPA_DIRECT, header=header)
    views = 2 * MAX_RANGES
    taken = turns(net)
    assert sum(taken) == sent > 5
    assert max(taken) * views < 2 * TURN_PIECES
    assert net.nic.send.counters.frames == sent


def test_messages_that_are_all_dropped(lan: Make) -> None:
    net = lan()
    driver = net.driver.start()
    head = (rndis.RNDIS_MSG_PACKET, rndis.packet.size, rndis.packet.size - rndis.BODY, *[0] * 8)
    many = rndis.packet.pack(*head) * 64
    driver.lay(0, many)
    sent = fill(net, message(net, 0, len(many)), 200, kind=VM_PKT_DATA_INBAND)
    taken = turns(net)
    assert sum(taken) == sent == 200
    assert max(taken) * 64 <= TURN_PIECES + 64
    assert net.nic.send.counters.dropped == 64 * sent


def test_buffers_lent_and_taken_back(lan: Make) -> None:
    net = lan()
    net.driver.start()
    revoke = nvsp.revoke_buf.pack(nvsp.NVSP_MSG1_TYPE_REVOKE_SEND_BUF, 0).ljust(nvsp.MESSAGE_BYTES, b"\0")
    assert fill(net, revoke, 100) == 100
    assert max(turns(net)) <= 3


@pytest.mark.parametrize("kind", [VM_PKT_COMP, VM_PKT_DATA_INBAND])
def test_what_stands_before_a_payload(lan: Make, kind: int) -> None:
    net = lan()
    driver = net.driver = NetvscDriver(net.loop, connect=False, ring_pages=64).start()
    frame = data_message(FRAME)
    driver.lay(0, frame)
    header = bytes(16_000)
    sent = fill(net, message(net, 0, len(frame)), kind=kind, header=header)
    taken = turns(net)
    assert sum(taken) == sent > 10
    assert max(taken) * len(header) < BUDGET_BYTES + len(header)


def test_usual_packets_fill_a_turn(lan: Make) -> None:
    """Sections, and pages; longer frames end a turn by their bytes."""
    net = lan()
    driver = net.driver.start()
    frame = data_message(FRAME)
    driver.lay(0, frame)
    assert fill(net, message(net, 0, len(frame)), 2 * TURN_PACKETS) == 2 * TURN_PACKETS
    assert max(turns(net)) == TURN_PACKETS
    header = gpa_direct_header(driver.put(frame, at=PAGE - 100))
    pages = message(net, nvsp.NETVSC_INVALID_INDEX, 0)
    count = 2 * TURN_PACKETS
    assert fill(net, pages, count, kind=VM_PKT_DATA_USING_GPA_DIRECT, header=header) == count
    assert max(turns(net)) == TURN_PACKETS
    assert net.nic.send.counters.frames == 2 * count
