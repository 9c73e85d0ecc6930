"""A message on its way: the staging area's states and the slot it goes to (S21 to S32)."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

import pytest
from fake_synic import World

from hvkvm.abi.hv_synic import HV_MESSAGE_FLAG_PENDING
from hvkvm.events import Warned
from hvkvm.hyperv.staging import Staging, State
from hvkvm.hyperv.synic import pages

AGAIN = -errno.EAGAIN


def test_s21_posting_needs_a_completion_callback(world: World) -> None:
    route = world.open()
    with pytest.raises(ValueError, match="on_complete"):
        route.post(1, b"")


@pytest.mark.parametrize(("message_type", "payload"), [(0, b""), (1 << 32, b""), (-1, b""), (1, bytes(241))])
def test_s21_a_message_that_fits_no_slot_is_the_callers_error(
    world: World, message_type: int, payload: bytes
) -> None:
    route, statuses = world.sender()
    with pytest.raises(ValueError, match="no message"):
        route.post(message_type, payload)
    assert route.post(1, bytes(240)) == 0
    world.settle()
    assert statuses == [0]


def test_s22_one_message_at_a_time_and_a_refused_one_has_no_callback(world: World) -> None:
    route, statuses = world.sender()
    assert route.post(1, b"first") == 0
    assert route.post(1, b"second") == AGAIN
    world.settle()
    assert statuses == [0]
    assert bytes(world.vp().slot(2).payload[:5]) == b"first"
    world.free_slot()
    assert route.post(1, b"third") == 0


def test_s22_of_two_threads_that_post_at_once_one_is_accepted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    route, statuses = world.sender()
    begin = Staging._next_attempt
    answers: list[int] = []
    rival = threading.Thread(target=lambda: answers.append(route.post(1, b"second")))

    def with_a_rival(staging: Staging) -> int:
        if not answers and not rival.ident:
            rival.start()
            rival.join(0.1)  # it waits for us: how long does not matter
        return begin(staging)

    monkeypatch.setattr(Staging, "_next_attempt", with_a_rival)
    answers.append(route.post(1, b"first"))
    rival.join()
    world.settle()
    assert sorted(answers) == [AGAIN, 0]
    assert statuses == [0]
    assert bytes(world.vp().slot(2).payload[:5]) == b"first"


def test_s22_the_message_is_copied_when_it_is_posted(world: World) -> None:
    route, _ = world.sender()
    payload = bytearray(b"as it was")
    route.post(1, payload)
    payload[:] = b"rewritten"
    world.settle()
    assert bytes(world.vp().slot(2).payload[:9]) == b"as it was"


def test_s23_callbacks_run_on_the_loop_and_never_inside_post(world: World) -> None:
    route, statuses = world.sender()
    route.post(1, b"")
    world.vp().run()
    assert statuses == []
    world.loop.run()
    assert statuses == [0]


@pytest.mark.parametrize("status", [-errno.EBADF, -errno.ENXIO, -errno.EIO])
def test_s23_the_interrupts_own_error_is_the_status(world: World, status: int) -> None:
    route, statuses = world.sender()
    world.line().pulse_status = status
    route.post(1, b"")
    world.settle()
    assert statuses == [status]
    assert route.staging is not None
    assert route.staging.state is State.FREE


def test_s23_an_eom_that_the_host_cannot_wait_for_is_the_status(world: World) -> None:
    route, statuses = world.sender()
    route.post(1, b"in the slot")
    world.settle()
    world.synic.fail["ack"] = OSError(errno.ENOMEM, "no memory")
    assert route.post(1, b"behind it") == 0
    world.settle()
    assert statuses == [0, -errno.ENOMEM]
    world.synic.fail.clear()
    world.free_slot()
    assert route.post(1, b"another") == 0
    world.settle()
    assert statuses == [0, -errno.ENOMEM, 0]


def test_s24_the_next_message_may_be_posted_inside_the_callback(world: World) -> None:
    results: list[int] = []
    states: list[State] = []
    payloads = [b"second", b"third"]

    def on_complete(status: int) -> None:
        assert route.staging is not None
        states.append(route.staging.state)
        assert status == 0
        if payloads:
            results.append(route.post(1, payloads.pop(0)))
            results.append(route.post(1, b"one too many"))

    route = world.open(on_complete=on_complete)
    route.post(1, b"first")
    received = []
    for _ in range(3):
        world.settle()
        received.append(bytes(world.vp().slot(2).payload[:6]).rstrip(b"\0"))
        world.free_slot()
    world.settle()
    assert received == [b"first", b"second", b"third"]
    assert results == [0, AGAIN] * 2
    assert states == [State.FREE] * 3


@pytest.mark.parametrize("post_again", [False, True])
def test_s19_a_route_closed_within_its_callback_drops_its_line_once(world: World, post_again: bool) -> None:
    def on_complete(status: int) -> None:
        if len(statuses) == 0 and post_again:
            assert route.post(1, b"farewell") == 0
        statuses.append(status)
        route.close()

    statuses: list[int] = []
    route = world.open(on_complete=on_complete)
    route.post(1, b"")
    world.settle()
    assert world.line().closed == 1
    assert len(statuses) == 1 + post_again


def test_s24_a_callback_that_raises_still_frees_the_staging_area(world: World) -> None:
    def broken(status: int) -> None:
        raise RuntimeError("the device's bug")

    route = world.open(on_complete=broken)
    route.post(1, b"")
    world.vp().run()
    with pytest.raises(RuntimeError):
        world.loop.run()
    assert route.staging is not None
    assert route.staging.state is State.FREE
    route.close()
    assert world.synic.open_lines() == 0


def test_s25_nothing_is_written_before_the_vps_own_thread_runs(world: World) -> None:
    routes = [world.sender(sint=sint)[0] for sint in (1, 2, 3)]
    for number, route in enumerate(routes):
        route.post(10 + number, b"")
    assert [world.vp().slot(sint).message_type for sint in (1, 2, 3)] == [0, 0, 0]
    order: list[int] = []
    original = world.vp().message_page.post

    class Spy:
        def post(self, sint: int, message: bytes) -> int:
            order.append(sint)
            return original(sint, message)

    world.vp().message_page = Spy()  # type: ignore[assignment]
    world.vp().run()
    assert order == [1, 2, 3]


def test_s26_busy_slot_sets_pending_and_changes_nothing_else(world: World) -> None:
    route, statuses = world.sender()
    slot = world.vp().slot(2)
    slot.message_type, slot.payload_size, slot.sender = 0x80000010, 24, 0x1122334455667788
    slot.payload[0] = 0xAB
    before = bytes(slot)
    route.post(1, b"wait")
    world.settle()
    expected = bytearray(before)
    expected[5] |= HV_MESSAGE_FLAG_PENDING
    assert bytes(slot) == bytes(expected)
    assert world.line().pulses == 0
    assert statuses == []
    assert route.staging is not None
    assert route.staging.state is State.PENDING
    assert world.free_slot()
    world.settle()
    assert statuses == [0]


def test_s27_free_slot_is_filled_body_first_and_type_last(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    route, statuses = world.sender()
    slot = world.vp().slot(2)
    slot.payload[239] = 0x77  # left over from an older message
    steps: list[bytes] = []
    store = pages.store_4

    def spy(address: int, value: int) -> None:
        steps.append(bytes(slot))
        store(address, value)

    monkeypatch.setattr(pages, "store_4", spy)
    route.post(0x1234, b"body")
    world.vp().run()
    (before_type,) = steps
    assert before_type[:4] == bytes(4)
    assert before_type[4:] == bytes(slot)[4:]
    assert slot.message_type == 0x1234
    assert bytes(slot.payload) == b"body".ljust(240, b"\0")
    assert world.line().pulses == 1
    world.loop.run()
    assert statuses == [0]


def test_s28_header_is_type_and_size_and_the_rest_is_zero(world: World) -> None:
    route, _ = world.sender()
    slot = world.vp().slot(2)
    slot.message_flags, slot.reserved, slot.sender = 0xFF, 0xFFFF, 1 << 63
    route.post(0x80000001, b"xyz")
    world.settle()
    assert (slot.message_type, slot.payload_size, slot.message_flags, slot.reserved, slot.sender) == (
        0x80000001,
        3,
        0,
        0,
        0,
    )


def test_s29_ack_before_anything_waits_is_ignored(world: World) -> None:
    route, statuses = world.sender()
    world.line().ack()
    route.post(1, b"")
    world.line().ack()
    world.loop.run()
    assert statuses == []
    world.settle()
    assert statuses == [0]


def test_s29_early_ack_makes_an_early_attempt(world: World) -> None:
    """EOM of another SINT: the slot is still taken, the message is tried once more and waits again."""
    route, statuses = world.sender()
    world.vp().slot(2).message_type = 1
    assert route.post(1, b"patient") == 0
    for _ in range(3):
        assert world.vp().run() == 1
        world.line().ack()
        world.loop.run()
        assert statuses == []
        assert route.post(1, b"") == AGAIN, "it is under way all the while"
    world.vp().run()
    world.free_slot()
    world.settle()
    assert statuses == [0]
    assert bytes(world.vp().slot(2).payload[:7]) == b"patient"
    assert world.line().pulses == 1


def test_s29_one_ack_makes_one_attempt_however_often_it_is_heard(world: World) -> None:
    route, statuses = world.sender()
    world.vp().slot(2).message_type = 1
    route.post(1, b"")
    world.vp().run()
    (waiter,) = world.line().waiters
    world.line().ack()
    world.loop.call_soon(waiter)  # the same ack heard twice
    world.loop.run()
    assert world.vp().run() == 1
    assert route.staging is not None
    assert route.staging.state is State.PENDING
    world.loop.call_soon(waiter)  # and once more for the next attempt, which waits itself
    world.loop.run()
    assert world.vp().run() == 0
    world.free_slot()
    world.settle()
    assert statuses == [0]


def test_s29_an_ack_in_the_middle_of_an_attempt_is_not_lost(world: World) -> None:
    """The guest's EOM comes when the ack is awaited already, and the attempt has not ended yet."""
    route, statuses = world.sender()
    slot, line = world.vp().slot(2), world.line()
    slot.message_type = 1
    arm = line.arm_ack
    loops: list[threading.Thread] = []

    def arm_and_hear(waiter: Callable[[], None]) -> None:
        arm(waiter)
        slot.message_type = 0
        loops.append(threading.Thread(target=waiter))
        loops[0].start()
        loops[0].join(0.1)  # it waits for the attempt's end: how long does not matter

    line.arm_ack = arm_and_hear  # type: ignore[method-assign]
    route.post(1, b"")
    world.vp().run()
    loops[0].join()
    world.settle()
    assert statuses == [0]


