"""SIMP and SIEFP: move, disable, overlap, outside RAM, and under another vCPU's hands (S1-S6, S57)."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable

import pytest
from guest_agent import DRAIN, SCRATCH
from guest_machine import Guest, Poster

from hvkvm.abi.tlfs import HV_X64_MSR_SCONTROL, HV_X64_MSR_SIEFP, HV_X64_MSR_SIMP
from hvkvm.events import Event, Observer, SynicPageMoved

pytestmark = pytest.mark.hyperv

BootAgent = Callable[..., Guest]
SINT = 3
SLOT = 256 * SINT
RAM_WORD = 0x5241_4D52_414D_5241
A, B = SCRATCH + 0x10000, SCRATCH + 0x20000
OUTSIDE_RAM = 0xD000_0000
PAST_THE_BUS = 0xF_FFFF_FFFF_F000
"""A page that no guest physical address width reaches."""


class Moves(Observer):
    """Remembers the page moves."""

    def __init__(self) -> None:
        self.seen: list[SynicPageMoved] = []

    def event(self, event: Event) -> None:
        if isinstance(event, SynicPageMoved):
            self.seen.append(event)


def fill(guest: Guest, gpa: int) -> None:
    """Write the RAM pattern where slot SINT of a page at `gpa` would lie."""
    guest.machine.memory.write_u64(gpa + SLOT, RAM_WORD)


def word(guest: Guest, gpa: int, cpu: int = 0) -> int:
    """What the guest reads there."""
    return guest[cpu].do("READ", gpa + SLOT, 8).value


def post(guest: Guest, vp: int, message_type: int) -> None:
    poster = Poster(guest, vp, SINT)
    assert poster.post(b"", message_type) == 0
    assert poster.await_completions(1) == [0]
    poster.close()


def test_contents_follow_the_page_and_ram_reappears(boot_agent: BootAgent) -> None:
    """S4: a message survives move, disable and enable; what lay under the page was never touched."""
    guest = boot_agent()
    cpu = guest[0]
    fill(guest, A)
    fill(guest, B)
    cpu.simp(A)
    assert word(guest, A) == 0, "zero at first, whatever RAM holds"
    post(guest, 0, 0x1234)
    assert (word(guest, A), word(guest, B)) == (0x1234, RAM_WORD)
    cpu.simp(B)
    assert (word(guest, A), word(guest, B)) == (RAM_WORD, 0x1234)
    cpu.simp(None)
    assert (word(guest, A), word(guest, B)) == (RAM_WORD, RAM_WORD)
    cpu.do("WRITE", B + SLOT, 8, 77)
    cpu.simp(B)
    assert word(guest, B) == 0x1234
    cpu.simp(A)
    assert (word(guest, A), word(guest, B)) == (0x1234, 77)


def test_event_page_moves_with_its_flags(boot_agent: BootAgent) -> None:
    """S4 for SIEFP; flags set after the move land on the page at its new place."""
    guest = boot_agent()
    cpu = guest[0]
    fill(guest, A)
    cpu.synic_on(siefp=A, sints={SINT: 0})
    route = guest.partition.open_route(0, SINT)
    assert route.set_event_flag(0) == 0
    cpu.siefp(B)
    assert route.set_event_flag(1) == 0
    assert (word(guest, A), word(guest, B)) == (RAM_WORD, 0b11)


def test_enabling_takes_three_exits_and_moves_each_page_once(boot_agent: BootAgent) -> None:
    """S57, S3: one exit an MSR, each with all three values; the same value again moves nothing."""
    moves = Moves()
    guest = boot_agent(observer=moves)
    cpu = guest[0]
    counts = guest.machine.platform.threads[0].exit_counts
    before = counts[guest.register_exit]
    cpu.wrmsr(HV_X64_MSR_SIMP, A | 1)
    cpu.wrmsr(HV_X64_MSR_SIEFP, B | 1)
    cpu.wrmsr(HV_X64_MSR_SCONTROL, 1)
    assert counts[guest.register_exit] == before + 3
    expected = [SynicPageMoved(0, "message", A), SynicPageMoved(0, "event", B)]
    assert moves.seen == expected
    for _ in range(3):
        cpu.wrmsr(HV_X64_MSR_SIMP, A | 1)
        cpu.wrmsr(HV_X64_MSR_SCONTROL, 1)
    assert counts[guest.register_exit] == before + 9
    assert moves.seen == expected
    # The address alone, with the enable bit clear, is no page (S2).
    cpu.wrmsr(HV_X64_MSR_SIMP, B)
    assert moves.seen == [*expected, SynicPageMoved(0, "message", None)]


def test_page_at_gpa_0(boot_agent: BootAgent) -> None:
    """S2: 0 is an address like any other, not "off"."""
    guest = boot_agent()
    cpu = guest[0]
    under = guest.machine.memory.read(0, 4096)
    cpu.do("SIMP", 1)
    post(guest, 0, 0x77)
    assert word(guest, 0) == 0x77
    cpu.simp(None)
    assert guest.machine.memory.read(0, 4096) == under


def test_page_outside_ram(boot_agent: BootAgent) -> None:
    """S6: the TLFS allows it; messages arrive there, events too, and the hole is a hole again after."""
    guest = boot_agent()
    cpu = guest[0]
    assert word(guest, OUTSIDE_RAM) == (1 << 64) - 1
    cpu.synic_on(simp=OUTSIDE_RAM, siefp=OUTSIDE_RAM + 0x1000, sints={SINT: DRAIN})
    poster = Poster(guest, 0, SINT)
    assert poster.post(b"far out") == 0
    assert cpu.await_messages(1)[0].payload[:7] == b"far out"
    route = guest.partition.open_route(0, SINT)
    assert route.set_event_flag(9) == 0
    assert word(guest, OUTSIDE_RAM + 0x1000) == 1 << 9
    cpu.simp(A)
    assert word(guest, OUTSIDE_RAM) == (1 << 64) - 1
    cpu.simp(OUTSIDE_RAM)
    assert poster.await_completions(1) == [0]
    assert poster.post(b"again") == 0
    assert cpu.await_messages(1)[0].payload[:5] == b"again"


@pytest.mark.parametrize("gpa", [0xFEE0_0000, 0xFEC0_0000, 0xFFFB_C000, 0xFFFB_D000, PAST_THE_BUS])
def test_page_where_none_can_be_leaves_the_machine_alone(boot_agent: BootAgent, gpa: int) -> None:
    """A hostile address (APIC, KVM's own slots, past the bus) harms nothing, and a sane one works after."""
    guest = boot_agent()
    cpu = guest[0]
    for msr in (HV_X64_MSR_SIMP, HV_X64_MSR_SIEFP):
        reply = cpu.do("WRMSR", msr, gpa | 1)
        assert reply.fault in (None, 13)
        cpu.do("WRMSR", msr, 0)
    cpu.simp(A)
    post(guest, 0, 0x88)
    assert word(guest, A) == 0x88


def test_simp_equal_to_siefp(boot_agent: BootAgent) -> None:
    """S6: the page placed last shows; taking it away uncovers the other, with what it got meanwhile."""
    guest = boot_agent()
    cpu = guest[0]
    fill(guest, A)
    cpu.synic_on(simp=A, sints={SINT: 0})
    post(guest, 0, 0x99)
    cpu.siefp(A)
    assert word(guest, A) == 0
    route = guest.partition.open_route(0, SINT)
    assert route.set_event_flag(4) == 0
    assert word(guest, A) == 1 << 4
    cpu.siefp(None)
    assert word(guest, A) == 0x99
    cpu.siefp(A)
    cpu.simp(None)
    assert word(guest, A) == 1 << 4
    cpu.siefp(None)
    assert word(guest, A) == RAM_WORD


def test_two_vcpus_on_one_gpa(boot_agent: BootAgent) -> None:
    """S6: the same rule between VPs; each keeps its own page."""
    guest = boot_agent(cpus=2)
    fill(guest, A)
    for index in (0, 1):
        guest[index].synic_on(sints={SINT: 0})
        guest[index].simp(A)
        post(guest, index, 0x100 + index)
        assert word(guest, A, cpu=0) == word(guest, A, cpu=1) == 0x100 + index
    guest[1].simp(None)
    assert word(guest, A) == 0x100
    guest[0].simp(None)
    assert word(guest, A) == RAM_WORD
    guest[1].simp(A)
    assert word(guest, A) == 0x101


@pytest.mark.parametrize("place", [A, OUTSIDE_RAM], ids=["in RAM", "outside RAM"])
def test_another_vcpu_never_meets_a_hole(boot_agent: BootAgent, place: int) -> None:
    """S5: while SIMP comes and goes under it, a reader sees the page or what lies beneath, nothing else.

    Outside RAM a second VP's page lies beneath, so that the slot itself stays.
    """
    guest = boot_agent(cpus=3)
    toggler, hammer, holder = guest[0], guest[1], guest[2]
    above, beneath = 0xABCD, RAM_WORD
    if place == OUTSIDE_RAM:
        beneath = 0xBEEF
        holder.simp(place)
        post(guest, 2, beneath)
    else:
        fill(guest, place)
    toggler.simp(place)
    post(guest, 0, above)
    hammer.begin("HAMMER", place + SLOT, above, beneath)
    for _ in range(25):
        for gpa in (None, place, B, place):
            toggler.simp(gpa)
            rounds = hammer.counter("HEARTBEAT")
            guest.until(lambda rounds=rounds: hammer.counter("HEARTBEAT") > rounds, "the hammer goes on")
    on, off, holes, last = hammer.cancel().results
    assert holes == 0, f"{holes} reads met a hole, the last saw {last:#x}"
    assert on > 50
    assert off > 25


def test_flags_set_while_the_page_moves_land_on_the_page(boot_agent: BootAgent) -> None:
    """S36: a setter races with moves and disables: it is told 0 or -ENXIO, and RAM never gets a flag."""
    guest = boot_agent()
    cpu, memory = guest[0], guest.machine.memory
    cpu.synic_on(siefp=A, sints={SINT: 0})
    route = guest.partition.open_route(0, SINT)
    accepted: set[int] = set()
    others: set[int] = set()
    stop = threading.Event()

    def setter() -> None:
        number = 0
        while not stop.is_set():
            status = route.set_event_flag(number)
            accepted.add(number) if status == 0 else others.add(status)
            number = (number + 1) % 2048
            time.sleep(0)

    thread = threading.Thread(target=setter)
    thread.start()
    try:
        for _ in range(20):
            for gpa in (B, None, A):
                cpu.siefp(gpa)
    finally:
        stop.set()
        thread.join()
    assert others <= {-errno.ENXIO}
    flags = int.from_bytes(memory.read(A + SLOT, 256), "little")
    assert {number for number in range(2048) if flags >> number & 1} == accepted
    cpu.siefp(None)
    assert memory.read(A, 4096) == memory.read(B, 4096) == bytes(4096)
