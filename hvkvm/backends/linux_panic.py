"""Tells a Linux kernel's panic on the console from text that quotes one.

Whoever reads a log of another machine prints "Kernel panic - not syncing", too,
and goes on living. A kernel in its panic writes nothing but its own report from
there on, so what follows decides:

- the report's next lines: the CPU that panicked, the kernel's offset, when it
  reboots, the end; all with the kernel's time in front, or all without;
- nothing else behind them. A kernel that still lives says so when it restarts
  ("reboot: ...", "sysrq: ..."), and others print as well;
- and if the kernel stands still instead of being reset, it has said that it will.

Source: panic() in Linux's kernel/panic.c, as of 4.19 to 7.x. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from hvkvm.tuples import NamedTuple

MARK = "Kernel panic - not syncing: "

# "[    1.234567] ", and the caller behind it where CONFIG_PRINTK_CALLER is set. A line of the kernel may come
# behind a prompt or half a line of somebody else.
_TIME = re.compile(r"\[ *\d+\.\d{6}\](?:\[ *[TC]\d+\])? ")
_TIMED_MARK = re.compile(_TIME.pattern + MARK)
_REPORT = re.compile(
    r"(?:CPU: \d+ (?:UID: \d+ )?PID: \d+ Comm: |Kernel Offset: "
    r"|Rebooting in \d+ seconds|---\[ end Kernel panic)"
)
_LAST = re.compile(r"(?:Rebooting in \d+ seconds|---\[ end Kernel panic - not syncing: )")
_END_OF_TRACE = "</TASK>"
_ALIVE = re.compile(r"(?:reboot|sysrq): ")


class Report(NamedTuple):
    """A panic's `message`, and what the kernel wrote `behind` it; `timed` if with its time in front.

    Lines that others wrote there are empty texts in a report with times, and not
    told from the kernel's in one without.
    """

    message: str
    behind: list[str]
    timed: bool


def last_report(lines: Sequence[str]) -> Report | None:
    """What has a panic's form in `lines` of console output; the last one. None for none."""
    for at in range(len(lines) - 1, -1, -1):
        line = lines[at]
        where = line.find(MARK)
        if where < 0 or "---[ end " in line:
            continue
        timed = _TIMED_MARK.search(line) is not None
        if where and not timed:
            return None  # somebody's words about a panic
        behind = [_text(text, timed=timed) for text in lines[at + 1 :] if text.strip()]
        return Report(line[where:].strip(), behind, timed)
    return None


def _text(line: str, *, timed: bool) -> str:
    if not timed:
        return line.strip()
    found = _TIME.search(line)
    return "" if found is None else line[found.end() :].strip()


def panic(lines: Sequence[str], *, hung: bool = False) -> str | None:
    """The message of the panic that `lines` of console output end in, or None.

    `hung`: the kernel stands still; else it has reset the machine.
    """
    report = last_report(lines)
    if report is None:
        return None
    behind = report.behind
    if not behind:
        # After an oops early in a boot nothing more is said. Linux that lives says more before it resets.
        return report.message if report.timed and not hung else None
    if not any(map(_REPORT.match, behind)) or any(map(_ALIVE.match, behind)):
        return None
    last = behind[-1]
    if _LAST.match(last):
        return report.message
    if hung or not last:
        return None
    return report.message if report.timed or _REPORT.match(last) or last == _END_OF_TRACE else None
