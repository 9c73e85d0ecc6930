"""Metadata of a VHDX file in memory: 4 KiB pages, loaded when asked for, changed here, logged by a flush.

A page that was changed stays until it is in its place in the file; others are forgotten, oldest first, when
there are many, so a disk of 64 TiB does not fill the host's memory.

A page is bytes, which never change: any thread may read it, and who changes one puts another in its place,
with `lock` held since it was read. A view of a page would not do: slices of one memoryview are counted in
one place, and without a GIL threads lose some of that count.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from hvkvm.block.vhdx.layout import SECTOR
from hvkvm.block.vhdx.patched import Source

MAX_PAGES = 16384


class Pages:
    """The pages of `source` by file offset. `check(offset, page)` sees each that is loaded, and may raise.

    `turn(offset)` says when a changed page is logged: those with the least first.
    """

    def __init__(
        self, source: Source, check: Callable[[int, bytes], None], turn: Callable[[int], tuple[int, int]]
    ) -> None:
        self.source = source
        self.lock = threading.RLock()
        self._check = check
        self._turn = turn
        self._pages: dict[int, bytes] = {}
        self._dirty: set[int] = set()
        self._settling: set[int] = set()

    def get(self, offset: int) -> bytes:
        """The page at file offset `offset`. OSError, ImageDamaged."""
        page = self._pages.get(offset)
        return page if page is not None else self._load(offset)

    def peek(self, offset: int) -> bytes | None:
        """The page, if it is in memory."""
        return self._pages.get(offset)

    def change(self, offset: int, at: int, data: bytes) -> None:
        """Put `data` at byte `at` of the page. With `lock` held. OSError, ImageDamaged."""
        page = self.get(offset)
        self._pages[offset] = b"".join((page[:at], data, page[at + len(data) :]))
        self._dirty.add(offset)

    @property
    def clean(self) -> bool:
        """Whether all that was changed is in the log at least, stable."""
        with self.lock:  # a flush that fails moves pages from the one to the other
            return not self._dirty and not self._settling

    def take_dirty(self) -> list[tuple[int, bytes]]:
        """What was changed since the last time, to be logged and put in place so ordered; then `settled`."""
        with self.lock:
            taken = sorted(self._dirty, key=self._turn)
            self._settling.update(taken)
            self._dirty.clear()
            return [(offset, self._pages[offset]) for offset in taken]

    def settled(self, taken: list[tuple[int, bytes]], *, failed: bool = False) -> None:
        """What `take_dirty` gave is in its place, or it could not be put there."""
        with self.lock:
            offsets = {offset for offset, _data in taken}
            if failed:
                self._dirty |= offsets
            self._settling -= offsets

    def _load(self, offset: int) -> bytes:
        with self.lock:
            page = self._pages.get(offset)
            if page is not None:
                return page
            if len(self._pages) >= MAX_PAGES:
                self._forget()
            page = self.source.pread(offset, SECTOR).ljust(SECTOR, b"\0")
            self._check(offset, page)
            self._pages[offset] = page
            return page

    def _forget(self) -> None:
        kept = self._dirty | self._settling
        clean = [offset for offset in self._pages if offset not in kept]
        for offset in clean[: MAX_PAGES // 4]:
            del self._pages[offset]