def test_s29_a_sender_may_ask_for_a_try_without_an_ack(world: World) -> None:
    """For the EOM that a guest writes on another VP."""
    route, statuses = world.sender()
    route.retry()
    slot = world.vp().slot(2)
    slot.message_type = 1
    route.post(1, b"patient")
    route.retry()  # its first try is still to come
    for _ in range(3):
        assert world.vp().run() == 1
        assert len(world.line().waiters) == 1
        route.retry()
        assert world.line().waiters == []
    slot.message_type = 0
    world.settle()
    assert (statuses, bytes(slot.payload[:7])) == ([0], b"patient")
    route.retry()
    world.settle()
    assert statuses == [0]


def test_s29_no_try_brings_a_cancelled_message_back(world: World) -> None:
    route, statuses = world.sender()
    world.vp().slot(2).message_type = 1
    route.post(1, b"")
    world.vp().run()
    route.close()
    route.retry()
    world.settle()
    assert statuses == [-errno.ECANCELED]
    assert world.synic.open_lines() == 0


@pytest.mark.parametrize("freed", [True, False])
def test_s30_slot_freed_between_test_and_flag_is_filled(
    world: World, monkeypatch: pytest.MonkeyPatch, freed: bool
) -> None:
    route, statuses = world.sender()
    slot = world.vp().slot(2)
    slot.message_type = 7
    fetch_or = pages.fetch_or_8

    def race(address: int, mask: int) -> int:
        if freed:
            slot.message_type = 0  # by another vCPU, which saw no pending flag and writes no EOM
        return fetch_or(address, mask)

    monkeypatch.setattr(pages, "fetch_or_8", race)
    route.post(1, b"new")
    world.settle()
    assert statuses == ([0] if freed else [])
    assert (slot.message_type, slot.message_flags) == ((1, 0) if freed else (7, 1))
    assert world.line().pulses == int(freed)


