"""Programs about registers and hypercalls: every value that may be written and read, right and wrong.

For two VPs; to try another value, add it. Owner: the tests.
"""

from __future__ import annotations

from collections.abc import Iterable

from guest_agent import HYPERCALL_PAGE, SCRATCH
from guest_machine import GUEST_OS_ID, MEMORY
from synic_program import (
    ALL_ONES,
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
    OUTSIDE,
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
    by_name,
    enlightened,
    faults,
    rd,
    timer,
    wr,
)

from hvkvm.abi import tlfs


def _every_register() -> Iterable[Op]:
    """What reads without a fault, at power-on, on both VPs; what nobody has, and what nobody may write."""
    clocks = {
        tlfs.HV_X64_MSR_VP_RUNTIME,
        tlfs.HV_X64_MSR_TIME_REF_COUNT,
        tlfs.HV_X64_MSR_TSC_FREQUENCY,
    }
    groups = ((0, 5), (0x10, 0x12), (0x20, 0x25), (0x70, 0x75), (0x80, 0x86), (0x8F, 0xA1), (0xAF, 0xB9))
    groups += ((0xEF, 0xF8), (0xFE, 0x10A), (0x117, 0x11A), (0x1FF, 0x202), (0x1080, 0x1084))
    for first, last in groups:
        for msr in range(0x40000000 + first, 0x40000000 + last):
            if msr not in clocks:
                yield Op("rdmsr", 0, msr)
    for msr in (tlfs.HV_X64_MSR_VP_INDEX, SCONTROL, SINT + 15, CONFIG, COUNT):
        yield Op("rdmsr", 1, msr)
    yield Op("clock", 0, tlfs.HV_X64_MSR_TIME_REF_COUNT)
    for msr in (*sorted(clocks), tlfs.HV_X64_MSR_APIC_FREQUENCY, tlfs.HV_X64_MSR_SVERSION):
        yield from faults(msr, 0, 1)
    yield from faults(tlfs.HV_X64_MSR_VP_INDEX, 0, 1)
    yield from faults(0x40000004, 0)
    yield from faults(tlfs.HV_X64_MSR_GUEST_IDLE, 0)
    yield from faults(EOM, 0, 1, ALL_ONES)


def _sints() -> Iterable[Op]:
    yield from wr(SINT + 2, 0, 15, 16, 255, 15 | MASKED, MASKED, 16 | AUTO_EOI)
    yield from wr(SINT + 3, 0x1_FF00 | 0x63, ALL_ONES << 19 | 0x63, ALL_ONES & ~0xFF | 0x63)
    yield from wr(SINT + 15, 0x6F, 0x6F | MASKED, 0, 0x6F)
    yield from wr(SINT, 0x60 | AUTO_EOI | MASKED)
    yield from rd(SINT + 15, vp=1)


def _pages() -> Iterable[Op]:
    """SIMP and SIEFP: reserved bits, both on one page, moved, outside RAM, off; contents follow."""
    first, second = SCRATCH, SCRATCH + 0x8000
    yield from (Op("write", 0, first, 8, 0x1111), Op("write", 0, second, 8, 0x2222))
    for msr in (SIMP, SIEFP):
        yield from (*wr(msr, first | 1), Op("read", 0, first, 8), Op("write", 0, first, 8, 0))
        yield from (Op("write", 0, first + 8, 8, 0x3333), *wr(msr, second | 0xFFF))
        yield from (Op("read", 0, first, 8), Op("read", 0, second + 8, 8), *wr(msr, second | 0xFFE))
        yield from (Op("read", 0, second, 8), *wr(msr, second | 1), Op("read", 0, second + 8, 8))
        yield from (*wr(msr, OUTSIDE | 1), Op("read", 0, OUTSIDE + 8, 8), *wr(msr, 0))
        yield from wr(msr, ALL_ONES, 1 << 63, 0, MEMORY | 1, MEMORY - PAGE | 1, 0)
    yield from wr(SCONTROL, 1, ALL_ONES, ALL_ONES - 1, 0)
    yield from (Op("wrmsr", 0, SIMP, first | 1), Op("wrmsr", 0, SIEFP, first | 1), Op("read", 0, first, 8))


