"""Memory of the host's that a guest sees beside its RAM, in a memory slot of its own.

Why: what a guest is handed once, and is told of by nobody but its reader, is no
part of its RAM: it is not saved with it, and goes when it was read.

Owner: whoever makes it closes it, when no vCPU runs any more; the rest is any thread's.
"""

from __future__ import annotations

import os

from hvkvm.memory.guest import GuestMemory
from hvkvm.memory.mapping import PAGE_SIZE, Mapping, punch, sealed_memfd


class Window:
    """`size` bytes, rounded up to whole pages, at `gpa`, outside RAM. Raises OSError, KvmIoctlError."""

    def __init__(self, memory: GuestMemory, gpa: int, size: int) -> None:
        self._space = memory.space
        self._size = whole = -(-size // PAGE_SIZE) * PAGE_SIZE
        self._fd = sealed_memfd("hvkvm-window", whole)
        try:
            self._map = Mapping(self._fd, 0, whole)
            self._slot = self._space.show(gpa, whole, self._map.hva)
        except BaseException:
            os.close(self._fd)
            raise

    def write(self, at: int, data: bytes) -> None:
        """Put `data` at byte `at`. ValueError outside."""
        self._map.root[at : at + len(data)] = data

    def empty(self) -> None:
        """Make all of it zero, and give its pages back to the host. Any thread, while it is not closed."""
        punch(self._fd, 0, self._size)

    def close(self) -> None:
        """Take it away from the guest. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        self._space.hide(self._slot)
        self._map.close()
        os.close(fd)
