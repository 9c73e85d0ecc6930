"""KVM's synthetic timers and the host's messages in one slot: two writers, nothing overwritten (S25, S58)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from guest_agent import CHECK, DRAIN, EOM_PENDING, SCRATCH
from guest_machine import Guest, Poster, Sender, checked_payload

from hvkvm.abi.hv_synic import HVMSG_TIMER_EXPIRED
from hvkvm.abi.tlfs import (
    HV_X64_MSR_SCONTROL,
    HV_X64_MSR_SINT0,
    HV_X64_MSR_STIMER0_CONFIG,
    HV_X64_MSR_STIMER0_COUNT,
    HV_X64_MSR_TIME_REF_COUNT,
)

pytestmark = pytest.mark.hyperv

BootAgent = Callable[..., Guest]
SINT = 2
SLOT = SCRATCH + 256 * SINT
ENABLE, PERIODIC, AUTO_ENABLE = 1, 2, 8
MILLISECOND = 10_000
"""In the reference clock's 100 ns."""


@pytest.fixture
def guest(boot_agent: BootAgent) -> Guest:
    """One vCPU with its message page on; nothing is taken out of the slot until a test asks."""
    guest = boot_agent(cpus=1)
    guest[0].synic_on(simp=SCRATCH, sints={SINT: 0})
    return guest


def expire_now(guest: Guest, sint: int = SINT, timer: int = 0) -> None:
    """Arm one-shot timer `timer` for a moment that has passed."""
    cpu = guest[0]
    cpu.wrmsr(HV_X64_MSR_STIMER0_CONFIG + 2 * timer, AUTO_ENABLE | sint << 16)
    cpu.wrmsr(HV_X64_MSR_STIMER0_COUNT + 2 * timer, 1)


def slot_type(guest: Guest) -> int:
    return guest.machine.memory.read_u32(SLOT)


def test_timer_waits_behind_a_posted_message(guest: Guest) -> None:
    """KVM flags the slot and tries again at EOM; the posted message stays whole."""
    cpu = guest[0]
    poster = Poster(guest, 0, SINT)
    assert poster.post(checked_payload(7)) == 0
    assert poster.await_completions(1) == [0]
    expire_now(guest)
    guest.until(lambda: guest.machine.memory.read(SLOT + 5, 1) == b"\1", "KVM flags the slot")
    assert slot_type(guest) == 1
    assert guest.machine.memory.read(SLOT + 16, 240) == checked_payload(7)
    assert cpu.do("DRAIN", SINT).value == 1
    cpu.eom()
    guest.until(lambda: slot_type(guest) == HVMSG_TIMER_EXPIRED, "the timer's message follows")
    assert poster.statuses == [0]


def test_posted_message_waits_behind_a_timer(guest: Guest) -> None:
    """S26 with the kernel as the one who was first: PENDING set on its message, ours after EOM."""
    cpu = guest[0]
    expire_now(guest)
    guest.until(lambda: slot_type(guest) == HVMSG_TIMER_EXPIRED, "the timer's message is there")
    before = guest.machine.memory.read(SLOT + 16, 24)
    sender = Sender(guest, 0, SINT)
    sender.send(1)
    guest.until(lambda: guest.machine.memory.read(SLOT + 5, 1) == b"\1", "we flag the slot")
    guest.settle()
    assert (slot_type(guest), sender.sent) == (HVMSG_TIMER_EXPIRED, 0)
    assert guest.machine.memory.read(SLOT + 16, 24) == before
    assert cpu.do("DRAIN", SINT).results[:2] == (HVMSG_TIMER_EXPIRED, 1)
    cpu.eom()
    guest.until(lambda: sender.sent == 1, "our message follows")
    assert slot_type(guest) == 1
    assert guest.machine.memory.read(SLOT + 16, 240) == checked_payload(0)
    assert cpu.counter("TIMERS", SINT) == 1


def test_every_one_shot_timer_and_every_message_arrives(guest: Guest) -> None:
    """Rounds of both at once: each round brings exactly one timer message and its posted ones in order."""
    cpu = guest[0]
    cpu.policy(SINT, DRAIN | EOM_PENDING | CHECK)
    sender = Sender(guest, 0, SINT)
    for count in range(1, 31):
        sender.send(3)
        expire_now(guest, timer=count % 4)
        guest.until(
            lambda count=count: cpu.counter("TIMERS", SINT) == count, f"timer message {count} arrives"
        )
        sender.await_sent()
    guest.settle()
    assert cpu.counter("TIMERS", SINT) == 30
    assert cpu.counter("MESSAGES", SINT) == 90
    cpu.expect_clean()


def test_messages_keep_their_order_under_a_periodic_timer(guest: Guest) -> None:
    """A timer that ticks into the same slot all the time: 200 messages, none lost, doubled or torn."""
    cpu = guest[0]
    cpu.policy(SINT, DRAIN | EOM_PENDING | CHECK)
    cpu.wrmsr(HV_X64_MSR_STIMER0_CONFIG, PERIODIC | AUTO_ENABLE | SINT << 16)
    cpu.wrmsr(HV_X64_MSR_STIMER0_COUNT, 5 * MILLISECOND)
    sender = Sender(guest, 0, SINT)
    sender.send(200)
    sender.await_sent()
    ticks = cpu.counter("TIMERS", SINT)
    guest.until(lambda: cpu.counter("TIMERS", SINT) > ticks + 3, "the timer goes on ticking")
    cpu.wrmsr(HV_X64_MSR_STIMER0_COUNT, 0)
    assert cpu.counter("MESSAGES", SINT) == 200
    cpu.expect_clean()


def test_timer_that_expired_before_the_page_came_on_is_delivered(boot_agent: BootAgent) -> None:
    """S58: without help KVM would keep the message for an EOM that a guest without messages never writes."""
    guest = boot_agent(cpus=1)
    cpu = guest[0]
    cpu.policy(SINT, DRAIN | EOM_PENDING)
    cpu.wrmsr(HV_X64_MSR_SINT0 + SINT, 0x60 + SINT)
    cpu.wrmsr(HV_X64_MSR_SCONTROL, 1)
    expire_now(guest)
    start = cpu.rdmsr(HV_X64_MSR_TIME_REF_COUNT)
    guest.until(
        lambda: cpu.rdmsr(HV_X64_MSR_TIME_REF_COUNT) > start + MILLISECOND, "the reference clock advances"
    )
    cpu.simp(SCRATCH)
    guest.until(lambda: cpu.counter("TIMERS", SINT) == 1, "the timer's message arrives")


def test_direct_timer_leaves_the_slot_alone(guest: Guest) -> None:
    """hv-stimer-direct interrupts at its own vector and writes no message."""
    cpu = guest[0]
    direct, vector = 1 << 12, 0x50
    cpu.wrmsr(HV_X64_MSR_STIMER0_CONFIG, AUTO_ENABLE | direct | vector << 4)
    cpu.wrmsr(HV_X64_MSR_STIMER0_COUNT, 1)
    guest.until(lambda: cpu.counter("DIRECT") == 1, "the direct interrupt comes")
    assert slot_type(guest) == 0
