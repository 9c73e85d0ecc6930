"""Power-on values, crash MSRs and machine resets with messages under way (S7, S16, S31)."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from guest_agent import DRAIN, EOM_PENDING, GP_FAULT, SCRATCH
from guest_machine import GUEST_OS_ID, Guest, Poster, Sender

from hvkvm.abi.tlfs import (
    HV_X64_MSR_CRASH_CTL,
    HV_X64_MSR_CRASH_P0,
    HV_X64_MSR_EOM,
    HV_X64_MSR_GUEST_OS_ID,
    HV_X64_MSR_HYPERCALL,
    HV_X64_MSR_RESET,
    HV_X64_MSR_SCONTROL,
    HV_X64_MSR_SIEFP,
    HV_X64_MSR_SIMP,
    HV_X64_MSR_SINT0,
    HV_X64_MSR_STIMER0_CONFIG,
    HV_X64_MSR_SVERSION,
    HV_X64_MSR_VP_INDEX,
)
from hvkvm.machine.outcome import EXIT_PANIC, Ending

pytestmark = pytest.mark.hyperv

BootAgent = Callable[..., Guest]
SINT = 6


def assert_power_on_msrs(guest: Guest) -> None:
    """Every vCPU reads the SynIC as the TLFS has it after reset."""
    for cpu in guest.agent.cpus:
        values = {HV_X64_MSR_SCONTROL: 0, HV_X64_MSR_SVERSION: 1, HV_X64_MSR_SIEFP: 0, HV_X64_MSR_SIMP: 0}
        values |= {HV_X64_MSR_EOM: 0, HV_X64_MSR_VP_INDEX: cpu.index}
        values |= {HV_X64_MSR_SINT0 + sint: 1 << 16 for sint in range(16)}
        values |= {HV_X64_MSR_STIMER0_CONFIG + n: 0 for n in range(8)}
        values |= {HV_X64_MSR_GUEST_OS_ID: 0, HV_X64_MSR_HYPERCALL: 0}
        assert {msr: cpu.rdmsr(msr) for msr in values} == values


def reset(guest: Guest) -> None:
    """The guest resets the machine through HV_X64_MSR_RESET and comes up again."""
    boots = guest.agent.boots
    guest[0].begin("WRMSR", HV_X64_MSR_RESET, 1)
    guest.agent.await_online(boots + 1)


def test_power_on_values(boot_agent: BootAgent) -> None:
    """SINTs masked, everything else off; KVM's own default SCONTROL of 1 is overwritten."""
    assert_power_on_msrs(boot_agent(cpus=2))


def test_values_a_guest_may_not_write(boot_agent: BootAgent) -> None:
    """SVERSION is read-only; a vector below 16 unmasked is #GP; VP_INDEX is read-only."""
    cpu = boot_agent()[0]
    for msr, value in ((HV_X64_MSR_SVERSION, 1), (HV_X64_MSR_SINT0, 15), (HV_X64_MSR_VP_INDEX, 3)):
        assert cpu.do("WRMSR", msr, value).fault == GP_FAULT
    assert cpu.do("WRMSR", HV_X64_MSR_SINT0, 15 | 1 << 16).fault is None


def test_reset_puts_everything_back(boot_agent: BootAgent) -> None:
    """S7: a guest in the middle of using everything resets; the next life starts from power-on."""
    guest = boot_agent(cpus=3)
    for round_number in range(3):
        guest.enlighten()
        for index, cpu in enumerate(guest.agent.cpus):
            page = SCRATCH + index * 0x2000
            cpu.synic_on(simp=page, siefp=page + 0x1000, sints={SINT: 0})
            poster = Poster(guest, index, SINT)
            assert poster.post(b"left in the slot") == 0
            assert poster.await_completions(1) == [0]
            assert poster.route.set_event_flag(9) == 0
            poster.close()
        reset(guest)
        assert guest.machine.resets == round_number + 1
        assert_power_on_msrs(guest)
        for index, cpu in enumerate(guest.agent.cpus):
            # S4: the pages are zero again, and there is no interrupt from the life before.
            page = SCRATCH + index * 0x2000
            cpu.synic_on(simp=page, siefp=page + 0x1000, sints={SINT: 0})
            assert guest.machine.memory.read(page, 0x2000) == bytes(0x2000)
            assert cpu.irqs(SINT) == 0
            cpu.expect_clean()


