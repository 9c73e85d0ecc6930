"""Programs made up from a seed, and a failing one made short enough to read.

The same seed gives the same program on every machine. Left out is what the two
SynICs are known to do differently (`synic_differences`): SINT 0 and masked
SINTs for timers, polled SINTs, a slot emptied without the EOM that it asks for,
the hypercall page's lock. Owner: the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from guest_agent import DRAIN, EOM_PENDING, EVENTS, HYPERCALL_PAGE, SINT_VECTOR
from guest_machine import GUEST_OS_ID
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
    FAST,
    INPUT,
    LAZY,
    MASKED,
    PAGE,
    PERIODIC,
    POST,
    SCONTROL,
    SIEFP,
    SIGNAL,
    SIMP,
    SINT,
    TAKEN_EVENT_CONNECTION,
    TAKEN_MESSAGE_CONNECTION,
    Op,
    Program,
    enlightened,
    on,
    pages,
)

from hvkvm.abi import tlfs

TIMER_SINT, MESSAGE_SINT = 9, 2
SINTS = (MESSAGE_SINT, TIMER_SINT)
"""Apart: where a timer and the host both wait for one slot, either may be first with KVM's SynIC."""

LENGTH = 40
_TRIES = 120
"""Programs that `shortened` runs at most: each costs a machine reset on both sides."""


def made_up(seed: int, cpus: int, length: int = LENGTH) -> Program:
    """The program of `seed` for a machine of `cpus` VPs: everything on, then `length` operations or more.

    Most are about one VP, so that they meet in its registers and slots.
    """
    random = Random(seed)
    favourite = random.randrange(cpus)
    start = _start(cpus)
    ops = [*start]
    while len(ops) < length + len(start):
        vp = favourite if random.random() < 0.8 else random.randrange(cpus)
        part = random.choice(_KINDS)(random, vp)
        ops += (*part, *start) if part == _RESET else part
    return tuple(ops)


def _start(cpus: int) -> Program:
    """What every life of the machine begins with."""
    return sum((on(*SINTS, vp=vp) for vp in range(cpus)), enlightened())


def is_sound(program: Program, cpus: int) -> bool:
    """Whether a part of a made-up program leaves out no start: without it there are known differences."""
    start = _start(cpus)
    lives = [0, *(at + 1 for at, op in enumerate(program) if (op,) == _RESET)]
    return all(program[at : at + len(start)] == start for at in lives)


def _sint(random: Random, vp: int) -> Program:
    sint = random.choice(SINTS)
    own = SINT_VECTOR + sint
    values = [own, own | AUTO_EOI, DIRECT_VECTOR, random.randrange(16), own | 0xFF00, own | 1 << 40]
    if sint != TIMER_SINT:
        values += [own | MASKED, MASKED, own | MASKED | AUTO_EOI]
    return (Op("wrmsr", vp, SINT + sint, random.choice(values)), Op("rdmsr", vp, SINT + sint))


def _page(random: Random, vp: int) -> Program:
    msr = random.choice((SIMP, SIEFP))
    page = pages(vp) + (PAGE if msr == SIEFP else 0)
    places = [page | 1, page | 1, page | 0xFFF, page + 0x4000 | 1]
    if msr == SIEFP:
        places += [0, page]
    return (Op("wrmsr", vp, msr, random.choice(places)), Op("rdmsr", vp, msr))


def _page_off(random: Random, vp: int) -> Program:
    """The message page goes, a timer expires, it comes back. No interrupt in between: its EOI would count."""
    number = 2 * random.randrange(4)
    config = Op("wrmsr", vp, CONFIG + number, AUTO_ENABLE | TIMER_SINT << 16)
    count = Op("wrmsr", vp, COUNT + number, random.choice((1, 2, FAR)))
    off, on_again = Op("wrmsr", vp, SIMP, random.choice((0, pages(vp)))), Op("wrmsr", vp, SIMP, pages(vp) | 1)
    return (off, config, count, *_timer_reads(vp, number), on_again, *_timer_reads(vp, number))


def _control(random: Random, vp: int) -> Program:
    return (Op("wrmsr", vp, SCONTROL, random.choice((0, 1, 1, 3))), Op("rdmsr", vp, SCONTROL))


def _timer(random: Random, vp: int) -> Program:
    number = 2 * random.randrange(4)
    if random.random() < 0.4:
        count = random.choice((0, 1, 1, FAR, FAR + 1))
        return (Op("wrmsr", vp, COUNT + number, count), *_timer_reads(vp, number))
    bits = sum(bit for bit in (ENABLE, AUTO_ENABLE, LAZY) if random.random() < 0.5)
    target = random.choice((TIMER_SINT << 16, TIMER_SINT << 16, DIRECT | DIRECT_VECTOR << 4, DIRECT | 5 << 4))
    if random.random() < 0.2:
        # A periodic one must not tick here: by when it does, no two machines agree.
        return (
            Op("wrmsr", vp, COUNT + number, FAR),
            Op("wrmsr", vp, CONFIG + number, bits | target | PERIODIC),
            *_timer_reads(vp, number),
            Op("wrmsr", vp, CONFIG + number, target),
        )
    return (Op("wrmsr", vp, CONFIG + number, bits | target), *_timer_reads(vp, number))


