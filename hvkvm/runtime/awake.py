"""Waiting so many seconds of this process's own: those in which it was stopped do not count.

SIGSTOP, a debugger or a control group's freezer stop all its threads, and the clock goes on: a limit
for somebody else to answer would be over when they go on, before anybody could.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

PIECE_SECONDS = 1.0
"""The most that one stop can take of a limit."""

OVERSLEPT_SECONDS = 5.0


def overslept(due: float) -> bool:
    """Whether a timer for `due`, a time.monotonic(), is so late that the process was stopped meanwhile."""
    return monotonic() - due > OVERSLEPT_SECONDS


def wait_awake(wait: Callable[[float], bool], seconds: float) -> bool:
    """Whether `wait(timeout)` came true. It is called with a part of `seconds` at a time. Any thread."""
    left = seconds
    while True:
        piece = max(0.0, min(left, PIECE_SECONDS))
        began = monotonic()
        if wait(piece):
            return True
        left -= min(monotonic() - began, piece)
        if left <= 0:
            return False