def test_reset_with_messages_in_flight(boot_agent: BootAgent) -> None:
    """S31: each message under way completes once, cancelled; none of them reaches the next life."""
    guest = boot_agent(cpus=2)
    for index, cpu in enumerate(guest.agent.cpus):
        cpu.synic_on(simp=SCRATCH + index * 0x1000, sints={SINT: 0, SINT + 1: 0})
    waiting, queued = Poster(guest, 1, SINT), Poster(guest, 0, SINT + 1)
    assert waiting.post(b"occupies the slot") == 0
    assert waiting.await_completions(1) == [0]
    guest.settle()
    # Behind it: this one waits for an EOM that never comes.
    flagged = SCRATCH + 0x1000 + 256 * SINT + 5
    assert waiting.post(b"waits for EOM") == 0
    guest.until(lambda: guest.machine.memory.read(flagged, 1) == b"\1", "the slot is flagged")
    guest.settle()
    assert waiting.statuses == [0]
    boots = guest.agent.boots
    release = guest.hold(0)
    assert queued.post(b"waits for its vCPU") == 0
    guest.machine.request_reset("the test asks for it")
    release()
    guest.agent.await_online(boots + 1)
    assert waiting.await_completions(2) == [0, -errno.ECANCELED]
    # The held vCPU may have delivered it to the old life before the reset got hold of the vCPU.
    assert queued.await_completions(1)[0] in (0, -errno.ECANCELED)
    # S7: the routes were closed; new ones work in the new life.
    assert waiting.post(b"too late") == -errno.ENXIO
    for index, cpu in enumerate(guest.agent.cpus):
        page = SCRATCH + index * 0x1000
        cpu.synic_on(simp=page, sints={SINT: DRAIN | EOM_PENDING, SINT + 1: DRAIN | EOM_PENDING})
        assert guest.machine.memory.read(page, 0x1000) == bytes(0x1000)
        fresh = Poster(guest, index, SINT)
        assert fresh.post(b"new life") == 0
        assert cpu.await_messages(1)[0].payload[:8] == b"new life"
        assert fresh.await_completions(1) == [0]
    guest.settle()
    assert [cpu.messages() for cpu in guest.agent.cpus] == [[], []]


def test_resets_under_traffic(boot_agent: BootAgent) -> None:
    """S31: senders at full speed while the guest resets: every accepted post completes exactly once."""
    guest = boot_agent(cpus=2)
    for _ in range(5):
        senders = []
        for index, cpu in enumerate(guest.agent.cpus):
            cpu.synic_on(simp=SCRATCH + index * 0x1000, sints={SINT: DRAIN | EOM_PENDING})
            senders.append(Sender(guest, index, SINT))
        for sender in senders:
            sender.send(1 << 30)  # more than one can finish before the reset
        for sender in senders:
            guest.until(lambda sender=sender: sender.sent > 3, "traffic flows")
        reset(guest)
        guest.io_barrier()
        for sender in senders:
            assert sender.failed in ([-errno.ECANCELED], [-errno.ENXIO]), sender.failed
            cancelled = sender.failed.count(-errno.ECANCELED)
            assert len(sender.poster.statuses) == sender.sent + cancelled


def test_crash_msrs_become_the_panic_text(boot_agent: BootAgent) -> None:
    """The register form ends the run with status 255 and the guest's own numbers."""
    guest = boot_agent()
    cpu = guest[0]
    assert cpu.rdmsr(HV_X64_MSR_CRASH_CTL) >> 63 == 1, "notification is offered"
    for number, value in enumerate((0xDEAD, GUEST_OS_ID, 0x1234_5678, 0xAAAA, 0xBBBB)):
        cpu.wrmsr(HV_X64_MSR_CRASH_P0 + number, value)
    cpu.begin("WRMSR", HV_X64_MSR_CRASH_CTL, 1 << 63)
    outcome = guest.machine.wait(60)
    assert outcome is not None
    assert (outcome.ending, outcome.status) == (Ending.PANIC, EXIT_PANIC)
    assert "0xdead" in outcome.detail
    assert "0x12345678" in outcome.detail


def test_crash_message_is_the_panic_text(boot_agent: BootAgent) -> None:
    """The message form: P3 says where, P4 how long; text from the guest, safe for a terminal."""
    guest = boot_agent()
    text = b"Kernel panic - not syncing: \x1b[31mtest"
    guest.machine.memory.write(SCRATCH, text)
    for number, value in enumerate((0, 0, 0, SCRATCH, len(text))):
        guest[0].wrmsr(HV_X64_MSR_CRASH_P0 + number, value)
    guest[0].begin("WRMSR", HV_X64_MSR_CRASH_CTL, 0b11 << 62)
    outcome = guest.machine.wait(60)
    assert outcome is not None
    assert outcome.ending is Ending.PANIC
    assert "Kernel panic - not syncing:" in outcome.detail
    assert "\x1b" not in outcome.detail
