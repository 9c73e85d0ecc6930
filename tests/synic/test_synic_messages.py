"""Messages from the host to a running guest: delivery, busy slots, completions, order (S13, S20-S30)."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from guest_agent import DRAIN, EOM_PENDING, NO_EOI, SCRATCH
from guest_machine import Guest, Poster, Sender, checked_payload

from hvkvm.abi.tlfs import HV_X64_MSR_SCONTROL, HV_X64_MSR_SINT0

pytestmark = pytest.mark.hyperv

SINT = 5
PAYLOAD = bytes(range(200))
BootAgent = Callable[..., Guest]


@pytest.fixture
def guest(boot_agent: BootAgent) -> Guest:
    """One vCPU with its message page on; SINT drains and writes EOM when a message was pending."""
    guest = boot_agent(cpus=1)
    guest[0].synic_on(simp=SCRATCH, sints={SINT: DRAIN | EOM_PENDING})
    return guest


@pytest.mark.parametrize("mode", ["HLT", "SPIN", "DEAF"])
def test_message_reaches_a_guest_that_halts_spins_or_is_deaf(guest: Guest, mode: str) -> None:
    """S25, S27: the kick takes a halted or spinning vCPU out; a deaf one has it waiting in the slot."""
    cpu = guest[0]
    cpu.idle(mode)
    for _ in range(2):  # the first may still find it idling as before
        cpu.do("NOP")
    if mode == "HLT":
        cpu.await_halt()
    elif mode == "DEAF":
        cpu.await_round()  # behind an answer it hears for some instructions yet
    poster = Poster(guest, 0, SINT)
    assert poster.post(PAYLOAD, message_type=0x7FFF_0001) == 0
    assert poster.await_completions(1) == [0]
    if mode == "DEAF":
        assert cpu.irqs(SINT) == 0
        assert guest.machine.memory.read_u32(SCRATCH + 256 * SINT) == 0x7FFF_0001
        cpu.idle("SPIN")
    (message,) = cpu.await_messages(1)
    assert (message.message_type, message.payload_size) == (0x7FFF_0001, len(PAYLOAD))
    assert message.payload == PAYLOAD.ljust(240, b"\0")
    # S28: flags, reserved and sender are 0.
    assert (message.flags, message.reserved, message.sender) == (0, 0, 0)
    guest.settle()
    assert cpu.irqs(SINT) == 1
    cpu.expect_clean()


def test_message_reaches_a_guest_in_the_middle_of_its_work(guest: Guest) -> None:
    """S25: a vCPU that runs code, not waiting for anything, is interrupted too."""
    cpu = guest[0]
    cpu.begin("WAIT_SPIN", cpu.counter_gpa("MESSAGES", SINT), 3)
    sender = Sender(guest, 0, SINT)
    sender.send(3)
    assert cpu.finish().value == 3
    sender.await_sent()


@pytest.mark.parametrize("size", [0, 1, 8, 239, 240])
def test_payload_of_every_size_arrives_whole(guest: Guest, size: int) -> None:
    """S27, S28: payload_size as given, the rest of the slot zero."""
    payload = bytes(0xFF - n % 251 for n in range(size))
    poster = Poster(guest, 0, SINT)
    assert poster.post(payload) == 0
    (message,) = guest[0].await_messages(1)
    assert (message.payload_size, message.payload) == (size, payload.ljust(240, b"\0"))
    assert poster.await_completions(1) == [0]


def test_post_refuses_what_no_message_can_be(guest: Guest) -> None:
    """S21: no completion callback, no posting; nor 241 bytes, nor type 0."""
    plain = guest.partition.open_route(0, SINT)
    with pytest.raises(ValueError, match="on_complete"):
        plain.post(1, b"")
    poster = Poster(guest, 0, SINT)
    with pytest.raises(ValueError, match="241"):
        poster.post(bytes(241))
    with pytest.raises(ValueError, match="type 0x0"):
        poster.post(b"", message_type=0)
    guest.settle()
    assert poster.statuses == []
    assert guest[0].irqs(SINT) == 0


def test_busy_slot_is_flagged_and_the_message_waits_for_eom(guest: Guest) -> None:
    """S26, S29: the occupying message gets PENDING, no interrupt, no change; EOM brings the other."""
    cpu, memory = guest[0], guest.machine.memory
    cpu.policy(SINT, 0)  # count interrupts, leave the slot alone
    first, second = checked_payload(0), checked_payload(1)
    sender = Sender(guest, 0, SINT)
    sender.send(1)
    guest.until(lambda: sender.sent == 1, "the first message is in the slot")
    guest.settle()
    assert cpu.irqs(SINT) == 1
    slot = SCRATCH + 256 * SINT
    assert memory.read(slot + 5, 1) == b"\0"

    sender.send(1)
    guest.until(lambda: memory.read(slot + 5, 1) == b"\1", "the slot is flagged")
    guest.settle()
    assert (sender.sent, cpu.irqs(SINT)) == (1, 1)
    assert memory.read(slot + 16, 240) == first, "the occupying message is as it was"

    drained = cpu.do("DRAIN", SINT)
    assert drained.results[:2] == (1, 1), "type and PENDING as the guest saw them"
    guest.settle()
    assert (sender.sent, cpu.irqs(SINT)) == (1, 1), "an empty slot without EOM changes nothing"
    cpu.eom()
    guest.until(lambda: sender.sent == 2, "the second message follows")
    guest.settle()
    assert cpu.irqs(SINT) == 2
    assert memory.read(slot + 16, 240) == second
    assert memory.read(slot + 5, 1) == b"\0", "a delivered message carries no PENDING of the one before"
    assert sender.poster.statuses == [0, 0], "one status a post, however often it was tried"


def test_eom_with_nothing_waiting_completes_nothing(guest: Guest) -> None:
    """S29: acks without a waiting message are ignored; an old one does not complete a new post."""
    cpu = guest[0]
    poster = Poster(guest, 0, SINT)
    for _ in range(5):
        cpu.eom()
    guest.settle()
    assert poster.statuses == []
    for number in range(3):
        assert poster.post(checked_payload(number)) == 0
        assert poster.await_completions(number + 1)[-1] == 0
        cpu.await_messages(1)
        cpu.eom()


def test_second_post_is_refused_while_the_first_is_under_way(guest: Guest) -> None:
    """S22: -EAGAIN at once, no callback for it; and the first still completes once."""
    release = guest.hold(0)
    poster = Poster(guest, 0, SINT)
    assert poster.post(b"one") == 0
    for _ in range(3):
        assert poster.post(b"two") == -errno.EAGAIN
    assert poster.statuses == []
    release()
    assert poster.await_completions(1) == [0]
    (message,) = guest[0].await_messages(1)
    assert message.payload[:3] == b"one"
    assert poster.post(b"two") == 0
    assert poster.await_completions(2) == [0, 0]


def test_the_next_message_may_be_posted_inside_the_callback(guest: Guest) -> None:
    """S24: the staging area is free before the callback runs, so a chain of messages needs no deferral."""
    poster = Poster(guest, 0, SINT)
    results: list[int] = []
    rest = [checked_payload(number) for number in range(1, 6)]

    def go_on(status: int) -> None:
        if rest:
            results.append(poster.post(rest.pop(0)))

    poster.on_complete = go_on
    assert poster.post(checked_payload(0)) == 0
    assert poster.await_completions(6) == [0] * 6
    assert results == [0] * 5
    sent = [message.payload for message in guest[0].await_messages(6)]
    assert sent == [checked_payload(number) for number in range(6)], "each once, in order"


@pytest.mark.parametrize("early", [0, 1, 5])
def test_a_waiting_message_is_tried_at_each_eom_until_its_slot_is_free(guest: Guest, early: int) -> None:
    """S24, S29: EOMs that free nothing cost another attempt each and tell the sender nothing."""
    cpu, memory = guest[0], guest.machine.memory
    cpu.policy(SINT, 0)  # count interrupts, leave the slot alone
    poster = Poster(guest, 0, SINT)
    assert poster.post(checked_payload(0)) == 0
    assert poster.await_completions(1) == [0]
    assert poster.post(checked_payload(1)) == 0
    slot = SCRATCH + 256 * SINT
    guest.until(lambda: memory.read(slot + 5, 1) == b"\1", "the slot is flagged")
    guest.settle()
    for _ in range(early):
        cpu.eom()
        guest.settle()
    assert poster.statuses == [0]
    assert poster.post(checked_payload(2)) == -errno.EAGAIN, "the one before is under way all the while"
    assert memory.read(slot + 16, 240) == checked_payload(0)
    assert cpu.irqs(SINT) == 1
    cpu.do("DRAIN", SINT)
    cpu.eom()
    assert poster.await_completions(2) == [0, 0]
    guest.settle()
    assert cpu.irqs(SINT) == 2
    assert memory.read(slot + 16, 240) == checked_payload(1)


def test_messages_queued_to_one_vcpu_complete_in_order(guest: Guest) -> None:
    """S25: per-vCPU FIFO, over several SINTs."""
    cpu = guest[0]
    sints = [3, 9, 1, 15, 0, 7]
    cpu.synic_on(sints=dict.fromkeys(sints, DRAIN | EOM_PENDING))
    order: list[int] = []
    posters = []
    for sint in sints:
        poster = Poster(guest, 0, sint)
        poster.on_complete = lambda status, sint=sint: order.append(sint)
        posters.append(poster)
    for _ in range(3):
        release = guest.hold(0)
        assert [poster.post(b"x") for poster in posters] == [0] * len(sints)
        release()
        for poster in posters:
            guest.until(lambda poster=poster: len(poster.statuses) > 0, "a completion comes")
            guest.io_barrier()
            assert poster.statuses == [0]
            poster.statuses.clear()
        assert order == sints
        order.clear()
        assert sorted(m.sint for m in cpu.await_messages(len(sints))) == sorted(sints)


def test_masked_sint_swallows_the_interrupt_not_the_message(guest: Guest) -> None:
    """S20: the caller cannot know; the message lies in its slot for a guest that polls."""
    cpu = guest[0]
    cpu.wrmsr(HV_X64_MSR_SINT0 + SINT, 1 << 16)
    poster = Poster(guest, 0, SINT)
    assert poster.post(b"polled") == 0
    poster.await_completions(1)
    guest.settle()
    assert cpu.irqs(SINT) == 0
    assert cpu.do("DRAIN", SINT).value == 1


def test_message_without_a_page_completes_with_enxio(boot_agent: BootAgent) -> None:
    """S9: SIMP off is -ENXIO; SIMP on without SCONTROL is enough."""
    guest = boot_agent(cpus=1)
    cpu = guest[0]
    poster = Poster(guest, 0, SINT)
    assert poster.post(b"x") == 0
    assert poster.await_completions(1) == [-errno.ENXIO]
    cpu.synic_on(simp=SCRATCH, sints={SINT: DRAIN})
    cpu.wrmsr(HV_X64_MSR_SCONTROL, 0)
    assert poster.post(b"y") == 0
    assert poster.await_completions(2) == [-errno.ENXIO, 0]
    assert cpu.await_messages(1)[0].payload[:1] == b"y"


def test_auto_eoi_sint_gets_every_message(guest: Guest) -> None:
    """A SINT with AutoEOI never sees an EOI; acks come by EOM alone (S29)."""
    guest[0].synic_on(sints={9: DRAIN | EOM_PENDING | NO_EOI})
    sender = Sender(guest, 0, 9)
    sender.send(20)
    sender.await_sent()
    assert guest[0].counter("WRONG", 9) == 0


def test_a_pulse_is_one_auto_eoi_interrupt(guest: Guest) -> None:
    """Also while a lower interrupt waits, here the doorbell, as it does behind each operation of a test.

    An emulated SVM host may interrupt the guest twice for it (interrupts.s); the guest counts once.
    """
    cpu = guest[0]
    cpu.synic_on(sints={9: NO_EOI})
    cpu.idle("SPIN")
    route = guest.partition.open_route(0, 9)
    for pulses in range(1, 1001):
        assert route.pulse() == 0
        rings = cpu.counter("DOORBELLS")
        guest.agent.wake(0)
        guest.until(lambda rings=rings: cpu.counter("DOORBELLS") > rings, "the doorbell rings")  # type: ignore[misc]
        assert cpu.irqs(9) == pulses


def test_every_vcpu_and_sint_gets_its_own_message(boot_agent: BootAgent) -> None:
    """Addressing: 3 VPs x 16 SINTs, each told which one it is."""
    guest = boot_agent(cpus=3)
    for index in range(3):
        guest[index].synic_on(
            simp=SCRATCH + index * 0x1000, sints=dict.fromkeys(range(16), DRAIN | EOM_PENDING)
        )
    for index in range(3):
        for sint in range(16):
            poster = Poster(guest, index, sint)
            assert poster.post(bytes([index, sint])) == 0
            (message,) = guest[index].await_messages(1)
            assert (message.sint, message.payload[:2]) == (sint, bytes([index, sint]))
            poster.await_completions(1)
            poster.close()
    guest.settle()
    assert [[guest[i].irqs(sint) for sint in range(16)] for i in range(3)] == [[1] * 16] * 3
