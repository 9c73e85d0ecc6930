"""A sequence of guest operations as plain values: what two SynICs are compared by.

`synic_recorder` runs a program and gives a `Step` for each operation,
`synic_programs` has them by subject, `synic_random` makes them up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from guest_agent import HYPERCALL_PAGE, SCRATCH, SINT_VECTOR, SINTS
from guest_machine import GUEST_OS_ID

from hvkvm.abi import tlfs

PAGE = 0x1000
INPUT = SCRATCH + 0x40000
"""Where hypercall inputs are written, one page for each VP."""
OUTSIDE = 0x9000_0000
"""Where there is no RAM, and the guest's page tables still reach."""
TAKEN_MESSAGE_CONNECTION, TAKEN_EVENT_CONNECTION = 0x51, 0x52
"""Connection ids that the host answers for; every other one is unknown."""

MSR_NAMES = {
    value: name.removeprefix("HV_X64_MSR_")
    for name, value in vars(tlfs).items()
    if name.startswith("HV_X64_MSR_") and isinstance(value, int) and value >= tlfs.HV_X64_MSR_FIRST
    if value < tlfs.HV_X64_MSR_FIRST + tlfs.HV_X64_MSR_COUNT and not name.endswith("_FIRST")
}
MSR_NAMES |= {tlfs.HV_X64_MSR_SINT0 + sint: f"SINT{sint}" for sint in range(SINTS)}
MSR_NAMES |= {
    tlfs.HV_X64_MSR_STIMER0_CONFIG + n: f"STIMER{n // 2}_{'COUNT' if n & 1 else 'CONFIG'}" for n in range(8)
}

SINT = tlfs.HV_X64_MSR_SINT0
SIMP, SIEFP, SCONTROL, EOM = (
    tlfs.HV_X64_MSR_SIMP,
    tlfs.HV_X64_MSR_SIEFP,
    tlfs.HV_X64_MSR_SCONTROL,
    tlfs.HV_X64_MSR_EOM,
)


class Op(NamedTuple):
    """One operation of VP `vp`, or of the host towards it; what `a` to `c` mean is up to the verb."""

    verb: str
    vp: int = 0
    a: int = 0
    b: int = 0
    c: int = 0

    def __str__(self) -> str:
        if self.verb in ("rdmsr", "wrmsr"):
            name = MSR_NAMES.get(self.a, f"{self.a:#x}")
            return f"vp{self.vp} {self.verb} {name}" + (f" {self.b:#x}" if self.verb == "wrmsr" else "")
        words = [f"vp{self.vp}", self.verb, *(f"{value:#x}" for value in self[2:])]
        while len(words) > 2 and words[-1] == "0x0":
            words.pop()
        return " ".join(words)


class Step(NamedTuple):
    """What an operation did: `name` is unique within its program."""

    name: str
    outcome: str


Program = tuple[Op, ...]


def named(program: Program) -> list[str]:
    """A name for every operation: its text, numbered where the same text comes again."""
    seen: dict[str, int] = {}
    names = []
    for op in program:
        text = str(op)
        seen[text] = seen.get(text, 0) + 1
        names.append(text if seen[text] == 1 else f"{text} ({seen[text]})")
    return names


def by_name(*subjects: Callable[[], Iterable[Op]]) -> dict[str, Program]:
    """The program of each function, under the function's name: `_other_registers` makes other-registers."""
    return {subject.__name__.strip("_").replace("_", "-"): tuple(subject()) for subject in subjects}


def readable(program: Iterable[Op]) -> str:
    """A program as lines."""
    return "\n".join(f"  {op}" for op in program)


# --- words that programs are made of -----------------------------------------------------------------

MASKED, AUTO_EOI, POLLING = 1 << 16, 1 << 17, 1 << 18
ENABLE, PERIODIC, LAZY, AUTO_ENABLE, DIRECT = 1, 2, 4, 8, 1 << 12
CONFIG, COUNT = tlfs.HV_X64_MSR_STIMER0_CONFIG, tlfs.HV_X64_MSR_STIMER0_COUNT
DIRECT_VECTOR = 0x50
FAR = 1 << 60
MS = 10_000
POST, SIGNAL, FAST = tlfs.HVCALL_POST_MESSAGE, tlfs.HVCALL_SIGNAL_EVENT, 1 << 16
ALL_ONES = (1 << 64) - 1


def rd(*msrs: int, vp: int = 0) -> Program:
    """Read each."""
    return tuple(Op("rdmsr", vp, msr) for msr in msrs)


def wr(msr: int, *values: int, vp: int = 0) -> Program:
    """Write each value, reading it back."""
    return tuple(
        op for value in values for op in (Op("wrmsr", vp, msr, value & ALL_ONES), Op("rdmsr", vp, msr))
    )


def faults(msr: int, *values: int, vp: int = 0) -> Program:
    """Write each value to a register whose reading tells nothing."""
    return tuple(Op("wrmsr", vp, msr, value) for value in values)


def on(*sints: int, vp: int = 0, bits: int = 0) -> Program:
    """Both pages, SCONTROL, and the SINTs at their own vectors."""
    page = pages(vp)
    registers = [(SIMP, page | 1), (SIEFP, page + PAGE | 1), (SCONTROL, 1)]
    registers += [(SINT + sint, SINT_VECTOR + sint | bits) for sint in sints]
    return tuple(Op("wrmsr", vp, msr, value) for msr, value in registers)


def pages(vp: int) -> int:
    """Where VP `vp` puts its message page; the event flags page follows."""
    return SCRATCH + vp * 0x10000


def timer(number: int, config: int, count: int | None = None, vp: int = 0) -> Program:
    """CONFIG, then COUNT, then both again as they read."""
    ops = [Op("wrmsr", vp, CONFIG + 2 * number, config)]
    if count is not None:
        ops.append(Op("wrmsr", vp, COUNT + 2 * number, count))
    return (*ops, *rd(CONFIG + 2 * number, COUNT + 2 * number, vp=vp))


def enlightened(vp: int = 0) -> Program:
    """A guest OS id and the hypercall page."""
    return (
        Op("wrmsr", vp, tlfs.HV_X64_MSR_GUEST_OS_ID, GUEST_OS_ID),
        Op("wrmsr", vp, tlfs.HV_X64_MSR_HYPERCALL, HYPERCALL_PAGE | 1),
    )
