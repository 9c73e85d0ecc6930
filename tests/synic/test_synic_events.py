"""Event flags: one interrupt for 0 -> 1, none for a flag that is set, every number (S33-S36)."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

import pytest
from guest_agent import EVENTS, SCRATCH
from guest_machine import Guest

from hvkvm.abi.tlfs import HV_X64_MSR_SCONTROL

pytestmark = pytest.mark.hyperv

BootAgent = Callable[..., Guest]
SIEFP = SCRATCH + 0x1000


@pytest.fixture
def guest(boot_agent: BootAgent) -> Guest:
    """One vCPU with its event flags page on and SINTs 0, 4, 15 open; flags stay until a test says so."""
    guest = boot_agent(cpus=1)
    guest[0].synic_on(siefp=SIEFP, sints={0: 0, 4: 0, 15: 0})
    return guest


def test_only_the_change_from_0_to_1_interrupts(guest: Guest) -> None:
    """S35: already set is 0 and no interrupt; clear it and the next set interrupts again."""
    cpu = guest[0]
    route = guest.partition.open_route(0, 4)
    assert route.set_event_flag(77) == 0
    guest.settle()
    assert cpu.irqs(4) == 1
    for _ in range(3):
        assert route.set_event_flag(77) == 0
    guest.settle()
    assert cpu.irqs(4) == 1
    assert route.set_event_flag(78) == 0
    guest.settle()
    assert cpu.irqs(4) == 2
    word = SIEFP + 256 * 4 + 72 // 8
    assert cpu.do("READ", word, 8).value == 0b11 << (77 - 72)
    cpu.do("WRITE", word, 8, 0)
    assert route.set_event_flag(77) == 0
    guest.settle()
    assert cpu.irqs(4) == 3


@pytest.mark.parametrize("sint", [4, 15])
def test_all_2048_numbers_and_nothing_beyond(guest: Guest, sint: int) -> None:
    """S33: 0..2047 are this SINT's own 256 bytes; 2048 must not reach the next SINT's or leave the page."""
    cpu, memory = guest[0], guest.machine.memory
    route = guest.partition.open_route(0, sint)
    below = memory.read(SIEFP + 0x1000, 64)
    for number in (2048, 2049, 4095, 1 << 31, 1 << 40, -1):
        assert route.set_event_flag(number) == -errno.EINVAL
    guest.settle()
    assert cpu.irqs(sint) == 0
    assert memory.read(SIEFP, 0x1000) == bytes(0x1000)
    for number in range(2048):
        assert route.set_event_flag(number) == 0
    expected = bytearray(0x1000)
    expected[256 * sint : 256 * sint + 256] = b"\xff" * 256
    assert memory.read(SIEFP, 0x1000) == bytes(expected)
    assert memory.read(SIEFP + 0x1000, 64) == below
    cpu.policy(sint, EVENTS)
    memory.write(SIEFP + 256 * sint, bytes(256))
    for number in (0, 1, 63, 64, 1023, 2040, 2047):
        assert route.set_event_flag(number) == 0
        guest.until(lambda number=number: number in cpu.seen_flags(sint), f"the guest sees flag {number}")
    cpu.expect_clean()


def test_flags_need_the_page_and_scontrol(guest: Guest) -> None:
    """S9, S34: range first, then -ENXIO without SIEFP or SCONTROL; nothing is set then."""
    cpu = guest[0]
    route = guest.partition.open_route(0, 4)
    cpu.wrmsr(HV_X64_MSR_SCONTROL, 0)
    assert route.set_event_flag(5) == -errno.ENXIO
    assert route.set_event_flag(2048) == -errno.EINVAL
    cpu.wrmsr(HV_X64_MSR_SCONTROL, 1)
    assert route.set_event_flag(5) == 0
    cpu.siefp(None)
    assert route.set_event_flag(6) == -errno.ENXIO
    cpu.siefp(SIEFP)
    guest.settle()
    assert cpu.irqs(4) == 1
    assert cpu.do("READ", SIEFP + 256 * 4, 8).value == 1 << 5


def test_no_flag_is_lost_while_the_guest_clears_and_several_threads_set(guest: Guest) -> None:
    """S35, S36: an atomic OR. Whatever was set is taken by the guest in the end, with no flag left behind."""
    cpu, memory = guest[0], guest.machine.memory
    cpu.policy(4, EVENTS)
    cpu.idle("SPIN")
    route = guest.partition.open_route(0, 4)
    answers: set[int] = set()

    def setter(numbers: list[int]) -> None:
        for _ in range(10):
            for number in numbers:
                answers.add(route.set_event_flag(number))

    # Neighbouring bits of the same words, from different threads.
    threads = [threading.Thread(target=setter, args=(list(range(k, 128, 4)),)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {0}
    guest.until(lambda: memory.read(SIEFP + 256 * 4, 256) == bytes(256), "the guest takes every flag")
    guest.settle()
    assert cpu.seen_flags(4) == set(range(128))
    assert 128 <= cpu.counter("EVENTS", 4) <= 1280
    cpu.expect_clean()


def test_each_set_after_a_clear_wakes_a_halted_guest(guest: Guest) -> None:
    """No lost wake-up: set, wait until the guest took it, set again."""
    cpu = guest[0]
    cpu.policy(4, EVENTS)
    route = guest.partition.open_route(0, 4)
    for count in range(1, 101):
        assert route.set_event_flag(count % 7) == 0
        guest.until(lambda count=count: cpu.counter("EVENTS", 4) == count, f"event {count} is taken")
    assert cpu.irqs(4) == 100
