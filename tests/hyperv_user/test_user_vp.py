"""A VP of the SynIC in user space, without KVM: registers, interrupts, EOM, what is saved (S20, S29, S58)."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_host import Host

from hvkvm.abi.hv_synic import HVMSG_TIMER_EXPIRED
from hvkvm.events import NULL_OBSERVER
from hvkvm.hyperv.usermode.vp import UserVp
from hvkvm.memory.guest import GuestMemory

SINT, VECTOR = 3, 0x53
MASKED, AUTO_EOI, POLLING = 1 << 16, 1 << 17, 1 << 18
PAGE, SLOT = 0x10000, 0x10000 + 256 * SINT
MSI = (0xFEE01000, VECTOR)
AUTO_ENABLE = 8 | SINT << 16


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def memory(host: Host) -> Iterator[GuestMemory]:
    memory = GuestMemory(host, 4 << 20)
    yield memory
    memory.close()


def make(host: Host, memory: GuestMemory) -> UserVp:
    vp = UserVp(host, host, memory, host, host, host, NULL_OBSERVER)  # type: ignore[arg-type]
    vp.active = True
    return vp


@pytest.fixture
def vp(host: Host, memory: GuestMemory) -> Iterator[UserVp]:
    vp = make(host, memory)
    assert vp.set_sint(SINT, VECTOR)
    yield vp
    vp.close()


def timer_waits_for_its_slot(vp: UserVp, host: Host) -> None:
    vp.stimers[2].set_config(AUTO_ENABLE)
    vp.stimers[2].set_count(5)
    host.run_vp()
    assert vp.stimers[2].pending
    assert host.interrupts == []


def test_s58_a_page_that_comes_on_brings_the_timers_message(
    vp: UserVp, host: Host, memory: GuestMemory
) -> None:
    timer_waits_for_its_slot(vp, host)
    assert vp.set_registers(1, 0, PAGE)
    assert vp.stimers[2].pending, "the page is off still"
    assert vp.set_registers(1, 0, PAGE | 1)
    assert memory.read_u32(SLOT) == HVMSG_TIMER_EXPIRED
    assert (vp.stimers[2].pending, host.interrupts) == (False, [MSI])


def test_s29_eom_brings_the_timers_message_then_has_the_loop_tell_who_waits(
    vp: UserVp, host: Host, memory: GuestMemory
) -> None:
    def waiter() -> None:
        pass

    def gone() -> None:
        pass

    vp.set_registers(1, 0, PAGE | 1)
    memory.write_u32(SLOT, 1)
    timer_waits_for_its_slot(vp, host)
    vp.arm_ack(waiter)
    vp.arm_ack(gone)
    vp.disarm_ack(gone)
    vp.disarm_ack(gone)
    vp.eom()
    assert (host.soon, host.interrupts) == ([waiter], []), "an EOM of another SINT: the slot is taken still"
    memory.write_u32(SLOT, 0)
    vp.eom()
    assert (host.soon, host.interrupts) == ([waiter], [MSI])
    assert memory.read_u32(SLOT) == HVMSG_TIMER_EXPIRED
    vp.arm_ack(waiter)
    host.loop_ended = True
    vp.eom()


@pytest.mark.parametrize("error", [errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENOSPC])
def test_an_interrupt_that_the_host_cannot_raise_now_is_raised_a_little_later(
    vp: UserVp, host: Host, error: int
) -> None:
    """A guest does not look for messages that it was not told of."""
    host.fails_with = error
    assert vp.raise_sint(SINT) == vp.raise_sint(SINT) == 0
    assert [seconds for seconds, _fn, _args in host.later] == [0.001], "once, however often it was raised"
    host.run_later()
    assert (len(host.later), host.interrupts) == (1, [])
    host.fails_with = 0
    host.run_later()
    assert (host.later, host.interrupts) == ([], [MSI])
    host.fails_with = error
    assert vp.raise_sint(SINT) == 0
    assert len(host.later) == 1
    host.loop_ended = True
    assert vp.raise_vector(VECTOR + 1) == 0, "the machine is ending"


def test_s20_another_error_is_the_senders(vp: UserVp, host: Host) -> None:
    host.fails_with = errno.EINVAL
    assert vp.raise_sint(SINT) == -errno.EINVAL
    assert host.later == []


@pytest.mark.parametrize("bits", [MASKED, POLLING, AUTO_EOI])
def test_s20_a_sint_that_is_silent_or_auto_eoi_raises_no_msi(vp: UserVp, host: Host, bits: int) -> None:
    vp.set_sint(SINT, VECTOR | bits)
    assert vp.raise_sint(SINT) == 0
    assert host.interrupts == []
    assert vp.auto_eoi_waiting == (bits == AUTO_EOI)


def test_s1_without_synic_registers_fault(vp: UserVp) -> None:
    vp.active = False
    assert not vp.set_registers(1, 0, PAGE | 1)
    assert vp.simp == 0


def test_s7_reset_masks_every_sint_stops_timers_and_forgets_auto_eoi(vp: UserVp, host: Host) -> None:
    vp.set_registers(1, 0, PAGE | 1)
    vp.stimers[0].set_config(AUTO_ENABLE)
    vp.stimers[0].set_count(1 << 40)
    vp.set_sint(4, VECTOR | AUTO_EOI)
    vp.raise_sint(4)
    vp.reset()
    assert [vp.sint(number) for number in range(16)] == [MASKED] * 16
    assert (vp.stimers[0].config, vp.stimers[0].count, host.armed) == (0, 0, [])
    assert (vp.auto_eoi_waiting, vp.simp) == (False, 0)


def busy(vp: UserVp) -> None:
    vp.set_registers(1, 0, PAGE | 1)
    vp.set_sint(4, VECTOR | AUTO_EOI)
    vp.raise_sint(4)
    vp.stimers[3].set_config(AUTO_ENABLE)
    vp.stimers[3].set_count(1 << 40)
    vp.hold()


def test_it_is_saved_and_goes_on(vp: UserVp, host: Host, memory: GuestMemory) -> None:
    busy(vp)
    assert host.armed == [], "held"
    saved = vp.save_all()
    other = Host()
    fresh = make(other, memory)
    fresh.hold()
    fresh.load_all(saved)
    assert fresh.save_all() == saved
    assert (other.armed, other.queue) == ([], [])
    fresh.go_on()
    assert len(other.armed) == 1
    assert len(other.queue) == 1, "the AutoEOI interrupt is tried"
    fresh.close()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda state: state._replace(sints=state.sints[1:]), "number of SINTs"),
        (lambda state: state._replace(stimers=state.stimers[1:]), "number of SINTs or timers"),
        (lambda state: state._replace(sints=(1 << 64, *state.sints[1:])), "no 64-bit"),
        (lambda state: state._replace(sints=(-1, *state.sints[1:])), "no 64-bit"),
        (lambda state: state._replace(sints=(*state.sints[1:], 15)), "no guest can set"),
        (lambda state: state._replace(auto_eoi=(256,)), "vector"),
    ],
)
def test_a_saved_vp_that_none_can_be_is_refused(vp: UserVp, change: Callable[..., Any], why: str) -> None:
    busy(vp)
    saved = vp.save_all()
    vp.reset()
    with pytest.raises(ValueError, match=why):
        vp.load_all(change(saved))


def test_s8_a_host_without_memory_for_the_second_page_keeps_none(
    host: Host, memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    memfd = os.memfd_create

    def once(*arguments: Any) -> int:
        if made:
            raise OSError(errno.ENFILE, "no more")
        made.append(memfd(*arguments))
        return made[0]

    monkeypatch.setattr(os, "memfd_create", once)
    with pytest.raises(OSError, match="no more"):
        make(host, memory)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(made[0])
