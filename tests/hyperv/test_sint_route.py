"""Routes: who may open them, what they share, when the line goes (S10 to S20, S33 to S35)."""

from __future__ import annotations

import errno
import threading

import pytest
from fake_synic import World

from hvkvm.errors import KvmIoctlError, RouteError
from hvkvm.events import Warned


def test_s1_inactive_vp_gives_no_interrupt_and_no_flag(world: World) -> None:
    route, statuses = world.sender()
    vp = world.vp()
    vp.close()
    assert route.set_event_flag(1) == -errno.ENXIO
    route.post(1, b"")
    world.settle()
    assert statuses == [-errno.ENXIO]


@pytest.mark.parametrize("vp_index", [-1, 2, 99, 1 << 32])
def test_s10_unknown_vp_is_an_error_and_nothing_more(world: World, vp_index: int) -> None:
    with pytest.raises(RouteError, match=f"VP {vp_index}"):
        world.open(vp=vp_index)
    assert world.synic.lines == {}


@pytest.mark.parametrize("sint", [-1, 16, 99])
def test_s11_sint_is_checked_before_anything_is_made(world: World, sint: int) -> None:
    with pytest.raises(RouteError, match=f"SINT {sint}"):
        world.open(sint=sint)
    assert world.synic.lines == {}


def test_s12_routes_to_one_sint_share_the_line_and_it_goes_with_the_last(world: World) -> None:
    first, second = world.open(), world.open()
    other = world.open(sint=3)
    assert world.synic.open_lines() == 2
    first.pulse()
    second.pulse()
    assert world.line().pulses == 2
    first.close()
    assert world.synic.open_lines() == 2
    assert second.pulse() == 0
    second.close()
    assert world.synic.open_lines() == 1
    assert other.pulse() == 0
    again = world.open()
    assert len(world.synic.lines[0, 2]) == 2
    assert again.pulse() == 0


def test_s12_second_user_of_completions_is_refused(world: World) -> None:
    first, _ = world.sender()
    with pytest.raises(RouteError, match="already"):
        world.sender()
    plain = world.open()
    first.close()
    second, statuses = world.sender()
    second.post(1, b"")
    world.settle()
    assert statuses == [0]
    plain.close()
    second.close()
    assert world.synic.open_lines() == 0


def test_s13_acks_and_staging_exist_only_for_a_completion_user(world: World) -> None:
    plain = world.open()
    assert plain.staging is None
    assert not world.line().acks
    sender, _ = world.sender()
    assert sender.staging is not None
    assert world.line().acks, "the shared line learned it"


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "too many"), KvmIoctlError(errno.ENOSPC, "X", "vm")])
def test_s14_a_line_that_cannot_be_made_is_an_error_with_its_reason(world: World, error: Exception) -> None:
    world.synic.fail["line"] = error
    with pytest.raises(RouteError) as caught:
        world.sender()
    assert caught.value.__cause__ is error
    assert str(error) in str(caught.value)
    world.synic.fail.clear()
    route, statuses = world.sender()
    route.post(1, b"")
    world.settle()
    assert statuses == [0]


def test_s14_a_line_that_cannot_learn_acks_keeps_its_old_users(world: World) -> None:
    plain = world.open()
    world.synic.fail["acks"] = OSError(errno.EMFILE, "too many")
    with pytest.raises(RouteError):
        world.sender()
    assert plain.pulse() == 0
    world.synic.fail.clear()
    world.sender()[0].close()
    plain.close()
    assert world.synic.open_lines() == 0


def test_s17_closing_twice_gives_up_one_hold_only(world: World) -> None:
    first, second = world.open(), world.open()
    first.close()
    first.close()
    assert second.pulse() == 0
    assert world.synic.open_lines() == 1
    (line,) = world.routes.snapshot()
    assert (line["routes"], line["holders"]) == (1, 1), "nothing of it is kept"
    assert first.pulse() == -errno.ENXIO
    assert first.set_event_flag(1) == -errno.ENXIO


def _open_and_close(world: World, errors: list[BaseException]) -> None:
    try:
        for _ in range(25):
            route = world.open()
            assert route.pulse() == 0
            route.close()
    except BaseException as error:
        errors.append(error)


