"""Whole lives of a machine, each with another call of the host refused: what may come of that, and what not.

A life is built, used and closed. It goes on, or ends under a name; then nothing of it is left.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Protocol

from guest_agent import GuestStuckError
from guest_machine import Guest
from host_failures import ERRNOS, HostFailures
from open_files import newly_open, open_files

from hvkvm.errors import HvkvmError

SECONDS = 30.0
SOAK = "HVKVM_SOAK" in os.environ
LIMIT = 0 if SOAK else 400
"""Of the test, in seconds."""


class Life(Protocol):
    """One machine's: `live` builds and uses it, `close` ends it wherever it has come to."""

    guest: Guest | None

    def live(self) -> None: ...

    def close(self) -> None: ...


def one_life(life: Life, failures: HostFailures, at: int, number: int) -> tuple[str | None, str]:
    """What failed, if it came so far; and what became of it."""
    failures.fail(at, number)
    what = "went on"
    try:
        try:
            life.live()
        finally:
            life.close()
    except HvkvmError as error:
        what = f"{type(error).__name__}: {error}"
    except (GuestStuckError, OSError) as error:
        machine = life.guest.machine if life.guest is not None else None
        outcome = None if machine is None else machine.outcome
        what = f"ended: {outcome}"
        named = (number and os.strerror(number) in what) or "can't start new thread" in what
        assert named, f"{failures.failed}: {what}: {error!r}"
    return failures.failed, what


def nth_calls() -> Iterator[tuple[int, int]]:
    """Which call fails, and with what, until none does: all of them in a soak, else some of them."""
    if SOAK:
        return ((at, number) for at in count(1) for number in ERRNOS)
    return ((at, ERRNOS[at % len(ERRNOS)]) for at in count(1, 3))


def check_each_call(
    make: Callable[[], Life], folder: Path, failures: HostFailures, uncaught: list[str]
) -> set[str]:
    """Have each call fail in a life of its own, which leaves nothing in `folder`; the names of the calls."""
    one_life(make(), failures, 0, 0)  # imports what is to be imported
    files, threads = open_files(), set(threading.enumerate())
    faults: list[str] = []
    seen: set[str] = set()
    for at, number in nth_calls():
        try:
            failed, what = one_life(make(), failures, at, number)
        except Exception as error:
            failed, what = failures.failed, repr(error)
            faults.append(f"{failed}: {what}")
        gc.collect()
        left = newly_open(files)
        more = {thread.name for thread in set(threading.enumerate()) - threads}
        names = os.listdir(folder)
        if left or more or uncaught or names:
            faults.append(f"{failed}: {what}: left {left} {more} {names}, uncaught {uncaught}")
        if failed is None:
            break
        seen.add(failed.partition(":")[0])
    assert not faults, "\n".join(faults)
    return seen
