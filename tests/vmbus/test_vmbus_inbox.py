"""The guest's messages on their way to the host: what waits, what is refused, and who is woken (S50)."""

from __future__ import annotations

import pytest

from hvkvm.abi import vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.abi.hv_synic import hv_post_message_input
from hvkvm.vmbus.inbox import MAX_INBOX, Inbox


class Bench:
    """An inbox, and how often it has had the loop woken."""

    def __init__(self) -> None:
        self.woken = 0
        self.inbox = Inbox(self.wake)

    def wake(self) -> None:
        self.woken += 1

    def post(self, kind: int, **fields: int) -> int:
        payload = wire.build(kind, **fields)
        message = hv_post_message_input(message_type=1, payload_size=len(payload))
        message.payload[: len(payload)] = payload
        return self.inbox.post(message)

    def contact(self) -> int:
        return self.post(wire.INITIATE_CONTACT, version=vmbus.VERSION_WIN10_V5_3)

    def take(self, *, crowded: bool = False, held: bool = False) -> int | None:
        """The type of the next one."""
        message = self.inbox.take(crowded=crowded, held=held)
        return None if message is None else message.kind.type


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_the_loop_is_woken_once_until_nothing_was_found(bench: Bench) -> None:
    for _ in range(3):
        assert bench.post(wire.REQUESTOFFERS) == 0
    assert bench.woken == 1
    assert [bench.take() for _ in range(4)] == [wire.REQUESTOFFERS] * 3 + [None]
    bench.inbox.resume()
    assert bench.woken == 1, "for nothing"
    bench.post(wire.UNLOAD)
    assert bench.woken == 2


@pytest.mark.parametrize("why", [{"crowded": True}, {"held": True}])
def test_what_had_to_wait_is_taken_up_again(bench: Bench, why: dict[str, bool]) -> None:
    bench.post(wire.REQUESTOFFERS)
    assert bench.take(**why) is None
    for _ in range(3):
        bench.inbox.resume()
    assert bench.woken == 2
    assert bench.take() == wire.REQUESTOFFERS


def test_a_contact_gets_through_a_crowd_but_not_at_rest(bench: Bench) -> None:
    bench.post(wire.REQUESTOFFERS)
    bench.contact()
    assert len(bench.inbox) == 1, "what came before it is of a connection that ends with it"
    assert bench.take(crowded=True, held=True) is None
    assert bench.take(crowded=True) == wire.INITIATE_CONTACT
    assert bench.take(crowded=True) is None


def test_s50_a_full_one_refuses_all_but_a_contact_and_an_unload(bench: Bench) -> None:
    for kind in (wire.UNLOAD, wire.INITIATE_CONTACT):
        while (status := bench.post(wire.REQUESTOFFERS)) == 0:
            pass
        assert (status, len(bench.inbox)) == (19, MAX_INBOX)
        assert bench.post(kind) == 0
        assert len(bench.inbox) == 1, "no message makes it longer than it may be"
        assert bench.take() == kind


def test_what_waits_is_saved_and_a_reset_forgets_it(bench: Bench) -> None:
    bench.post(wire.REQUESTOFFERS)
    bench.post(wire.UNLOAD)
    saved = bench.inbox.save()
    other = Bench()
    other.inbox.load(saved * MAX_INBOX)
    assert len(other.inbox) == MAX_INBOX
    assert [other.take(), other.take()] == [wire.REQUESTOFFERS, wire.UNLOAD]
    with pytest.raises(ValueError, match="is none"):
        other.inbox.load((b"\xff" * 8,))
    bench.inbox.clear()
    assert (len(bench.inbox), bench.take()) == (0, None)


@pytest.mark.parametrize(("message_type", "size"), [(2, 8), (0x80000001, 8), (1, 7), (1, 0)])
def test_s50_what_is_no_message_of_vmbus_is_refused(bench: Bench, message_type: int, size: int) -> None:
    message = hv_post_message_input(message_type=message_type, payload_size=size)
    payload = wire.build(wire.REQUESTOFFERS)
    message.payload[: len(payload)] = payload
    assert bench.inbox.post(message) == 3
    assert (len(bench.inbox), bench.woken) == (0, 0)