@pytest.mark.usefixtures("tiny_switch_interval")
def test_s17_holds_are_counted_right_when_threads_race() -> None:
    for _ in range(20):
        world = World()
        errors: list[BaseException] = []
        threads = [threading.Thread(target=_open_and_close, args=(world, errors)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert world.synic.open_lines() == 0
        assert all(line.closed == 1 for line in world.synic.lines[0, 2])


def test_s12_a_new_line_waits_until_the_old_one_is_gone(world: World) -> None:
    """Two GSIs for one SINT at the same time, and KVM would tell one of them only."""
    closing, let_go = threading.Event(), threading.Event()
    old = world.open()
    close = world.line().close

    def slow_close() -> None:
        closing.set()
        assert let_go.wait(100)
        close()

    world.line().close = slow_close  # type: ignore[method-assign]
    closer = threading.Thread(target=old.close)
    closer.start()
    assert closing.wait(100)
    opener = threading.Thread(target=world.open)  # the stand-in refuses a second line
    opener.start()
    elsewhere = world.open(sint=3)
    assert elsewhere.pulse() == 0, "other SINTs need not wait"
    let_go.set()
    closer.join()
    opener.join()
    assert [line.closed for line in world.synic.lines[0, 2]] == [1, 0]


def test_s18_the_line_closes_once_when_close_and_completion_race(world: World) -> None:
    """Both orders of "last route closed" and "completion ran"."""
    for close_first in (True, False):
        route, _ = world.sender()
        route.post(1, b"")
        world.vp().run()
        if close_first:
            route.close()
            world.settle()
        else:
            world.settle()
            route.close()
        assert world.line().closed == 1
        world.vp().slot(2).message_type = 0


def test_s19_ack_on_its_way_keeps_the_line_until_it_was_heard(world: World) -> None:
    closed_in_callback: list[int] = []

    def on_complete(status: int) -> None:
        closed_in_callback.append(world.line().closed)
        route.close()

    route = world.open(on_complete=on_complete)
    world.vp().slot(2).message_type = 1
    route.post(1, b"")
    world.vp().run()
    world.free_slot()
    world.settle()
    assert closed_in_callback == [0]
    assert world.line().closed == 1
    world.line().ack()
    world.settle()
    assert closed_in_callback == [0]


def test_s20_pulse_says_what_the_line_says(world: World) -> None:
    route = world.open()
    assert route.pulse() == 0
    world.line().pulse_status = -errno.EBADF
    assert route.pulse() == -errno.EBADF


@pytest.mark.parametrize("number", [2048, 2049, -1, 1 << 40])
def test_s33_flag_numbers_end_at_2047(world: World, number: int) -> None:
    route = world.open(sint=15)
    assert route.set_event_flag(number) == -errno.EINVAL
    assert bytes(world.vp().flags.view) == bytes(4096)
    assert world.line(sint=15).pulses == 0


@pytest.mark.parametrize("sint", [0, 15])
@pytest.mark.parametrize("number", [0, 1, 63, 64, 2047])
def test_s33_each_flag_has_its_bit(world: World, sint: int, number: int) -> None:
    assert world.open(sint=sint).set_event_flag(number) == 0
    expected = bytearray(4096)
    expected[256 * sint + number // 8] = 1 << number % 8
    assert bytes(world.vp().flags.view) == bytes(expected)


def test_s34_range_is_checked_before_the_page(world: World) -> None:
    route = world.open()
    world.vp().update(0, 0, 0)
    assert route.set_event_flag(2048) == -errno.EINVAL
    assert route.set_event_flag(2047) == -errno.ENXIO
    assert bytes(world.vp().flags.view) == bytes(4096)


def test_s35_only_a_fresh_flag_interrupts(world: World) -> None:
    route = world.open()
    assert route.set_event_flag(5) == 0
    assert world.line().pulses == 1
    assert route.set_event_flag(5) == 0
    assert world.line().pulses == 1
    assert route.set_event_flag(6) == 0
    assert world.line().pulses == 2
    world.vp().flags.view[256 * 2] = 0  # the guest clears both
    assert route.set_event_flag(5) == 0
    assert world.line().pulses == 3


def test_s7_reset_closes_routes_that_are_still_open_and_says_so(world: World) -> None:
    route, other = world.open(), world.open(vp=1, sint=9)
    assert world.routes.close_all("at reset") == 2
    texts = [event.text for event in world.observer.events if isinstance(event, Warned)]
    assert len(texts) == 2
    assert "SINT 9 of VP 1" in texts[1]
    assert world.synic.open_lines() == 0
    assert route.pulse() == other.set_event_flag(0) == -errno.ENXIO
    assert route.set_event_flag(0) == -errno.ENXIO
    route.close()
    assert world.routes.close_all("at reset") == 0
    assert world.open().pulse() == 0, "the next life may open routes"


def test_a_closed_table_opens_nothing(world: World) -> None:
    route = world.open()
    world.routes.close()
    assert world.synic.open_lines() == 0
    assert route.pulse() == -errno.ENXIO
    with pytest.raises(RouteError, match="closed"):
        world.open()
    world.routes.close()


def test_the_snapshot_says_who_waits_for_what(world: World) -> None:
    route, _ = world.sender()
    world.open()
    world.vp().slot(2).message_type = 1
    route.post(1, b"")
    world.vp().run()
    (line,) = world.routes.snapshot()
    assert line == {
        "vp": 0,
        "sint": 2,
        "routes": 2,
        "holders": 2,
        "messages": ["waiting for the guest's EOM"],
    }
