"""Programs about interrupts, messages, event flags and timers; and all programs by name.

For two VPs; to try another value, add it. Owner: the tests.
"""

from __future__ import annotations

from collections.abc import Iterable

from guest_agent import DRAIN, EOM_PENDING, EVENTS, SCRATCH
from synic_program import (
    AUTO_ENABLE,
    AUTO_EOI,
    CONFIG,
    COUNT,
    DIRECT,
    DIRECT_VECTOR,
    ENABLE,
    EOM,
    FAR,
    LAZY,
    MASKED,
    PERIODIC,
    POLLING,
    SCONTROL,
    SIEFP,
    SIMP,
    SINT,
    Op,
    Program,
    by_name,
    enlightened,
    faults,
    on,
    rd,
    timer,
    wr,
)
from synic_register_programs import REGISTERS

from hvkvm.abi import tlfs


def _interrupts() -> Iterable[Op]:
    """Pulses into SINTs that are masked, moved, auto-EOI, deaf; two VPs."""
    yield Op("pulse", 0, 2)
    yield from on(2)
    yield from (Op("pulse", 0, 2), Op("pulse", 0, 2))
    yield from (Op("wrmsr", 0, SINT + 2, DIRECT_VECTOR), Op("pulse", 0, 2))
    yield from (Op("wrmsr", 0, SINT + 2, 0x62 | MASKED), Op("pulse", 0, 2))
    yield from (Op("wrmsr", 0, SINT + 2, 0x62 | AUTO_EOI), Op("pulse", 0, 2), Op("pulse", 0, 2))
    yield from (Op("idle", 0, 2), Op("pulse", 0, 2), Op("pulse", 0, 2), Op("idle", 0, 1))
    yield from (Op("wrmsr", 0, SINT + 2, 0x62), Op("idle", 0, 2), Op("pulse", 0, 2), Op("pulse", 0, 2))
    yield from (Op("idle", 0, 0), Op("pulse", 0, 2))
    yield from (*on(2, 9, vp=1), Op("pulse", 1, 2), Op("pulse", 1, 9), Op("pulse", 0, 2))
    # SCONTROL decides over no interrupt; two SINTs may share a vector.
    yield from (Op("wrmsr", 1, SCONTROL, 0), Op("pulse", 1, 2))
    yield from (Op("wrmsr", 1, SINT + 9, 0x62), Op("pulse", 1, 9), Op("pulse", 1, 2))


def _messages() -> Iterable[Op]:
    """The host posts: page off, slot free, slot taken, EOM with and without, masked, drained by a handler."""
    yield Op("send", 0, 2, 1, 8)
    yield from on(2, 5)
    yield from (Op("send", 0, 2, 2, 240), Op("send", 0, 2, 3, 16), Op("send", 0, 2, 4, 16))
    yield from (Op("wrmsr", 0, EOM, 0), Op("drain", 0, 2), Op("wrmsr", 0, EOM, 0), Op("send", 0, 2, 5))
    yield from (Op("drain", 0, 2), Op("drain", 0, 2), Op("wrmsr", 0, EOM, 0), Op("send", 0, 2, 6, 1))
    yield from (Op("wrmsr", 0, SINT + 5, 0x65 | MASKED), Op("send", 0, 5, 7, 3), Op("drain", 0, 5))
    yield from (Op("policy", 0, 2, DRAIN | EOM_PENDING), Op("wrmsr", 0, EOM, 0), Op("send", 0, 2, 8, 100))
    yield from (Op("wrmsr", 0, SIMP, 0), Op("send", 0, 2, 9, 9), Op("wrmsr", 0, SIMP, SCRATCH | 1))
    yield from (Op("wrmsr", 0, SCONTROL, 0), Op("send", 0, 2, 10, 9), Op("wrmsr", 0, SCONTROL, 1))
    yield from (*on(2, vp=1), Op("send", 1, 2, 11, 11), Op("send", 0, 2, 12, 12), Op("drain", 1, 2))


def _events() -> Iterable[Op]:
    yield Op("flag", 0, 3, 7)
    yield from on(3, 4)
    yield from (Op("flag", 0, 3, number) for number in (7, 7, 0, 2047, 2048))
    yield from (Op("flag", 0, 4, 7), Op("wrmsr", 0, SINT + 4, 0x64 | MASKED), Op("flag", 0, 4, 8))
    yield from (Op("policy", 0, 3, EVENTS), Op("pulse", 0, 3), Op("flag", 0, 3, 7), Op("flag", 0, 3, 2047))
    yield from (Op("wrmsr", 0, SCONTROL, 0), Op("flag", 0, 3, 9), Op("wrmsr", 0, SCONTROL, 1))
    yield from (Op("wrmsr", 0, SIEFP, 0), Op("flag", 0, 3, 10), *on(3, vp=1), Op("flag", 1, 3, 11))