def _timer_reads(vp: int, number: int) -> Program:
    return (Op("rdmsr", vp, CONFIG + number), Op("rdmsr", vp, COUNT + number))


def _message(random: Random, vp: int) -> Program:
    return (Op("send", vp, MESSAGE_SINT, random.randrange(1, 250), random.choice((0, 1, 24, 240))),)


def _crowd(random: Random, vp: int) -> Program:
    """Several messages for one slot, of timers or the host's, then emptied: all come out, in order."""
    timers = random.random() < 0.6
    parts: list[Op] = []
    for _ in range(random.randrange(2, 4)):
        if timers:
            number = 2 * random.randrange(4)
            parts.append(Op("wrmsr", vp, CONFIG + number, AUTO_ENABLE | TIMER_SINT << 16))
            parts.append(Op("wrmsr", vp, COUNT + number, 1 + random.randrange(9)))
        else:
            parts += _message(random, vp)
    take = Op("take", vp, TIMER_SINT if timers else MESSAGE_SINT)
    reads = (CONFIG + 2 * timer for timer in range(4))
    return (*parts, *(take,) * random.randrange(4), *(Op("rdmsr", vp, read) for read in reads if timers))


def _take(random: Random, vp: int) -> Program:
    return (Op("take", vp, random.choice(SINTS)),)


def _eom(random: Random, vp: int) -> Program:
    return (Op("wrmsr", vp, EOM, random.choice((0, 1))),)


def _flag(random: Random, vp: int) -> Program:
    return (Op("flag", vp, random.choice(SINTS), random.choice((0, 1, 1, 2047, 2048))),)


def _pulse(random: Random, vp: int) -> Program:
    return (Op("pulse", vp, random.choice(SINTS)),)


def _policy(random: Random, vp: int) -> Program:
    bits = random.choice((0, DRAIN | EOM_PENDING, EVENTS, DRAIN | EOM_PENDING | EVENTS))
    return (Op("policy", vp, random.choice(SINTS), bits),)


def _idle(random: Random, vp: int) -> Program:
    return (Op("idle", vp, random.randrange(2)),)


def _hypercall(random: Random, vp: int) -> Program:
    connection = random.choice((TAKEN_MESSAGE_CONNECTION, TAKEN_EVENT_CONNECTION, 0x99, 1 << 24 | 0x51))
    odd = random.choice((0, 0, 0, FAST, 1 << 17, 1 << 27, 1 << 32, 1 << 48, 1 << 61))
    gpa = INPUT + vp * PAGE + random.choice((0, 0, 0, 1, 4))
    if random.random() < 0.5:
        message = Op("post-input", vp, connection, random.choice((0, 1, 2)), random.choice((0, 8, 240, 241)))
        return (message, Op("hypercall", vp, POST | odd, gpa))
    value = connection | random.choice((0, 0, 0, 1 << 32, 1 << 50))
    if random.random() < 0.5:
        return (Op("hypercall", vp, SIGNAL | FAST | odd, value),)
    return (Op("signal-input", vp, value), Op("hypercall", vp, SIGNAL | odd, gpa))


def _hypercall_page(random: Random, vp: int) -> Program:
    if random.random() < 0.5:
        msr, value = tlfs.HV_X64_MSR_GUEST_OS_ID, random.choice((0, GUEST_OS_ID, GUEST_OS_ID))
    else:
        msr, value = tlfs.HV_X64_MSR_HYPERCALL, HYPERCALL_PAGE | random.choice((0, 1, 1))
    reads = (tlfs.HV_X64_MSR_GUEST_OS_ID, tlfs.HV_X64_MSR_HYPERCALL)
    return (Op("wrmsr", vp, msr, value), *(Op("rdmsr", vp, read) for read in reads))


def _memory(random: Random, vp: int) -> Program:
    """A guest's look at where pages may lie; other pages than its own stay alone."""
    return (Op("read", vp, pages(vp) + random.choice((0, PAGE, 0x4000, 0x5000)) + 256 * TIMER_SINT, 8),)


_RESET: Program = (Op("reset"),)
"""Everything goes off; the program then goes on as it began."""


_KINDS: tuple[Callable[[Random, int], Program], ...] = (
    *(_sint, _sint, _page, _page_off, _control, _timer, _timer, _message, _message, _crowd, _crowd),
    *(_take, _take, _take, _eom, _flag, _flag, _pulse, _pulse, _policy, _idle),
    *(_hypercall, _hypercall_page, _memory, lambda _random, _vp: _RESET),
)


def shortened(program: Program, fails: Callable[[Program], bool]) -> Program:
    """A part of `program` that still fails, and that does not fail with any one operation less.

    `fails` runs one. After _TRIES runs the shortest failing one so far is taken.
    """
    tries = 0
    size = len(program) // 2
    while size:
        at = 0
        while at < len(program) and tries < _TRIES:
            shorter = program[:at] + program[at + size :]
            tries += 1
            if fails(shorter):
                program = shorter
            else:
                at += size
        size //= 2
    return program
