"""Completions that are kept back: when, for how long, and that none is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hvkvm.abi import rndis
from hvkvm.devices.synth import netvsp
from hvkvm.devices.synth.netvsp_channel import KEEP_SECONDS, MAX_KEPT
from hvkvm.testing.netvsc_driver import data_message

Make = Callable[..., Any]
FRAME = bytes.fromhex("020000000001020304050607") + b"\x88\xb5".ljust(48, b"x")
FOR_GUEST = bytes.fromhex("020304050607020000000001") + b"\x88\xb5".ljust(48, b"y")
SECTIONS_PAGES = 6144 * 8 * 3 // 4096
"""A send buffer of which three sections may wait."""


def short(driver: Any, section: int = 0) -> int:
    """Send a short packet; its transaction id."""
    ident: int = driver.send_section(section, data_message(FRAME))
    return ident


def done(driver: Any) -> list[int]:
    return [ident for ident, _payload in driver.completions]


def test_a_short_packet_is_completed_with_the_next_frame_by_one_interrupt(lan: Make) -> None:
    net = lan(keep=True)
    driver = net.driver.start(send_pages=SECTIONS_PAGES)
    io = net.nic._channels[0].io
    before = io.signals
    ident = short(driver)
    assert len(net.port.sent) == 1, "the frame itself does not wait"
    assert (ident in done(driver), io.signals) == (False, before)
    assert net.inject(FOR_GUEST) == [(FOR_GUEST, {})]
    assert (done(driver).count(ident), io.signals) == (1, before + 1)


def test_alone_it_is_completed_after_a_while(lan: Make) -> None:
    net = lan(keep=True)
    driver = net.driver.start(send_pages=SECTIONS_PAGES)
    for _ in range(3):
        ident = short(driver)
        net.loop.advance(KEEP_SECONDS / 2)
        net.loop.run()
        assert ident not in done(driver)
        net.loop.advance(2 * KEEP_SECONDS)
        net.loop.run()
        assert done(driver).count(ident) == 1


def test_what_is_kept_behind_an_old_timer_waits_its_own_time(lan: Make) -> None:
    net = lan(keep=True)
    driver = net.driver.start(send_pages=SECTIONS_PAGES)
    short(driver)
    net.loop.advance(KEEP_SECONDS * 0.9)
    net.inject(FOR_GUEST)
    ident = short(driver)
    net.loop.advance(KEEP_SECONDS * 0.5)  # the first one's timer has run
    net.loop.run()
    assert ident not in done(driver)
    net.loop.advance(KEEP_SECONDS)
    net.loop.run()
    assert done(driver).count(ident) == 1


def test_a_packet_out_of_the_guests_pages_is_completed_at_once_with_all_that_wait(lan: Make) -> None:
    net = lan(keep=True)
    driver = net.driver.start(send_pages=SECTIONS_PAGES)
    idents = [short(driver), driver.send_pages_of(data_message(FRAME))]
    assert sorted(done(driver)[-2:]) == sorted(idents)


@pytest.mark.parametrize(("pages", "most"), [(SECTIONS_PAGES, 3), (SECTIONS_PAGES * 8, MAX_KEPT), (6, 0)])
def test_a_guest_keeps_most_of_its_sections(lan: Make, pages: int, most: int) -> None:
    net = lan(keep=True)
    driver = net.driver.start(send_pages=pages, receive_pages=512)
    for _round in range(3):
        before = len(done(driver))
        for _ in range(most):
            short(driver)
        assert len(done(driver)) == before
        short(driver)
        assert len(done(driver)) == before + most + 1


def test_a_restored_guest_gets_what_was_kept(lan: Make) -> None:
    net = lan(keep=True)
    driver = net.driver.start(send_pages=SECTIONS_PAGES)
    idents = [short(driver), short(driver)]
    net.go_on_with_another()
    net.loop.run()
    assert [done(driver).count(ident) for ident in idents] == [1, 1]


def test_what_is_kept_ends_with_the_channel(lan: Make) -> None:
    net = lan(keep=True)
    driver = net.driver.start(send_pages=SECTIONS_PAGES)
    ident = short(driver)
    driver.leave()
    assert not any(timer.active for timer in net.loop.timers if timer.args[:1])
    net.loop.advance(3 * KEEP_SECONDS)
    net.loop.run()
    assert ident not in done(driver)
    assert net.complaints == {}


def test_a_nic_whose_cable_is_gone_for_good_owes_its_guest_nothing(lan: Make) -> None:
    """Linux waits for each completion when its device is rescinded, for ever."""
    net = lan(keep=True)
    driver = net.driver.start(send_pages=SECTIONS_PAGES)
    kept = [short(driver), short(driver)]
    net.port.room = 0
    waiting = [driver.send_pages_of(data_message(FRAME)) for _ in range(3)]
    net.loop.run()
    assert not {*kept, *waiting} & set(done(driver))
    net.nic.unplug()
    net.loop.run()
    assert [done(driver).count(ident) for ident in kept + waiting] == [1] * 5
    later = [short(driver), driver.send_pages_of(data_message(FRAME))]
    net.nic.finish()
    assert [done(driver).count(ident) for ident in later] == [1, 1]
    sent = len(net.port.sent)
    net.port.make_room(None)
    net.nic.link(True)
    net.port.inject(FOR_GUEST)
    net.loop.run()
    assert (net.nic.inspect()["link"], driver.indications[-1]) == (
        "down",
        rndis.RNDIS_STATUS_MEDIA_DISCONNECT,
    )
    assert (len(net.port.sent), driver.received) == (sent, [])
    driver.leave()
    assert not net.nic.in_use
    net.nic.finish()


def test_a_restored_nic_takes_the_guest_to_have_heard_of_its_link_just_now(
    lan: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = lan()
    monkeypatch.setattr(netvsp, "monotonic", lambda: net.loop.now + 1000)
    net.driver.complete = False
    net.driver.start()
    net.loop.run()
    assert (net.nic.telling_link, net.nic.link_heard) == (True, 0)
    net.loop.advance(5)
    net.driver.complete_all()
    net.loop.run()
    assert (net.nic.telling_link, net.nic.link_heard) == (False, 1005)
    net.loop.advance(5)
    net.go_on_with_another()
    assert net.nic.link_heard == 1010