def _timers() -> Iterable[Op]:
    """One-shots for the past: delivered at once, to a free slot or a taken one, with the page off."""
    yield from on(2, 5)
    yield from (*timer(0, AUTO_ENABLE | 2 << 16, 1), Op("drain", 0, 2), Op("wrmsr", 0, EOM, 0))
    yield from (*timer(1, 5 << 16, 7), *timer(1, ENABLE | 5 << 16), Op("drain", 0, 5))
    yield from (*timer(2, DIRECT | AUTO_ENABLE | DIRECT_VECTOR << 4, 1), Op("pulse", 0, 2))
    yield from (*timer(2, DIRECT | AUTO_ENABLE | 5 << 4, 1), *timer(2, DIRECT | AUTO_ENABLE | 15 << 4, 1))
    # Behind a message of the host's, and a host's behind a timer's.
    yield from (Op("send", 0, 2, 1, 40), *timer(0, AUTO_ENABLE | 2 << 16, 2), Op("drain", 0, 2))
    yield from (*rd(CONFIG), Op("wrmsr", 0, EOM, 0), *rd(CONFIG), Op("send", 0, 2, 2, 30))
    yield from (Op("drain", 0, 2), Op("wrmsr", 0, EOM, 0), Op("drain", 0, 2))
    # Several at once; a count of 0 takes a message back that waits.
    yield from (*timer(0, AUTO_ENABLE | 5 << 16, 3), *timer(1, AUTO_ENABLE | 5 << 16, 4))
    yield from (*timer(2, AUTO_ENABLE | 5 << 16, 5), Op("wrmsr", 0, COUNT + 2, 0), Op("drain", 0, 5))
    yield from (Op("wrmsr", 0, EOM, 0), Op("drain", 0, 5), Op("wrmsr", 0, EOM, 0), *rd(CONFIG, CONFIG + 4))
    yield from (Op("wrmsr", 0, SIMP, 0), *timer(3, AUTO_ENABLE | 2 << 16, 6))
    yield from (Op("wrmsr", 0, SIMP, SCRATCH | 1), *rd(CONFIG + 6), Op("drain", 0, 2))
    yield from (*on(2, vp=1), *timer(0, AUTO_ENABLE | 2 << 16, 1, vp=1), Op("drain", 1, 2))


def _ticking() -> Iterable[Op]:
    """Periodic ones: message, lazy, direct."""
    for vp in (0, 1):
        yield from (*on(2, vp=vp), Op("policy", vp, 2, DRAIN | EOM_PENDING))
        for target in (2 << 16, LAZY | 2 << 16, DIRECT | DIRECT_VECTOR << 4):
            yield Op("ticks", vp, 3 * vp, PERIODIC | AUTO_ENABLE | target)


def _reset() -> Iterable[Op]:
    """A machine reset in the middle of everything."""
    yield from (*enlightened(), *on(2, 5), *on(3, vp=1), Op("send", 0, 2, 1, 8), Op("flag", 1, 3, 9))
    yield from (*timer(0, AUTO_ENABLE | 5 << 16, FAR), *timer(1, AUTO_ENABLE | 2 << 16, 1))
    yield from faults(tlfs.HV_X64_MSR_CRASH_P0, 5)
    yield from faults(tlfs.HV_X64_MSR_REFERENCE_TSC, SCRATCH + 0x3000 | 1)
    yield Op("reset")
    registers = (
        0,
        1,
        2,
        0x21,
        0x73,
        0x80,
        0x81,
        0x82,
        0x83,
        0x92,
        0x95,
        0xB0,
        0xB1,
        0xB2,
        0xB3,
        0x100,
        0x105,
    )
    yield from rd(*(0x40000000 + msr for msr in registers))
    yield from (*rd(SIEFP, SINT + 3, vp=1), *on(2, 3), *on(3, vp=1), Op("send", 0, 2, 2, 8))


def _beyond_the_rules() -> Iterable[Op]:
    """Where the TLFS has its say and KVM another one."""
    yield from on(2, 5)
    # A polled SINT interrupts nobody, and so may have any vector.
    yield from (*wr(SINT + 2, 0x62 | POLLING), Op("pulse", 0, 2), Op("send", 0, 2, 1, 8), Op("drain", 0, 2))
    yield from (*wr(SINT + 2, 5 | POLLING), *wr(SINT + 2, 0x62))
    # A timer needs a SINT other than 0.
    yield from (*timer(0, ENABLE, FAR), *timer(0, 0, 0), *timer(0, AUTO_ENABLE, 1), Op("drain", 0, 0))
    yield from timer(0, 0, 0)
    # A masked SINT takes a timer's message as any other, once.
    yield from (Op("wrmsr", 0, SINT + 5, 0x65 | MASKED), *timer(1, AUTO_ENABLE | 5 << 16, 3))
    yield from (Op("drain", 0, 5), Op("wrmsr", 0, EOM, 0), *timer(1, 0, 0), Op("drain", 0, 5))
    # A periodic timer goes on, whoever takes its messages.
    yield Op("untaken", 0, 3, PERIODIC | AUTO_ENABLE | 5 << 16)
    yield from (*on(5), Op("untaken", 0, 3, PERIODIC | AUTO_ENABLE | 5 << 16))
    yield Op("untaken", 0, 3, PERIODIC | LAZY | AUTO_ENABLE | 5 << 16)
    # A message that waits goes out at EOM; KVM also takes an EOI of the SINT for one.
    yield from (*on(5), *timer(1, AUTO_ENABLE | 5 << 16, 3), *timer(2, AUTO_ENABLE | 5 << 16, 4))
    yield from (Op("drain", 0, 5), Op("pulse", 0, 5), Op("drain", 0, 5), Op("wrmsr", 0, EOM, 0))


TRAFFIC: dict[str, Program] = by_name(
    _interrupts,
    _messages,
    _events,
    _timers,
    _ticking,
    _reset,
    _beyond_the_rules,
)

PROGRAMS = REGISTERS | TRAFFIC