def _timer_registers() -> Iterable[Op]:
    """Every mode as it reads back: nothing here expires."""
    for config in (ENABLE, AUTO_ENABLE, 0):
        yield from timer(0, config | 2 << 16)
        yield from timer(0, config | 2 << 16, FAR)
        yield from timer(0, config | 2 << 16, 0)
    yield from (*timer(0, PERIODIC | LAZY | AUTO_ENABLE | 15 << 16, FAR), *timer(0, 0))
    yield from (*timer(1, ENABLE | 2 << 16), *timer(1, 2 << 16, FAR), *timer(1, ENABLE | 2 << 16))
    yield from (*timer(1, ENABLE | 3 << 16), *timer(1, 0, ALL_ONES), *timer(1, 0, 0))
    yield from timer(2, ENABLE | DIRECT | DIRECT_VECTOR << 4, FAR)
    yield from (*timer(2, 0), *timer(2, ALL_ONES & ~0xF), *timer(2, 0))
    # An enabled timer that is told to use SINT 0 is no longer enabled.
    yield from (*timer(3, AUTO_ENABLE | 2 << 16, FAR), *timer(3, ENABLE | AUTO_ENABLE))
    yield from rd(CONFIG, COUNT + 6, vp=1)


def _hypercalls() -> Iterable[Op]:
    """Codes, control words, and both calls' inputs, right and wrong."""
    yield Op("hypercall", 0, POST, INPUT)
    yield from enlightened()
    for vp in (0, 1):
        here = INPUT + vp * PAGE
        yield from (Op("post-input", vp, TAKEN_MESSAGE_CONNECTION, 1, 8), Op("hypercall", vp, POST, here))
        yield from (Op("signal-input", vp, TAKEN_EVENT_CONNECTION), Op("hypercall", vp, SIGNAL, here))
    for connection, size in (
        (0x99, 8),
        (0, 8),
        (TAKEN_MESSAGE_CONNECTION, 0),
        (TAKEN_MESSAGE_CONNECTION, 240),
    ):
        yield from (Op("post-input", 0, connection, 1, size), Op("hypercall", 0, POST, INPUT))
    for connection, kind, size in ((0x51, 1, 241), (0x51, 0, 8), (0x51, 1 << 31, 8), (0xAA00_0051, 1, 8)):
        yield from (Op("post-input", 0, connection, kind, size), Op("hypercall", 0, POST, INPUT))
    yield from (Op("hypercall", 0, POST, INPUT + offset) for offset in (1, 2, 4, 7))
    yield from (Op("hypercall", 0, POST, gpa) for gpa in (OUTSIDE, MEMORY - 0x80, 1 << 63))
    yield from (Op("hypercall", 0, POST | bits, INPUT) for bits in _control_bits())
    for value in (TAKEN_EVENT_CONNECTION, 0x99, 0, 0xFF_FFFF, 1 << 32 | 0x52, 1 << 24 | 0x52, 1 << 48 | 0x52):
        yield Op("hypercall", 0, SIGNAL | FAST, value)
        yield from (Op("signal-input", 0, value), Op("hypercall", 0, SIGNAL, INPUT))
    yield from (Op("hypercall", 0, SIGNAL, gpa) for gpa in (INPUT + 4, INPUT + 1, OUTSIDE, 1 << 63))
    yield from (Op("hypercall", 0, SIGNAL | bits, 0x52) for bits in _control_bits())
    for code in (0, 1, 0x4321, 0x46, 0x50, 0x51, 0x5B, 0x5E, 0x69, 0x7E, 0xFFFF):
        yield from (Op("hypercall", 0, code | bits, INPUT) for bits in (0, FAST, 1 << 27, 1 << 60))


def _control_bits() -> tuple[int, ...]:
    """Fast, variable header, reserved, rep count, reserved, rep start, reserved."""
    return (FAST, 1 << 17, 1 << 27, 1 << 32, 1 << 44, 1 << 48, 1 << 60, FAST | 1 << 33, FAST | 1 << 26)


def _other_hypercalls() -> Iterable[Op]:
    """What KVM answers by itself: TLB flushes, IPIs, long spins, extended calls."""
    yield from enlightened()
    for code in (0x02, 0x03, 0x08, 0x0B, 0x13, 0x14, 0x15):
        yield from (Op("hypercall", 0, code | FAST, 0), Op("hypercall", 0, code | 1 << 60, 0))
    yield Op("hypercall", 0, 0x8001, INPUT)


