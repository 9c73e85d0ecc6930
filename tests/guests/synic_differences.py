"""What a guest can tell KVM's SynIC from ours by: each with the very steps of `synic_programs` that show it.

docs/compatibility.md gives each its reason, under the same name. To add one,
add a row here and there. Owner: the tests.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from synic_program import Step

ANY = "*"
"""An outcome that depends on the host."""


class Difference(NamedTuple):
    """`steps` maps a step of `program` to what it gives on KVM's SynIC and on ours."""

    name: str
    program: str
    steps: Mapping[str, tuple[str, str]]
    until: tuple[int, int] = (1000, 0)
    """The host kernel that has it no more."""

    @property
    def applies(self) -> bool:
        """Whether this host's kernel still has it."""
        return _kernel() < self.until


def _kernel() -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def expected_of(program: str) -> dict[str, tuple[str, str]]:
    """Every listed step of `program` on this host's kernel, with both outcomes."""
    rows = (row for row in DIFFERENCES if row.program == program and row.applies)
    return {step: outcomes for row in rows for step, outcomes in row.steps.items()}


def compare(program: str, kernel: Sequence[Step], user: Sequence[Step]) -> list[str]:
    """A line for each step that differs and is not listed so, and for each listed one that does not."""
    listed = expected_of(program)
    lines = []
    for ours, theirs in zip(user, kernel, strict=True):
        found = (theirs.outcome, ours.outcome)
        expected = listed.get(ours.name)
        if expected is None:
            if found[0] != found[1]:
                lines.append(f"{ours.name}\n    kernel: {found[0]}\n    user:   {found[1]}")
        elif found[0] == found[1]:
            lines.append(f"{ours.name}\n    no longer differs: {found[0]}")
        elif any(want not in (ANY, got) for want, got in zip(expected, found, strict=True)):
            lines.append(f"{ours.name}\n    listed as {expected}\n    but found {found}")
    return lines


_NOTIFY, _BOTH_FORMS = "0x8000000000000000", "0xc000000000000000"
_TIMER = "type 0x80000010 size 24 flags 0x0 timer"
_SENT = "vp0 slot2: type 0x101 size 8 flags 0x0 payload [1]; vp0 sint2 sent +1"

