"""ROM: guest memory that the guest can read and run but not write; a write exits as MMIO.

Owner: the thread that builds the machine makes and closes it. The VMM writes it through `view`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hvkvm.abi.kvm import KVM_MEM_READONLY
from hvkvm.memory.mapping import Mapping, sealed_memfd

if TYPE_CHECKING:
    from hvkvm.memory.guest import GuestMemory


class Rom:
    """`content` (whole pages) at `gpa`, as a memory slot of `memory`'s VM. Raises OSError, KvmIoctlError.

    It is no RAM: devices neither read nor write it.
    """

    def __init__(self, memory: GuestMemory, gpa: int, content: bytes) -> None:
        self.gpa = gpa
        self.size = len(content)
        self._space = memory.space
        self._slot: int | None = None
        self._fd = sealed_memfd("hvkvm-rom", self.size)
        try:
            self._mapping = Mapping(self._fd, 0, self.size)
            self._mapping.root[:] = content
            self.show(shown=True)
        except BaseException:
            os.close(self._fd)
            raise

    def show(self, *, shown: bool) -> None:
        """Have the guest see it, or have every access exit as MMIO. Any thread; KvmIoctlError."""
        if shown and self._slot is None:
            self._slot = self._space.show(self.gpa, self.size, self._mapping.hva, KVM_MEM_READONLY)
        elif not shown and self._slot is not None:
            self._space.hide(self._slot)
            self._slot = None

    def view(self) -> memoryview:
        """Its bytes, to read and to write."""
        return self._mapping.view(0, self.size)

    def close(self) -> None:
        """Unmap it. Every vCPU thread has ended by now. Idempotent."""
        if self._fd >= 0:
            self._mapping.close()
            os.close(self._fd)
            self._fd = -1