def _hypercall_page() -> Iterable[Op]:
    msr, os_id = tlfs.HV_X64_MSR_HYPERCALL, tlfs.HV_X64_MSR_GUEST_OS_ID
    other = SCRATCH + 0x30000
    yield from (*wr(msr, HYPERCALL_PAGE | 1, HYPERCALL_PAGE | 2), Op("code", 0, HYPERCALL_PAGE))
    yield from wr(os_id, GUEST_OS_ID, ALL_ONES, 1)
    yield from (*wr(msr, HYPERCALL_PAGE), Op("code", 0, HYPERCALL_PAGE))
    yield from (*wr(msr, HYPERCALL_PAGE | 1), Op("code", 0, HYPERCALL_PAGE), Op("hypercall", 0, 0x4321))
    yield from (*wr(msr, other | 0xFFD), Op("code", 0, other), Op("code", 0, HYPERCALL_PAGE))
    yield from (*wr(msr, OUTSIDE | 1), *wr(msr, other), Op("code", 0, other))
    # A refused address leaves the page where it was.
    yield from (*wr(msr, HYPERCALL_PAGE | 1, 1 << 63 | 1), Op("hypercall", 0, 0x4321))
    yield from (*wr(msr, HYPERCALL_PAGE | 1), *wr(os_id, 0), *rd(msr), Op("code", 0, HYPERCALL_PAGE))
    yield from (*wr(msr, HYPERCALL_PAGE | 1), *enlightened(1), *rd(msr, os_id), Op("hypercall", 0, 0x4321))
    yield from wr(msr, HYPERCALL_PAGE | 3, other | 1, 0)


def _reference_time() -> Iterable[Op]:
    msr = tlfs.HV_X64_MSR_REFERENCE_TSC
    yield from (*wr(msr, SCRATCH | 1), Op("tsc-page", 0, SCRATCH), Op("clock", 0, 0x40000020))
    yield from (*wr(msr, SCRATCH + PAGE | 0xFFF), Op("tsc-page", 0, SCRATCH + PAGE))
    yield from (*wr(msr, SCRATCH + PAGE), *rd(msr, vp=1), *wr(msr, OUTSIDE | 1, 1 << 63 | 1, 0))
    yield from (*wr(msr, SCRATCH | 1, vp=1), Op("clock", 1, 0x40000020), *wr(msr, 0))


def _other_registers() -> Iterable[Op]:
    """The VP assist page, crash, reenlightenment and reset registers, TSC invariant control."""
    assist = tlfs.HV_X64_MSR_VP_ASSIST_PAGE
    yield Op("write", 0, SCRATCH, 8, 0x55AA_55AA_55AA_55AA)
    yield from (*wr(assist, SCRATCH | 1), Op("read", 0, SCRATCH, 8), *rd(assist, vp=1))
    yield from wr(assist, SCRATCH + PAGE | 0xFFF, MEMORY | 1, 1 << 63 | 1, ALL_ONES - 1, 0)
    for msr in range(tlfs.HV_X64_MSR_CRASH_P0, tlfs.HV_X64_MSR_CRASH_P4 + 1):
        yield from (*wr(msr, ALL_ONES - msr), *rd(msr, vp=1))
    yield from wr(tlfs.HV_X64_MSR_CRASH_CTL, 0, 1 << 62, 1)
    yield from wr(tlfs.HV_X64_MSR_REENLIGHTENMENT_CONTROL, 0x1_00EE, 0)
    yield from wr(tlfs.HV_X64_MSR_TSC_EMULATION_CONTROL, 1, 0)
    yield from wr(tlfs.HV_X64_MSR_TSC_EMULATION_STATUS, 1, 0)
    yield from wr(tlfs.HV_X64_MSR_RESET, 0, 2)
    yield from wr(tlfs.HV_X64_MSR_TSC_INVARIANT_CONTROL, 2, 1, 0)


REGISTERS: dict[str, Program] = by_name(
    _every_register,
    _sints,
    _pages,
    _timer_registers,
    _hypercalls,
    _other_hypercalls,
    _hypercall_page,
    _reference_time,
    _other_registers,
)