DIFFERENCES = (
    Difference(
        "apic-msrs", "every-register", {"vp0 rdmsr ICR": (ANY, "#GP"), "vp0 rdmsr TPR": ("0x0", "#GP")}
    ),
    Difference("crash-message", "every-register", {"vp0 rdmsr CRASH_CTL": (_NOTIFY, _BOTH_FORMS)}),
    Difference(
        "crash-message",
        "other-registers",
        {
            "vp0 rdmsr CRASH_CTL": (_NOTIFY, _BOTH_FORMS),
            "vp0 rdmsr CRASH_CTL (2)": (_NOTIFY, _BOTH_FORMS),
            "vp0 rdmsr CRASH_CTL (3)": (_NOTIFY, _BOTH_FORMS),
        },
    ),
    Difference("crash-message", "reset", {"vp0 rdmsr CRASH_CTL": (_NOTIFY, _BOTH_FORMS)}),
    Difference(
        "tsc-invariant", "every-register", {"vp0 rdmsr TSC_INVARIANT_CONTROL": ("#GP", "0x0")}, until=(6, 2)
    ),
    Difference(
        "tsc-invariant",
        "other-registers",
        {
            "vp0 rdmsr TSC_INVARIANT_CONTROL": ("#GP", "0x0"),
            "vp0 wrmsr TSC_INVARIANT_CONTROL 0x1": ("#GP", "ok"),
            "vp0 rdmsr TSC_INVARIANT_CONTROL (2)": ("#GP", "0x1"),
            "vp0 rdmsr TSC_INVARIANT_CONTROL (3)": ("#GP", "0x1"),
        },
        until=(6, 2),
    ),
    Difference("hypercall-codes", "hypercalls", {"vp0 hypercall 0x10069 0x1040000": ("0x5", "0x2")}),
    Difference(
        "hypercall-codes",
        "other-hypercalls",
        {
            "vp0 hypercall 0x10002": ("0x0", "0x2"),
            "vp0 hypercall 0x10003": ("0x3", "0x2"),
            "vp0 hypercall 0x10008": ("0x0", "0x2"),
            "vp0 hypercall 0x1000b": ("0x3", "0x2"),
            "vp0 hypercall 0x10013": ("0x0", "0x2"),
            "vp0 hypercall 0x10014": ("0x3", "0x2"),
            "vp0 hypercall 0x10015": ("0x0", "0x2"),
        },
    ),
    Difference(
        "hypercall-page",
        "hypercall-page",
        {
            "vp0 code 0xe80000 (4)": ("code", "zero"),
            "vp0 wrmsr HYPERCALL 0x90000001": ("#GP", "ok"),
            "vp0 rdmsr HYPERCALL (6)": ("0x1030ffd", "0x90000001"),
            "vp0 code 0x1030000 (2)": ("code", "zero"),
            "vp0 code 0xe80000 (5)": ("code", "zero"),
        },
    ),
    Difference(
        "hypercall-lock",
        "hypercall-page",
        {
            "vp0 rdmsr HYPERCALL (15)": ("0x1030001", "0xe80003"),
            "vp0 rdmsr HYPERCALL (16)": ("0x0", "0xe80003"),
        },
    ),
    Difference(
        "polled-sint",
        "beyond-the-rules",
        {
            "vp0 pulse 0x2": ("0; vp0 sint2 interrupts +1", "0"),
            "vp0 send 0x2 0x1 0x8": (
                f"queued; vp0 sint2 interrupts +1; {_SENT}",
                f"queued; {_SENT}",
            ),
            "vp0 wrmsr SINT2 0x40005": ("#GP", "ok"),
            "vp0 rdmsr SINT2 (2)": ("0x40062", "0x40005"),
        },
    ),
    Difference(
        "timer-sint-0",
        "beyond-the-rules",
        {
            "vp0 rdmsr STIMER0_CONFIG": ("0x1", "0x0"),
            "vp0 wrmsr STIMER0_COUNT 0x1": (f"ok; vp0 slot0: {_TIMER} 0 0 due 1", "ok"),
            "vp0 drain": (
                "type 0x80000010 flags 0x0; vp0 sint0 timer messages +1; vp0 slot0: empty",
                "type 0x0 flags 0x0",
            ),
        },
    ),
    Difference(
        "timer-masked-sint",
        "beyond-the-rules",
        {
            "vp0 rdmsr STIMER0_CONFIG (3)": ("0x9", "0x8"),
            "vp0 rdmsr STIMER1_CONFIG": ("0x50009", "0x50008"),
            "vp0 wrmsr EOM 0x0": (f"ok; vp0 slot5: {_TIMER} 1 0 due 3", "ok"),
            "vp0 drain 0x5 (2)": (
                "type 0x80000010 flags 0x0; vp0 sint5 timer messages +1; vp0 slot5: empty",
                "type 0x0 flags 0x0",
            ),
        },
    ),
    Difference(
        "timer-masked-sint",
        "beyond-the-rules",
        {
            "vp0 untaken 0x3 0x5000a": (
                "type 0x80000010 flags 0x0, then type 0x0 flags 0x0",
                "type 0x80000010 flags 0x1, then type 0x80000010 flags 0x1",
            ),
        },
    ),
    Difference(
        "periodic-tick",
        "beyond-the-rules",
        {
            f"vp0 untaken 0x3 {config}": (
                "type 0x80000010 flags 0x0, then type 0x80000010 flags 0x0",
                "type 0x80000010 flags 0x1, then type 0x80000010 flags 0x1",
            )
            for config in ("0x5000a (2)", "0x5000e")
        },
    ),
    Difference(
        "tsc-page",
        "reference-time",
        {
            "vp0 wrmsr REFERENCE_TSC 0x8000000000000001": ("ok", "#GP"),
            "vp0 rdmsr REFERENCE_TSC (5)": ("0x8000000000000001", "0x90000001"),
        },
    ),
    Difference(
        "eoi-is-eom",
        "beyond-the-rules",
        {
            "vp0 pulse 0x5": (
                f"0; vp0 sint5 interrupts +2; vp0 slot5: {_TIMER} 2 0 due 4",
                "0; vp0 sint5 interrupts +1",
            ),
            "vp0 drain 0x5 (4)": (
                "type 0x80000010 flags 0x0; vp0 sint5 timer messages +1; vp0 slot5: empty",
                "type 0x0 flags 0x0",
            ),
            "vp0 wrmsr EOM 0x0 (2)": (
                "ok",
                f"ok; vp0 sint5 interrupts +1; vp0 slot5: {_TIMER} 2 0 due 4",
            ),
        },
    ),
)
