"""A page of the host's own that shadows guest memory: what SIMP, SIEFP and their like place.

Why: a SynIC page keeps its contents while the guest switches it off, on or
moves it, and guest RAM under it must reappear untouched (S4). So the page lives
in a buffer of its own and is only shown at a gpa.

The SynIC's owner creates and closes. Placing is thread-safe; the bytes behind
`view` and `hva` are shared with a running guest whenever the page is placed.
"""

from __future__ import annotations

import os
import threading
from types import TracebackType

from hvkvm.errors import HvkvmError
from hvkvm.memory.guest import GuestMemory
from hvkvm.memory.mapping import PAGE_SIZE, Mapping, sealed_memfd

GPA_LIMIT = 1 << 64
"""No guest physical address reaches this."""

_ZEROS = bytes(PAGE_SIZE)


class OverlayPage:
    """A private page of 4096 bytes, zeroed once, shown nowhere at first. Raises OSError."""

    def __init__(self, memory: GuestMemory) -> None:
        self._stacks = memory.overlays
        self._lock = threading.Lock()
        self._gpa: int | None = None
        self._closed = False
        self.fd = sealed_memfd("hvkvm-overlay", PAGE_SIZE)
        try:
            self._mapping = Mapping(self.fd, 0, PAGE_SIZE)
        except BaseException:
            os.close(self.fd)
            raise
        self.hva = self._mapping.hva
        """Host address of the page, the same wherever it is shown. Valid until `close()`."""
        self.view = self._mapping.view(0, PAGE_SIZE)
        """The page's bytes; revoked by `close()`."""

    @property
    def gpa(self) -> int | None:
        """Where the guest sees it (or would, under a later overlay); None while it is nowhere."""
        return self._gpa

    def place(self, gpa: int | None) -> bool:
        """Show the page at `gpa`, a multiple of 4096, or nowhere. Its contents stay (S4).

        The gpa it has already: no syscall (S3). A new one: the old is uncovered first.
        True when it is where it was asked to be. False when KVM can have no page
        at `gpa`: it is nowhere then, which is the guest's own doing. Raises
        ValueError for an address that is not a page's, OSError when the host
        fails, HvkvmError when closed.
        """
        with self._lock:
            if self._closed:
                raise HvkvmError("this overlay page is closed")
            if gpa == self._gpa:
                return True
            if gpa is not None and (gpa % PAGE_SIZE or not 0 <= gpa < GPA_LIMIT):
                raise ValueError(f"an overlay page cannot lie at gpa {gpa:#x}")
            self._lift()
            if gpa is None:
                return True
            if self._stacks.lay(self, gpa):
                self._gpa = gpa
            return self._gpa == gpa

    def _lift(self) -> None:
        if self._gpa is not None:
            self._stacks.lift(self, self._gpa)
            self._gpa = None

    def zero(self) -> None:
        """Zero its bytes, as a reset does (S4, S7)."""
        self.view[:] = _ZEROS

    def close(self) -> None:
        """Show it nowhere and free it. Before `GuestMemory.close()`. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                self._lift()
            finally:
                self._mapping.close()
                os.close(self.fd)

    def __enter__(self) -> OverlayPage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
