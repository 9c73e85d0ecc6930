"""One turn of the I/O loop for all that was asked of a device since its last one.

vCPU threads note what a guest wrote, and ask. A guest that writes as fast as it can so has one turn pending,
and makes no queue of work.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

from hvkvm.errors import Stopped
from hvkvm.runtime.protocols import Deferrer


class Turn:
    """Has `run()` called on the loop, once for however many times it is asked for before that."""

    def __init__(self, io: Deferrer, run: Callable[[], object]) -> None:
        self._io = io
        self._run = run
        self._lock = threading.Lock()
        self._asked = False

    def ask(self) -> None:
        """Have one come, which sees all that was noted before. Any thread."""
        # Without the lock first: who finds that a turn was asked for has noted before it began.
        if self._asked:
            return
        with self._lock:
            if self._asked:
                return
            self._asked = True
        with suppress(Stopped):
            self._io.call_soon(self._begin)

    def _begin(self) -> None:
        self._asked = False
        self._run()