def test_s31_stopped_vcpu_cancels_what_was_queued(world: World) -> None:
    route, statuses = world.sender()
    route.post(1, b"")
    world.vp().stop()
    world.settle()
    assert statuses == [-errno.ECANCELED]
    assert route.post(1, b"") == 0, "accepted, to be cancelled: the sender learns it by its callback"
    world.settle()
    assert statuses == [-errno.ECANCELED] * 2
    route.close()
    assert world.synic.open_lines() == 0


@pytest.mark.parametrize("state", [State.BUSY, State.PENDING, State.POSTED])
def test_s31_reset_cancels_a_message_under_way_and_its_ghost_does_nothing(world: World, state: State) -> None:
    route, statuses = world.sender()
    if state is State.PENDING:
        world.vp().slot(2).message_type = 1
    route.post(1, b"from the past life")
    if state is not State.BUSY:
        world.vp().run()
    assert route.staging is not None
    assert route.staging.state is state
    world.routes.close_all("at reset")
    world.synic.reset()
    world.vp().switch_on()
    world.settle()  # the queued attempt runs now, after the reset
    assert statuses == ([0] if state is State.POSTED else [-errno.ECANCELED])
    assert bytes(world.vp().messages.view) == bytes(4096)
    assert [e for e in world.observer.events if isinstance(e, Warned)]
    assert world.synic.open_lines() == 0


