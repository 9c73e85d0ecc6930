"""What a matrix is made of: cases, each a machine and a command, and what became of each. Plain values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from hvkvm.machine.config import MachineConfig

OK = "ok"
FAILED = "failed"
SKIPPED = "skipped"
TIMEOUT = "timeout"
ERROR = "error"
"""The guest or its host came to no answer: it crashed, or no worker could run it."""
ENDED = "ended"
"""Somebody ended the matrix before the case did."""
VERDICTS = (OK, FAILED, TIMEOUT, ERROR, SKIPPED, ENDED)


class Case(NamedTuple):
    """One guest and the command in it."""

    number: int
    """From 1 on."""
    place: tuple[tuple[str, str], ...]
    """Each axis and the name of the value on it."""
    name: str
    """The command's."""
    config: MachineConfig
    """With the command, and its time limit in `timeout`."""
    status: int
    """The exit status that is right."""
    stdout: str
    """What must stand in its output."""
    group: int = 0
    """Cases of one group may be copies of one warm guest; 0: a boot of its own."""

    @property
    def title(self) -> str:
        """For people: the place and the command."""
        words = [f"{axis}={value}" for axis, value in self.place]
        return " ".join([*words, self.name]) or "the case"


class Result(NamedTuple):
    """What became of a case."""

    verdict: str
    """One of VERDICTS."""
    why: str = ""
    """A line for people; empty where all is well."""
    status: int | None = None
    """The exit status; None where nothing ran."""
    seconds: float = 0.0
    synic: str = ""
    """Who emulated Hyper-V: "kernel", "user", or "" where nobody did."""
    warm: bool = False
    """It was a copy of a warm guest."""
    where: str = ""
    """The worker, of a matrix that runs on several hosts."""
    output: str = ""
    """The end of its standard output."""
    errors: str = ""
    """The end of its standard error."""


def counts(results: Iterable[Result]) -> dict[str, int]:
    """How many of each verdict there are; those that are none are left out."""
    found = Counter(result.verdict for result in results)
    return {verdict: found[verdict] for verdict in VERDICTS if found[verdict]}


def can_be_warm(config: MachineConfig) -> bool:
    """Whether a command of `config` can run in a copy of a guest that was booted for several."""
    stands_on_own: tuple[Any, ...] = (
        config.disks,
        config.cdroms,
        config.nets,
        config.record,
        config.timeline,
        config.firmware,
        config.saved,
        config.vsock,
    )
    return bool(config.command) and config.kernel is not None and not any(stands_on_own)
