"""A NIC that is taken away: the cable first, and nothing that the guest has sent stays uncompleted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from netvsp_lan import Lan

from hvkvm.machine import nic_leaving
from hvkvm.machine.nic_leaving import AGAIN_SECONDS, HEED_SECONDS, LEAVE_SECONDS, Leaving
from hvkvm.testing.netvsc_driver import data_message

FRAME = bytes.fromhex("020000000001020304050607") + b"\x88\xb5".ljust(48, b"x")


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A NIC whose guest has heard of its link, long ago."""
    net = Lan(keep=True)
    monkeypatch.setattr(nic_leaving, "monotonic", lambda: net.loop.now)
    net.driver.start(send_pages=24 * 6144 // 4096)
    net.loop.run()
    net.nic.link_told = -AGAIN_SECONDS
    yield net
    net.loop.close()
    assert net.complaints == {}


def pass_time(net: Any, seconds: float) -> None:
    """In small steps, with all that it sets off."""
    end = net.loop.now + seconds
    while net.loop.now < end:
        net.loop.advance(0.005)
        net.loop.run()


def begun(net: Any) -> list[float]:
    """When the NIC is left: empty until it is."""
    left: list[float] = []
    start = net.loop.now
    Leaving(net.nic, net.loop, lambda: left.append(net.loop.now - start)).begin()
    return left


def send(net: Any) -> Any:
    return net.driver.send_pages_of(data_message(FRAME))


def completed(net: Any, ident: Any) -> bool:
    return ident in [done for done, _payload in net.driver.completions]


def test_the_guest_hears_that_its_link_is_down_and_is_given_time_to_heed_it(net: Any) -> None:
    left = begun(net)
    pass_time(net, HEED_SECONDS * 0.9)
    assert net.nic.inspect()["link"] == "down"
    assert not left
    pass_time(net, HEED_SECONDS)
    assert len(left) == 1


def test_one_that_has_just_heard_of_a_link_is_given_more(net: Any) -> None:
    net.nic.link_told = net.loop.now - 0.5
    net.nic._told_link = False  # or being told again counts
    left = begun(net)
    pass_time(net, AGAIN_SECONDS - 0.6)
    assert not left
    pass_time(net, 0.2)
    assert len(left) == 1


def test_what_the_guest_sends_meanwhile_is_completed_and_it_is_left_at_last(net: Any) -> None:
    net.port.room = 0
    left, idents = begun(net), []
    while not left:
        idents.append(send(net))
        pass_time(net, 0.02)
    assert LEAVE_SECONDS <= left[0] <= LEAVE_SECONDS + 0.1
    assert all(completed(net, ident) for ident in idents[:-1])


def test_a_nic_that_no_guest_has_goes_at_once(net: Any) -> None:
    net.driver.leave()
    net.loop.run()
    assert begun(net) == [0]
