"""Connecting, versions, offers, leaving: the control plane against the guest's client."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from hvkvm.abi import vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.abi.tlfs import HvStatus
from hvkvm.errors import RouteError
from hvkvm.testing.vmbus_client import gpadl_messages
from hvkvm.vmbus.inbox import MAX_INBOX
from hvkvm.vmbus.offer import ChannelState, Offer
from hvkvm.vmbus.outbox import MAX_OUTBOX, MOST_RETRY_SECONDS
from hvkvm.vmbus.server import BusState, Server


def names(loop: Any) -> list[str]:
    return [message.kind.name for message in loop.client.messages]


@pytest.mark.parametrize("version", vmbus.HOST_VERSIONS[1:], ids=vmbus.version_text)
def test_each_version_connects_and_gets_its_offers(loopback: Any, echo: Any, version: int) -> None:
    loop = loopback()
    loop.host.add(echo(1))
    loop.host.add(echo(2))
    loop.connection_id = 4 if version >= vmbus.VERSION_WIN10_V5 else 1
    loop.connect(version)
    response = loop.client.last(wire.VERSION_RESPONSE)
    assert response["version_supported"] == 1
    if version >= vmbus.VERSION_WIN10_V5:
        assert response["msg_conn_id"] == 4
    assert names(loop) == ["VERSION_RESPONSE", "OFFERCHANNEL", "OFFERCHANNEL", "ALLOFFERS_DELIVERED"]
    offers = [channel.offer for channel in loop.client.offers.values()]
    assert len({offer["connection_id"] for offer in offers}) == 2
    assert all(offer["is_dedicated"] == 1 and not offer["monitor_allocated"] for offer in offers)


@pytest.mark.parametrize("version", [0, 0x0000000C, 0x00010000, 0x00030001, 0x00050004, 0x00070000])
def test_s62_unknown_versions_are_declined_and_another_may_follow(loopback: Any, version: int) -> None:
    loop = loopback()
    loop.client.contact(version)
    loop.run()
    assert names(loop) == ["VERSION_RESPONSE"]
    assert loop.client.last(wire.VERSION_RESPONSE)["version_supported"] == 0
    loop.connect(vmbus.VERSION_WIN10)
    assert loop.host.server.version == vmbus.VERSION_WIN10


def test_a_capped_host_declines_newer_versions(loopback: Any) -> None:
    loop = loopback(max_version=vmbus.VERSION_WIN10)
    for version in (vmbus.VERSION_WIN10_V5_3, vmbus.VERSION_WIN10_V4_1):
        loop.client.contact(version)
        loop.run()
        assert not loop.client.last(wire.VERSION_RESPONSE)["version_supported"]
    loop.connect(vmbus.VERSION_WIN10)
    loop.host.server.limit_version(vmbus.VERSION_WIN8)
    assert loop.host.server.version == vmbus.VERSION_WIN10  # who is connected stays so
    loop.client.contact(vmbus.VERSION_WIN10)
    loop.run()
    assert not loop.client.last(wire.VERSION_RESPONSE)["version_supported"]
    loop.connect(vmbus.VERSION_WIN8)


def test_features_of_6_0_that_serve_a_paravisor_are_declined(loopback: Any) -> None:
    loop = loopback()
    loop.connect(vmbus.VERSION_COPPER, features=0xFF, client_id=b"c" * 16)
    assert loop.client.last(wire.VERSION_RESPONSE)["supported_features"] == vmbus.HOST_FEATURES
    assert loop.host.server.client_id == b"c" * 16
    loop.client.post(wire.PAUSE)
    loop.client.post(wire.MODIFY_CONNECTION, monitor_page1=0x1000, monitor_page2=0x2000)
    loop.run()
    assert names(loop)[-1] == "MODIFY_CONNECTION_RESPONSE"
    answer = wire.MODIFY_CONNECTION_RESPONSE
    assert loop.client.last(answer)["connection_state"] == vmbus.VMBUS_CONNECTION_OK
    loop.client.post(wire.MODIFY_CONNECTION, monitor_page1=0x1000)
    loop.run()
    assert loop.client.last(answer)["connection_state"] == vmbus.VMBUS_CONNECTION_FAILURE, "one page of two"
    assert "PAUSE_RESPONSE" not in names(loop)
    loop.connect(vmbus.VERSION_COPPER)
    loop.client.post(wire.MODIFY_CONNECTION, monitor_page1=0x1000, monitor_page2=0x2000)
    loop.run()
    assert loop.client.count(answer) == 0, "not negotiated"


@pytest.mark.parametrize("page", ["answered", "refused"])
@pytest.mark.parametrize("version", vmbus.HOST_VERSIONS, ids=vmbus.version_text)
def test_answers_go_to_the_vp_and_sint_of_the_contact(loopback: Any, version: int, page: str) -> None:
    """Since 3.0 the guest names a VP, since 5.0 a SINT; a refusal goes there, too."""
    loop = loopback()
    more = {"monitor_page1": 0x1000} if page == "refused" else {}
    loop.client.contact(version, vp_index=1, sint=5, **more)
    while not loop.synic.messages:
        assert loop.step()
    route, payload = loop.synic.messages[0]
    vp_index, sint = int(version >= vmbus.VERSION_WIN8_1), 5 if version >= vmbus.VERSION_WIN10_V5 else 2
    assert (route.vp_index, route.sint) == (vp_index, sint)
    message = wire.parse(payload)
    assert message is not None
    assert message["version_supported"] == (page == "answered")


@pytest.mark.parametrize(("named", "answered"), [((2, 5), (0, 5)), ((1, 16), (1, 2)), ((1 << 31, 2), (0, 2))])
def test_a_contact_that_names_no_vp_or_sint_is_refused_on_the_usual_one(
    loopback: Any, named: tuple[int, int], answered: tuple[int, int]
) -> None:
    loop = loopback()
    loop.client.contact(vmbus.VERSION_WIN10_V5_3, vp_index=named[0], sint=named[1])
    while not loop.synic.messages:
        assert loop.step()
    route, payload = loop.synic.messages[0]
    assert (route.vp_index, route.sint) == answered
    message = wire.parse(payload)
    assert message is not None
    assert (message["version_supported"], message["connection_state"]) == (0, vmbus.VMBUS_CONNECTION_FAILURE)


@pytest.mark.parametrize(
    "fields",
    [
        {"vp_index": 99},
        {"sint": 16},
        {"sint": 2 | 1 << 8},  # VTL 1
        {"monitor_page1": 0x1000},
    ],
    ids=["vp", "sint", "vtl", "one monitor page"],
)
def test_impossible_contacts_are_answered_with_a_failure(loopback: Any, fields: dict[str, int]) -> None:
    loop = loopback()
    loop.client.contact(vmbus.VERSION_WIN10_V5_3, **fields)
    loop.run()
    response = loop.client.last(wire.VERSION_RESPONSE)
    assert (response["version_supported"], response["connection_state"]) == (0, 2)
    assert loop.host.server.state is BusState.DISCONNECTED
    assert loop.notes.events


def test_offers_are_told_once_a_connection_and_the_end_each_time(loopback: Any, echo: Any) -> None:
    loop = loopback()
    loop.host.add(echo(1))
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    loop.client.post(wire.REQUESTOFFERS)
    loop.run()
    assert loop.client.count(wire.OFFERCHANNEL) == 1
    assert loop.client.offers_delivered == 2


def test_hot_add_and_rescind_reach_a_connected_guest(loopback: Any, echo: Any) -> None:
    loop = loopback()
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    for _ in range(100):
        channel = loop.host.add(echo(1))
        loop.run()
        (guest,) = loop.client.offers.values()
        loop.open(guest)
        loop.host.remove(channel)
        loop.run()
        assert guest.rescinded
        loop.client.release(guest)
        loop.run()
        loop.client.reclaim(guest)
        assert len(loop.host.server.channels.gpadls) == 0  # Linux tears none down
        assert loop.host.server.channels.all == []
    assert loop.synic.events == {}


def test_the_same_device_comes_back_only_after_its_relid_is_released(loopback: Any, echo: Any) -> None:
    loop = loopback()
    first = loop.host.add(echo(1))
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    (guest,) = loop.client.offers.values()
    loop.host.remove(first)
    loop.host.add(echo(1))
    loop.run()
    assert loop.client.count(wire.OFFERCHANNEL) == 1
    loop.client.release(guest)
    loop.run()
    assert loop.client.count(wire.OFFERCHANNEL) == 2


def test_a_rescinded_primary_takes_its_subchannels_first(loopback: Any, echo: Any) -> None:
    loop = loopback()
    primary = loop.host.add(echo(1))
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    loop.host.add(echo(1, index=1))
    loop.run()
    loop.host.remove(primary)
    loop.run()
    gone = [m["relid"] for m in loop.client.messages if m.kind.type == wire.RESCIND_CHANNELOFFER]
    assert [loop.client.offers[relid].offer["sub_channel_index"] for relid in gone] == [1, 0]


def test_the_host_may_not_offer_twice(loopback: Any, echo: Any) -> None:
    loop = loopback()
    loop.host.add(echo(1))
    with pytest.raises(ValueError, match="offered already"):
        loop.host.add(echo(1))


def test_s62_contact_at_any_time_starts_over(loopback: Any, echo: Any) -> None:
    loop = loopback()
    device = echo(1)
    loop.host.add(device)
    for _ in range(5):  # kexec after kexec
        loop.connect(vmbus.VERSION_WIN10_V5_3)
        (guest,) = loop.client.offers.values()
        loop.open(guest)
        loop.client.reclaim(guest)
        loop.post(gpadl_messages(guest.relid, 7, [(40 * 4096, 0, range(40))])[0])  # the rest never comes
        loop.run()
        assert loop.client.last(wire.GPADL_CREATED)["gpadl"] == guest.gpadl, "7 is free to each of them"
    assert device.log == ["opened", "closed"] * 4 + ["opened"]
    gpadls = loop.host.server.channels.gpadls
    assert (len(gpadls), len(list(gpadls)), gpadls.unfinished) == (2, 1, 1)
    loop.client.contact(vmbus.VERSION_WIN10_V5_3)
    loop.run()
    assert (len(gpadls), list(gpadls), gpadls.unfinished, gpadls.values) == (0, [], 0, 0)
    assert loop.synic.events == {}


@pytest.mark.parametrize("version", vmbus.HOST_VERSIONS[2:], ids=vmbus.version_text)
def test_since_2_4_a_channel_has_signals_of_its_own(loopback: Any, echo: Any, version: int) -> None:
    loop = loopback()
    for number in (1, 2):
        loop.host.add(echo(number))
    loop.connect(version)
    for guest in loop.client.offers.values():
        loop.open(guest, vp_index=1)
        guest.opened.send(b"hello")
        loop.run()
    relids = sorted(loop.client.offers)
    assert loop.synic.flags_set == [(1, 2, relid) for relid in relids]
    assert loop.synic.rung == [vmbus.CHANNEL_CONNECTION_ID_BASE | relid for relid in relids]


def test_s62_unload_closes_everything_and_its_answer_is_the_last(loopback: Any, echo: Any) -> None:
    loop = loopback()
    device = echo(1)
    loop.host.add(device)
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    loop.open(next(iter(loop.client.offers.values())))
    loop.client.post(wire.REQUESTOFFERS)
    loop.client.post(wire.UNLOAD)
    loop.run()
    assert names(loop)[-1] == "UNLOAD_RESPONSE"
    assert names(loop).count("UNLOAD_RESPONSE") == 1
    assert device.log == ["opened", "closed"]
    assert loop.synic.events == {}
    before = len(loop.client.messages)
    loop.client.post(wire.REQUESTOFFERS)
    loop.run()
    assert len(loop.client.messages) == before  # only a contact is heard now


def test_relids_released_behind_an_unload_are_no_mistake(loopback: Any, echo: Any) -> None:
    loop = loopback()
    loop.host.add(echo(1))
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    loop.client.post(wire.UNLOAD)
    loop.client.post(wire.RELID_RELEASED, relid=1)
    loop.run()
    assert loop.notes.events == []
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    assert len(loop.client.offers) == 1


@pytest.mark.parametrize("version", vmbus.HOST_VERSIONS, ids=vmbus.version_text)
def test_an_unload_is_answered_at_every_version(loopback: Any, version: int) -> None:
    """3.0 brought it, but iPXE, which leaves a connection of 0.13 by it, waits for an answer."""
    loop = loopback()
    loop.connect(version)
    loop.client.post(wire.UNLOAD)
    loop.run()
    assert names(loop)[-1] == "UNLOAD_RESPONSE"
    assert loop.host.server.state is BusState.DISCONNECTED
    assert loop.synic.events == {}


def test_a_reset_waits_for_slow_devices_and_the_last_contact_counts() -> None:
    server = Server(lambda gpa, n: True, 1)
    channel = server.offer(Offer(b"i" * 16, b"n" * 16, "slow"))

    def contact(version: int) -> None:
        message = wire.parse(wire.build(wire.INITIATE_CONTACT, version=version))
        assert message is not None
        server.receive(message)

    contact(vmbus.VERSION_WIN10)
    channel.state = ChannelState.OPEN
    server.take()
    contact(vmbus.VERSION_WIN8_1)
    contact(vmbus.VERSION_WIN10_V4_1)
    kinds = [type(action).__name__ for action in server.take()]
    assert kinds == ["DropMessages", "CloseChannel", "DropMessages"]
    server.closed(channel)
    (answer,) = server.take()
    assert server.version == vmbus.VERSION_WIN10_V4_1
    assert type(answer).__name__ == "SendMessage"


def test_messages_younger_than_the_connection_are_ignored(loopback: Any, echo: Any) -> None:
    loop = loopback()
    loop.host.add(echo(1))
    loop.connect(vmbus.VERSION_WIN10)
    before = len(loop.client.messages)
    loop.client.post(wire.MODIFYCHANNEL, relid=1, target_vp=0)
    loop.run()
    assert len(loop.client.messages) == before


def test_socket_connects_are_refused_where_nobody_listens(loopback: Any) -> None:
    loop = loopback()
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    loop.client.post(wire.TL_CONNECT_REQUEST, endpoint_id=b"e" * 16, service_id=b"s" * 16)
    loop.run()
    result = loop.client.last(wire.TL_CONNECT_RESULT)
    assert (result["endpoint_id"], result["status"]) == (b"e" * 16, vmbus.STATUS_CONNECTION_REFUSED)


def test_s50_malformed_posts_are_3_and_too_many_19(loopback: Any) -> None:
    loop = loopback()
    assert loop.post(b"\1\0\0\0") == 3
    assert loop.post(bytes(8)) == 3
    assert loop.post(wire.build(wire.CLOSECHANNEL)[:-1]) == 3
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    answers = [loop.client.post(wire.REQUESTOFFERS) for _ in range(MAX_INBOX + 1)]
    assert answers[:-1] == [0] * MAX_INBOX
    assert answers[-1] == 19
    assert loop.client.post(wire.INITIATE_CONTACT, version=vmbus.VERSION_WIN10) == 0
    loop.run()
    assert loop.client.count(wire.VERSION_RESPONSE) == 2


def test_s50_a_guest_that_takes_no_answers_fills_no_queue(loopback: Any) -> None:
    loop = loopback()
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    refused = 0
    for _ in range(2000):
        refused += loop.client.post(wire.REQUESTOFFERS) == 19
        while loop.deferred:  # the host works, the guest never takes a message
            loop._run_deferred()
    assert refused > 1000
    assert len(loop.host.outbox) <= 65
    assert loop.client.contact(vmbus.VERSION_WIN10) == 0
    loop.run()
    assert loop.client.last(wire.VERSION_RESPONSE)["version_supported"] == 1
    assert [m for m in loop.client.messages if m.kind.type == wire.ALLOFFERS_DELIVERED] == []


def test_messages_for_guests_are_not_taken_from_one(loopback: Any, echo: Any) -> None:
    loop = loopback()
    loop.host.add(echo(1))
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    before = loop.host.snapshot()
    for kind in [kind for kind in wire.KINDS.values() if not kind.to_host]:
        loop.client.post(kind.type)
    loop.run()
    assert loop.host.snapshot() == before | {"complaints": loop.host.server.reports.counts}
    assert len([e for e in loop.notes.events if "is for guests" in str(e)]) < 12  # told at a bounded rate


def test_a_machine_reset_forgets_the_guest(loopback: Any, echo: Any) -> None:
    loop = loopback()
    device = echo(1)
    loop.host.add(device)
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    loop.open(next(iter(loop.client.offers.values())))
    loop.host.reset()
    assert device.log == ["opened", "closed"]
    assert loop.host.server.state is BusState.DISCONNECTED
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    assert len(loop.client.offers) == 1


def test_messages_wait_for_a_message_page_that_is_off_for_a_while(loopback: Any, echo: Any) -> None:
    loop = loopback()
    for number in range(3):
        loop.host.add(echo(number))
    loop.client.contact(vmbus.VERSION_WIN10)
    loop.run()
    loop.synic.message_page = False
    loop.client.post(wire.REQUESTOFFERS)
    for _ in range(20):
        loop.run()
        loop.advance(1.0)
        assert sum(timer.active for timer in loop.timers) <= 1
    assert names(loop) == ["VERSION_RESPONSE"]
    loop.synic.message_page = True
    loop.advance(MOST_RETRY_SECONDS)
    loop.run()
    assert names(loop) == ["VERSION_RESPONSE", *["OFFERCHANNEL"] * 3, "ALLOFFERS_DELIVERED"]
    assert not any(timer.active for timer in loop.timers)
    assert len(loop.notes.events) < 10


def test_what_waits_for_a_message_page_is_bounded_and_ends_with_its_connection(loopback: Any) -> None:
    loop = loopback()
    loop.connect(vmbus.VERSION_WIN10)
    loop.synic.message_page = False
    statuses = []
    for number in range(2 * MAX_INBOX):
        statuses.append(loop.client.post(wire.GPADL_TEARDOWN, relid=1, gpadl=number))
        loop.run()
        loop.advance(0.1)
    assert set(statuses) == {0, HvStatus.INSUFFICIENT_BUFFERS}
    assert loop.host.snapshot()["to_guest_waiting"] == MAX_OUTBOX
    loop.client.contact(vmbus.VERSION_WIN10)
    loop.synic.message_page = True
    loop.run()
    assert names(loop) == ["VERSION_RESPONSE"]  # at once, and nothing of before
    assert not any(timer.active for timer in loop.timers)


def test_a_host_that_is_short_of_something_loses_no_message(
    loopback: Any, echo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = loopback()
    loop.host.add(echo(1))
    tries: list[float] = []

    def open_route(*_: Any) -> Any:
        tries.append(loop.now)
        raise RouteError("Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(loop.synic, "open_route", open_route)
        loop.client.contact(vmbus.VERSION_WIN10)
        loop.run()
        for _ in range(100):
            loop.advance(0.1)
            loop.run()
    waits = [later - sooner for sooner, later in pairwise(tries)]
    assert all(later >= sooner - 1e-6 for sooner, later in pairwise(waits[:6]))
    assert max(waits) == pytest.approx(MOST_RETRY_SECONDS)
    assert names(loop) == []
    loop.advance(MOST_RETRY_SECONDS)
    loop.run()
    assert names(loop) == ["VERSION_RESPONSE"]
