"""Guests that break every rule of a NIC: the fuzzer's short form, and that it finds mistakes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any

import netvsp_fuzz
import pytest

from hvkvm.abi import nvsp, rndis
from hvkvm.abi import vmbus_messages as wire
from hvkvm.abi.ring import VM_PKT_COMP, VM_PKT_DATA_USING_GPA_DIRECT, GpaRange, gpa_direct_header
from hvkvm.devices.synth import netvsp_send
from hvkvm.devices.synth.netvsp_buffer import Pieces
from hvkvm.devices.synth.netvsp_channel import NvspChannel
from hvkvm.testing.netvsc_driver import data_message

Make = Callable[..., Any]
PEER, OURS = bytes.fromhex("020000000001"), bytes.fromhex("020304050607")
FRAME = PEER + OURS + b"\x88\xb5" + bytes(100)
GPA = VM_PKT_DATA_USING_GPA_DIRECT


@pytest.mark.parametrize("batch", range(4))
def test_whatever_a_guest_does(batch: int) -> None:
    for seed in range(batch * 10, batch * 10 + 10):
        netvsp_fuzz.fuzz(seed)


def broken(net: Any) -> bool:
    return bool(net.complaints.get("channel broken"))


def again(net: Any) -> Any:
    """The guest's next connection."""
    net.loop.client.free_pages = list(range(64, 1000))
    net.driver = type(net.driver)(net.loop)
    return net.driver.start()


@pytest.mark.parametrize(
    ("payload", "options"),
    [
        (b"\1", {}),
        (nvsp.rndis_pkt.pack(107, 0, 7777, 100), {}),
        (nvsp.rndis_pkt.pack(107, 0, 0, 6145), {}),
        (nvsp.rndis_pkt.pack(107, 0, 0xFFFFFFFF, 0), {"kind": GPA, "header": bytes(8)}),
        (nvsp.rndis_pkt.pack(107, 0, 0xFFFFFFFF, 0), {"kind": GPA, "header": b"\0\0\0\0\xff\xff\xff\xff"}),
        (
            nvsp.rndis_pkt.pack(107, 0, 0xFFFFFFFF, 0),
            {"kind": GPA, "header": gpa_direct_header([GpaRange(4096, 0, (1 << 40,))])},
        ),
        (
            nvsp.rndis_pkt.pack(107, 0, 0xFFFFFFFF, 0),
            {"kind": GPA, "header": gpa_direct_header([GpaRange(1 << 18, 0, (5,) * 64)])},
        ),
        (nvsp.rndis_pkt.pack(107, 0, 0xFFFFFFFF, 0), {"kind": 8}),
    ],
)
def test_a_packet_that_breaks_the_rules_ends_the_channel(lan: Make, payload: bytes, options: Any) -> None:
    net = lan()
    driver = net.driver.start()
    assert driver.channel.opened.send(payload, trans_id=5, flags=1, **options)
    net.loop.run()
    assert broken(net)
    assert driver.channel.rescinded
    assert net.port.sent == []
    again(net)
    assert net.inject(OURS + FRAME[6:])


@pytest.mark.parametrize("seed", range(200))
def test_no_word_of_an_rndis_message_leads_outside_it(lan: Make, seed: int) -> None:
    random = Random(seed)
    net = lan()
    driver = net.driver.start()
    secret = b"\xee" * 6144
    driver.send_section(1, secret)  # what lies behind, of another packet
    if broken(net):
        driver = again(net)
    message = bytearray(data_message(FRAME, [(rndis.IEEE_8021Q_INFO, 5 << 4)]))
    at = random.randrange(0, 60, 4)
    value = random.choice([0, 1, 8, len(message), len(message) + 1, 6144, 1 << 16, 0xFFFFFFF8, 0xFFFFFFFF])
    message[at : at + 4] = value.to_bytes(4, "little")
    driver.channel.opened.send(driver.rndis(0, 0, len(message)), trans_id=77, flags=1)
    for offset in range(0, len(message), 512):
        net.loop.memory.write(driver.send_pages[0] * 4096 + offset, bytes(message[offset : offset + 512]))
    net.loop.run()
    assert all(b"\xee" not in frame for _vnet, frame in net.port.sent)
    assert broken(net) or [one for one, _ in driver.completions].count(77) == 1


def test_completions_that_nobody_asked_for_change_nothing(lan: Make) -> None:
    net = lan()
    driver = net.driver.start()
    driver.complete = False
    net.inject(OURS + FRAME[6:])
    lent = net.nic.receive.pieces.lent
    assert lent == 1
    for ident in (0, 1, 2, 1 << 63, driver.held[0][1], driver.held[0][1], driver.held[0][1]):
        driver.channel.opened.send(bytes(8), kind=VM_PKT_COMP, trans_id=ident)
        net.loop.run()
    assert net.nic.receive.pieces.lent == 0
    assert not broken(net)


def test_a_receive_buffer_torn_down_in_use_is_written_no_more(lan: Make) -> None:
    net = lan()
    driver = net.driver.start()
    driver.complete = False
    net.inject(*[OURS + FRAME[6:]] * 5)
    net.loop.client.post(wire.GPADL_TEARDOWN, relid=driver.channel.relid, gpadl=driver.receive_gpadl)
    net.loop.run()
    for pfn in driver.receive_pages:
        net.loop.memory.zero(pfn * 4096, 4096)
    net.inject(*[OURS + FRAME[6:]] * 50)
    assert not any(any(net.loop.memory.read(pfn * 4096, 4096)) for pfn in driver.receive_pages)
    driver.complete_all()
    assert not broken(net)


def test_answers_that_nobody_takes_are_bounded(lan: Make) -> None:
    net = lan()
    driver = net.driver
    driver.open()
    driver.init(nvsp.NVSP_PROTOCOL_VERSION_61)  # and no receive buffer
    query = rndis.request.pack(rndis.RNDIS_MSG_QUERY, 28, 5, rndis.RNDIS_OID_GEN_LINK_SPEED, 0, 20, 0)
    for _ in range(100):
        if driver.channel.rescinded:
            break
        driver.channel.io.send(
            driver.rndis(nvsp.RMC_CONTROL, nvsp.NETVSC_INVALID_INDEX, 0),
            kind=GPA,
            header=gpa_direct_header(driver.put(query, pages=[900])),
        )
        net.loop.run()
    assert broken(net)
    assert not net.nic.receive.waiting


@pytest.mark.parametrize(
    ("owner", "name", "mistake"),
    [
        (NvspChannel, "_complete", lambda self, *what: (self._answer(*what), self._answer(*what))),
        (Pieces, "back", lambda *_: 1 // 0),
        (NvspChannel, "_settle", lambda *_: 1 // 0),
        (netvsp_send, "_cut", lambda views, skip, n: [memoryview(b"host memory")]),
    ],
)
def test_a_mistake_of_ours_is_found(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, mistake: Any
) -> None:
    monkeypatch.setattr(owner, name, mistake)
    with pytest.raises((AssertionError, ZeroDivisionError)):
        deque(map(netvsp_fuzz.fuzz, range(100)), maxlen=0)
