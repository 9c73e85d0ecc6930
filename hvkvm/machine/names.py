"""Names for machines that are given none: hvkvm-PID, and hvkvm-PID-2 where one process has two at a time.

A machine's control socket and the MACs of its NICs are made from its name. Two machines that are joined by a
wire are often one process's (a test's, say), so they must not be called the same.
"""

from __future__ import annotations

import itertools
import os
from contextlib import ExitStack

_taken: dict[str, object] = {}
"""The names of this process's machines. A forked child's copy does no harm: its names have its own PID."""


def own_name(stack: ExitStack) -> str:
    """The first name that no machine of this process has, until `stack` unwinds. Any thread."""
    first = f"hvkvm-{os.getpid()}"
    mark = object()
    for number in itertools.count(1):
        name = first if number == 1 else f"{first}-{number}"
        # No lock of ours: one that another thread holds at a fork stays held in the child for ever.
        if _taken.setdefault(name, mark) is mark:
            break
    stack.callback(_taken.pop, name)
    return name
