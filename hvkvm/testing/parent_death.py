"""A child process that gets a signal when whoever started it is gone, killed even.

It has a session of its own, so no terminal tells it. What it has started in turn is its own to end.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from signal import Signals

PR_SET_PDEATHSIG = 1


def signal_at_parents_death(number: Signals) -> Callable[[], None]:
    """For the child to call before its exec (`preexec_fn`): a system call or two, and no thread's lock.

    To Linux the parent is the thread that forks: it has to wait for the child.
    """
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os._exit(1)

    return ask
