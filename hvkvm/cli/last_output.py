"""The guest's last output on its way to a reader who takes his time.

The run has ended, yet a pager or a slow log may have taken only a part of what
the guest said. Like any program `hvkvm run` then waits for its reader, unless
somebody wants it to end. Owner: the main thread, when the machine is closed.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING

from hvkvm.backends.console import DRAIN_SECONDS
from hvkvm.machine.outcome import Ending, Outcome

if TYPE_CHECKING:
    from hvkvm.backends.output import Output
    from hvkvm.cli.signals import Signals


def patience(outcome: Outcome, end: float | None) -> float | None:
    """Seconds that a reader gets: few if the run was told to end, else until `end` (None: without limit)."""
    if outcome.ending in (Ending.QUIT, Ending.TIMEOUT):
        return DRAIN_SECONDS
    return None if end is None else max(DRAIN_SECONDS, end - monotonic())


def send_last_output(outputs: Sequence[Output], signals: Signals, seconds: float | None) -> int:
    """Send what still waits, for `seconds` (None: without limit) or until a signal; how many bytes are lost.

    Lost is what was not sent by then, and what there was no room for before; not
    what a reader that went away did not want. The terminal shall be itself again
    before the wait, so that Ctrl-C is a signal. SIGQUIT and SIGWINCH end nothing.
    """
    end = None if seconds is None else monotonic() + seconds
    for output in outputs:
        if not _sent(output, signals, end):
            break
    lost = sum(output.lost + output.waiting for output in outputs)
    for output in outputs:
        output.close()
    return lost


def _sent(output: Output, signals: Signals, end: float | None) -> bool:
    """Whether `output` was sent before `end`, or a signal."""
    while not output.drain(0):
        left = None if end is None else end - monotonic()
        if left is not None and left <= 0:
            return False
        number = signals.wait(output.ready_fd, left)
        if number is not None and number not in (signal.SIGQUIT, signal.SIGWINCH):
            return False
    return True