def test_s31_ack_of_a_cancelled_post_does_not_complete_the_next_users(world: World) -> None:
    old, old_statuses = world.sender()
    world.vp().slot(2).message_type = 1
    old.post(1, b"")
    world.vp().run()
    (stale,) = world.line().waiters
    old.close()
    new, new_statuses = world.sender()
    new.post(1, b"")
    world.vp().run()
    world.loop.call_soon(stale)
    world.settle()
    assert old_statuses == [-errno.ECANCELED]
    assert new_statuses == []
    world.free_slot()
    world.settle()
    assert new_statuses == [0]


@pytest.mark.parametrize("withdraw", [False, True])
def test_s31_an_ack_behind_the_close_begins_no_attempt(world: World, withdraw: bool) -> None:
    route, statuses = world.sender()
    world.vp().slot(2).message_type = 1
    route.post(1, b"from the past life")
    world.vp().run()
    world.free_slot()  # the ack is on its way to the loop
    world.routes.close_route(route, withdraw=withdraw)
    world.settle()
    assert statuses == [-errno.ECANCELED]
    assert world.vp().slot(2).message_type == 0
    assert world.synic.open_lines() == 0


def test_s31_a_message_tried_again_is_withdrawn_by_a_reset(world: World) -> None:
    route, statuses = world.sender()
    world.vp().slot(2).message_type = 1
    route.post(1, b"from the past life")
    world.vp().run()
    world.free_slot()
    world.loop.run()  # its second attempt is queued to the vCPU, which is paused
    world.routes.close_all("at reset")
    world.synic.reset()
    world.vp().switch_on()
    world.settle()
    assert statuses == [-errno.ECANCELED]
    assert bytes(world.vp().messages.view) == bytes(4096)
    assert world.synic.open_lines() == 0


def test_s31_a_vcpu_that_ended_cancels_the_second_attempt_too(world: World) -> None:
    route, statuses = world.sender()
    world.vp().slot(2).message_type = 1
    route.post(1, b"")
    world.vp().run()
    world.vp().stop()
    world.line().ack()
    world.settle()
    assert statuses == [-errno.ECANCELED]


def test_s32_what_is_in_the_pages_is_saved_wherever_they_lie(world: World) -> None:
    route, _ = world.sender()
    route.post(7, b"in its slot")
    world.settle()
    route.set_event_flag(70)
    world.vp().update(1, 0, 0)  # the pages are off, and keep what they hold
    kept = world.vp().save()
    other = World()
    other.vp().load(kept)
    assert bytes(other.vp().messages.view) == bytes(world.vp().messages.view) != bytes(4096)
    assert bytes(other.vp().flags.view) == bytes(world.vp().flags.view) != bytes(4096)
    assert (other.vp().messages.gpa, other.vp().flags.gpa) == (None, None)


def test_closing_lets_a_queued_message_out_and_cancels_a_waiting_one(world: World) -> None:
    """A device may post its farewell and close at once."""
    route, statuses = world.sender()
    route.post(1, b"farewell")
    route.close()
    assert route.post(1, b"") == -errno.ENXIO
    assert world.synic.open_lines() == 1, "the message holds the line"
    world.settle()
    assert statuses == [0]
    assert bytes(world.vp().slot(2).payload[:8]) == b"farewell"
    assert world.synic.open_lines() == 0
    world.open()
    waiting, waiting_statuses = world.sender()
    waiting.post(1, b"")
    world.vp().run()
    assert len(world.line().waiters) == 1
    waiting.close()
    world.settle()
    assert waiting_statuses == [-errno.ECANCELED]
    assert world.line().waiters == [], "the line lives on, without the one who left"
    world.routes.close_all(None)
    late, late_statuses = world.sender()
    late.post(1, b"")
    late.close()  # the slot is taken: its one attempt fails, and nobody is left to wait
    world.settle()
    assert late_statuses == [-errno.ECANCELED]
    assert world.synic.open_lines() == 0


def test_a_loop_that_ended_strands_no_route(world: World) -> None:
    queued, statuses = world.sender(sint=1)
    queued.post(1, b"")
    world.vp().run()
    waiting, _ = world.sender(sint=2)
    world.vp().slot(2).message_type = 1
    waiting.post(1, b"")
    world.vp().run()
    gone, _ = world.sender(vp=1)
    gone.post(1, b"")
    world.vp(1).run()
    gone.close()
    assert not world.line(vp=1).closed, "its completion is still to run"
    world.loop.stop()
    assert world.line(vp=1).closed == 1
    queued.close()
    assert world.line(sint=1).closed, "the completion that will not run holds nothing"
    late, _ = world.sender(sint=3)
    late.post(1, b"")
    world.vp().run()
    assert not world.line(sint=3).closed
    late.close()
    assert world.line(sint=3).closed == 1
    busy, _ = world.sender(sint=4)
    world.vp().slot(4).message_type = 1
    busy.post(1, b"")
    world.vp().run()
    world.routes.close()
    assert statuses == [], "there is no loop to call back on"
    assert world.synic.open_lines() == 0
