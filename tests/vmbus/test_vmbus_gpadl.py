"""GPADLs: many messages, many ranges, and every count a guest can lie about."""

from __future__ import annotations

from itertools import count
from struct import pack
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvkvm.abi import vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.testing.vmbus_client import gpadl_messages
from hvkvm.vmbus import gpadl as gpadl_module
from hvkvm.vmbus.gpadl import Finished, GpadlTable

PAGE = 4096


def ram(gpa: int, n: int) -> bool:
    return gpa + n <= 1 << 32


def feed(table: GpadlTable, messages: list[bytes]) -> Finished | str | None:
    result: Finished | str | None = None
    for payload in messages:
        message = wire.parse(payload)
        assert message is not None
        if message.kind.type == wire.GPADL_HEADER:
            result = table.header(
                message["relid"],
                message["gpadl"],
                message["range_buflen"],
                message["rangecount"],
                message.tail,
            )
        else:
            result = table.body(message["gpadl"], message.tail)
    return result


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 300), st.integers(0, 4095), st.integers(1, 4096)), min_size=1, max_size=4
    ),
    st.booleans(),
)
def test_ranges_survive_any_split_into_messages(parts: list[tuple[int, int, int]], pad: bool) -> None:
    ranges = []
    for pages, offset, last in parts:
        count = max(1, pages * PAGE - offset - (PAGE - last))
        ranges.append((count, offset, [(i * 7) % 5000 for i in range(-(-(offset + count) // PAGE))]))
    messages = gpadl_messages(3, 0xE1E10, ranges)
    if pad:  # UEFI sends 240 bytes whatever it needs
        messages = [payload.ljust(240, b"\0") for payload in messages]
    table = GpadlTable(ram)
    done = feed(table, messages)
    assert isinstance(done, Finished)
    assert done.gpadl is not None
    assert [(r.byte_count, r.byte_offset, list(r.pfns)) for r in done.gpadl.ranges] == ranges
    assert table.unfinished == 0


def test_linux_sends_26_pages_in_the_header_and_28_in_a_body() -> None:
    assert len(gpadl_messages(1, 1, [(26 * PAGE, 0, range(26))])) == 1
    assert len(gpadl_messages(1, 1, [(27 * PAGE, 0, range(27))])) == 2
    assert len(gpadl_messages(1, 1, [(54 * PAGE, 0, range(54))])) == 2
    assert len(gpadl_messages(1, 1, [(55 * PAGE, 0, range(55))])) == 3


BAD = {
    "s59 buflen below the ranges' own headers": (8, 2, b""),
    "no range": (16, 0, bytes(16)),
    "nothing at all": (0, 0, b""),
    "no room for a page": (8, 1, bytes(8)),
    "odd buflen": (17, 1, bytes(24)),
    "empty range": (16, 1, bytes(16)),
    "offset beyond a page": (16, 1, (1).to_bytes(4, "little") + (4096).to_bytes(4, "little") + bytes(8)),
    "offset beyond a page, with pages for it": (24, 1, pack("<IIQQ", 1, PAGE, 5, 6)),
    "too few pages": (16, 1, (8193).to_bytes(4, "little") + bytes(12)),
    "count overflows": (16, 1, (0xFFFFFFFF).to_bytes(4, "little") + bytes(12)),
    "bytes of half a value behind the last": (20, 1, pack("<IIQI", PAGE, 0, 5, 0) + bytes(4)),
    "too many values": (24, 1, (4096).to_bytes(4, "little") + bytes(20)),
    "page outside RAM": (16, 1, (4096).to_bytes(4, "little") + bytes(4) + (1 << 20).to_bytes(8, "little")),
    "page number overflows": (16, 1, (4096).to_bytes(4, "little") + bytes(4) + b"\xff" * 8),
}


@pytest.mark.parametrize("name", BAD)
def test_s59_impossible_headers_are_refused_and_leave_nothing(name: str) -> None:
    buflen, rangecount, tail = BAD[name]
    table = GpadlTable(ram)
    done = table.header(1, 2, buflen, rangecount, tail)
    assert done is not None
    assert done.gpadl is None
    assert done.why
    assert (len(table), table.values) == (0, 0)


def described(ranges: int) -> bytes:
    return pack("<IIQ", PAGE, 0, 5) * ranges


def test_a_gpadl_of_more_ranges_than_any_driver_has_is_refused() -> None:
    table = GpadlTable(ram)
    most = gpadl_module.MAX_RANGES
    good = table.header(1, 1, 16 * most, most, described(most))
    assert good is not None
    assert good.gpadl is not None
    assert len(good.gpadl.ranges) == most
    bad = table.header(1, 2, 16 * (most + 1), most + 1, described(most + 1))
    assert bad == Finished(2, 1, None, "17 ranges, of which 16 are the most")
    assert len(table) == 1


@pytest.mark.parametrize("ranges", [1, 4, 16])
def test_ranges_are_counted_by_what_they_cost(monkeypatch: pytest.MonkeyPatch, ranges: int) -> None:
    monkeypatch.setattr(gpadl_module, "MAX_VALUES", 10_000)
    table = GpadlTable(ram)
    ids = count()
    while (done := table.header(1, next(ids), 16 * ranges, ranges, described(ranges))) and done.gpadl:
        pass
    assert sum(len(gpadl.ranges) for gpadl in table) <= 10_000 // gpadl_module.RANGE_VALUES
    table.drop_channel(1)
    assert (len(table), table.values) == (0, 0)


def test_s60_a_body_too_many_is_ignored() -> None:
    table = GpadlTable(ram)
    messages = gpadl_messages(1, 9, [(40 * PAGE, 0, range(40))])
    assert isinstance(feed(table, messages), Finished)
    assert isinstance(feed(table, messages[1:]), str)
    assert isinstance(table.body(77, bytes(8)), str)
    assert len(table) == 1


def test_an_id_is_taken_while_it_is_used_and_free_afterwards() -> None:
    table = GpadlTable(ram)
    one = gpadl_messages(1, 9, [(PAGE, 0, [5])])
    feed(table, one)
    again = feed(table, one)
    assert isinstance(again, Finished)
    assert again.gpadl is None
    assert isinstance(feed(table, gpadl_messages(2, 9, [(PAGE, 0, [5])])), Finished)  # another channel's
    assert table.drop(1, 9)
    assert not table.drop(1, 9)
    renewed = feed(table, one)
    assert isinstance(renewed, Finished)
    assert renewed.gpadl is not None


def test_an_id_is_taken_while_it_is_unfinished() -> None:
    """A body names no channel, so the id is taken for all of them; and what was claimed is given back."""
    table = GpadlTable(ram)
    header, body = gpadl_messages(1, 9, [(40 * PAGE, 0, range(40))])
    assert feed(table, [header]) is None
    claimed = table.values
    for relid in (1, 2):
        assert table.header(relid, 9, 240, 1, b"") == Finished(9, relid, None, "the id is in use")
    assert not table.abandon(2, 9)
    assert (table.unfinished, table.values) == (1, claimed)
    done = feed(table, [body])
    assert isinstance(done, Finished)
    assert (done.relid, done.gpadl is not None) == (1, True)
    table.drop_channel(1)
    assert (len(table), table.values) == (0, 0)


@pytest.mark.parametrize(
    ("ranges", "pages"),
    [
        ([(2 * PAGE, 0, [5, 7])], [5, 7]),
        ([(2 * PAGE, 8, [5, 7, 9])], None),
        ([(2 * PAGE - 8, 8, [5, 7])], None),
        ([(2 * PAGE - 8, 0, [5, 7])], None),
        ([(PAGE, 0, [5]), (PAGE, 0, [7])], None),
    ],
    ids=["whole pages", "beginning within one", "ending with one", "ending within one", "two ranges"],
)
def test_rings_lie_in_one_range_of_whole_pages(
    ranges: list[tuple[int, int, list[int]]], pages: list[int] | None
) -> None:
    done = feed(GpadlTable(ram), gpadl_messages(1, 9, ranges))
    assert isinstance(done, Finished)
    assert done.gpadl is not None
    found = done.gpadl.ring_pages()
    assert (None if found is None else list(found)) == pages


def test_a_connection_has_so_many_gpadls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpadl_module, "MAX_GPADLS", 10)
    table = GpadlTable(ram)
    results = [table.header(1, number, 16, 1, described(1)) for number in range(12)]
    assert [result is not None and result.gpadl is not None for result in results] == [True] * 10 + [
        False
    ] * 2
    assert table.drop(1, 3)
    assert table.header(1, 20, 240, 1, b"") is None, "room again"
    refused = table.header(1, 21, 16, 1, described(1))
    assert refused is not None
    assert refused.gpadl is None, "unfinished ones count, too"


def test_what_is_claimed_has_a_bound_though_nothing_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpadl_module, "MAX_VALUES", 30_000)
    table = GpadlTable(ram)
    results = [table.header(1, number, 65528, 1, b"") for number in range(10)]
    assert results[:3] == [None] * 3
    assert all(result is not None and result.gpadl is None for result in results[3:])
    assert table.values <= 30_000
    table.drop_channel(1)
    assert (len(table), table.values) == (0, 0)


def test_unfinished_ones_have_a_bound() -> None:
    table = GpadlTable(ram)
    results = [table.header(1, number, 240, 1, b"") for number in range(gpadl_module.MAX_UNFINISHED + 5)]
    assert sum(result is None for result in results) == gpadl_module.MAX_UNFINISHED
    whole = table.header(1, 1000, 16, 1, described(1))
    assert whole is not None
    assert whole.gpadl is not None, "one that needs no body is none of them"


def connected(loopback: Any, echo: Any) -> tuple[Any, Any]:
    loop = loopback()
    loop.host.add(echo(1))
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    return loop, next(iter(loop.client.offers.values()))


def test_every_gpadl_request_has_one_answer(loopback: Any, echo: Any) -> None:
    loop, guest = connected(loopback, echo)
    client = loop.client
    client.post_gpadl(999, [100])  # no such channel
    client.post_gpadl(guest.relid, [1 << 40])  # not RAM
    client.post_gpadl(guest.relid, list(range(100, 200)))
    client.post(wire.GPADL_TEARDOWN, relid=5, gpadl=5)  # unknown
    loop.run()
    statuses = [bool(m["status"]) for m in client.messages if m.kind.type == wire.GPADL_CREATED]
    assert statuses == [True, True, False]
    assert client.count(wire.GPADL_TORNDOWN) == 1


def test_a_teardown_of_an_unfinished_one_answers_both(loopback: Any, echo: Any) -> None:
    loop, guest = connected(loopback, echo)
    loop.post(gpadl_messages(guest.relid, 7, [(40 * PAGE, 0, range(40))])[0])
    loop.client.post(wire.GPADL_TEARDOWN, relid=guest.relid, gpadl=7)
    loop.run()
    assert [m.kind.name for m in loop.client.messages[-2:]] == ["GPADL_CREATED", "GPADL_TORNDOWN"]
    assert loop.client.last(wire.GPADL_CREATED)["status"] != 0


def test_one_that_was_torn_down_is_gone(loopback: Any, echo: Any) -> None:
    loop, guest = connected(loopback, echo)
    for _ in range(3):
        loop.client.post_gpadl(guest.relid, [100], gpadl=7)
        loop.client.post(wire.GPADL_TEARDOWN, relid=guest.relid, gpadl=7)
        loop.run()
        assert loop.client.last(wire.GPADL_CREATED)["status"] == 0
        assert (len(loop.host.server.channels.gpadls), loop.host.server.channels.gpadls.values) == (0, 0)
    assert loop.client.count(wire.GPADL_TORNDOWN) == 3


def test_an_unfinished_one_is_answered_when_its_relid_is_released(loopback: Any, echo: Any) -> None:
    loop, guest = connected(loopback, echo)
    loop.post(gpadl_messages(guest.relid, 7, [(40 * PAGE, 0, range(40))])[0])
    loop.run()
    assert loop.client.count(wire.GPADL_CREATED) == 0
    loop.client.post(wire.RELID_RELEASED, relid=guest.relid)
    loop.run()
    answer = loop.client.last(wire.GPADL_CREATED)
    assert (answer["gpadl"], answer["status"]) == (7, vmbus.STATUS_UNSUCCESSFUL)
    assert len(loop.host.server.channels.gpadls) == 0


def test_tearing_down_an_open_ring_closes_its_channel_first(loopback: Any, echo: Any) -> None:
    loop, guest = connected(loopback, echo)
    loop.open(guest)
    loop.client.post(wire.GPADL_TEARDOWN, relid=guest.relid, gpadl=guest.gpadl)
    loop.run()
    (channel,) = loop.host.server.channels.all
    assert channel.state.value == "offered"
    assert loop.client.last(wire.GPADL_TORNDOWN)["gpadl"] == guest.gpadl
    assert loop.synic.events == {}


def test_gpadls_of_a_rescinded_channel_are_still_answered(loopback: Any, echo: Any) -> None:
    loop, guest = connected(loopback, echo)
    loop.host.remove(loop.host.server.channels.all[0])
    gpadl = loop.client.post_gpadl(guest.relid, [100])
    loop.client.post(wire.GPADL_TEARDOWN, relid=guest.relid, gpadl=gpadl)
    loop.run()
    assert loop.client.last(wire.GPADL_CREATED)["status"] == 0
    assert loop.client.last(wire.GPADL_TORNDOWN)["gpadl"] == gpadl
