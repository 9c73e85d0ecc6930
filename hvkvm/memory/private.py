"""A file mapped copy-on-write: RAM that starts as somebody else's, and costs only what is written to it.

Why: many guests can be restored from one file at a time, in a time that does not
grow with RAM. A page of the file is read when it is first touched; one that is
written becomes this process's own.

Only `guest` makes these. Threads as for `Mapping`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from mmap import MAP_PRIVATE

from hvkvm.errors import HvkvmError
from hvkvm.memory.mapping import PAGE_SIZE, Mapping, data_stretches

MAX_MOVED = 8192
"""Pages that overlays may cover one after the other: each stays one or two of the 65,530 mappings that Linux
gives a process (vm.max_map_count). The SynIC's pages of 254 VPs take a sixteenth."""

# Of an entry of /proc/self/pagemap: in memory or swapped out, and whether it is the file's own page.
# All three are bits of its last byte, so what is said of a byte here is said of a page.
_ENTRY = 8
_SOMEWHERE = 1 << 7 | 1 << 6
_OF_FILE = 1 << 5
_OWN = bytes(int(bool(last & _SOMEWHERE and not last & _OF_FILE)) for last in range(256))


class NoPageLeft(HvkvmError):
    """An overlay has lain on MAX_MOVED other pages of this RAM before."""


class PrivateMapping(Mapping):
    """`size` bytes of `fd` from `offset`, of which the file never sees a change. Raises OSError.

    The file must keep its size: behind its end is SIGBUS.
    """

    def __init__(self, fd: int, offset: int, size: int, *, align: int = PAGE_SIZE) -> None:
        # Mapping over a private page throws its contents away. So a page that is to be covered moves to a
        # file of our own first, and stays there. A write by another vCPU between the copy and the mapping
        # would be lost, were a guest to place an overlay on a page that another CPU of it is writing.
        self._moved: dict[int, int] = {}
        self._covered: set[int] = set()
        self._moved_fd = -1
        super().__init__(fd, offset, size, align=align)

    def show(self, at: int, size: int, fd: int, offset: int) -> None:
        """See `Mapping.show`; one page at a time. NoPageLeft."""
        if at not in self._covered:
            self._move(at)
        super().show(at, size, fd, offset)
        self._covered.add(at)

    def restore(self, at: int, size: int) -> None:
        """See `Mapping.restore`."""
        if at in self._covered:
            super().show(at, size, self._moved_fd, self._moved[at])
            self._covered.discard(at)
        else:
            self._present(at, size, self.fd, self.offset + at, MAP_PRIVATE)

    def stretches(self) -> Iterator[tuple[int, int]]:
        """See `Mapping.stretches`: what the file has there, and what was written here since."""
        pages = bytearray(self.size // PAGE_SIZE)
        for start, end in data_stretches(self.fd, self.offset, self.size):
            first, last = (start - self.offset) // PAGE_SIZE, -(-(end - self.offset) // PAGE_SIZE)
            pages[first:last] = b"\1" * (last - first)
        for at in self._moved:
            pages[at // PAGE_SIZE] = 1
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(self.hva // PAGE_SIZE * _ENTRY)
            raw = b""
            while len(raw) < len(pages) * _ENTRY and (piece := pagemap.read(len(pages) * _ENTRY - len(raw))):
                raw += piece
        # Without a loop of Python's over the pages, which took longer than to read their entries.
        own = int.from_bytes(raw[_ENTRY - 1 :: _ENTRY].translate(_OWN), "little")
        pages = bytearray((int.from_bytes(pages, "little") | own).to_bytes(len(pages), "little"))
        at = pages.find(1)
        while at >= 0:
            end = pages.find(0, at)
            if end < 0:
                end = len(pages)
            yield at * PAGE_SIZE, end * PAGE_SIZE
            at = pages.find(1, end)

    def under(self, at: int, size: int) -> bytes:
        """See `Mapping.under`."""
        whole = self.read(at, size)
        covered = self._covered.intersection(range(at, at + size, PAGE_SIZE))
        if not covered:
            return whole  # as nearly all are: a megabyte is not copied twice more
        found = bytearray(whole)
        for page in covered:
            found[page - at : page - at + PAGE_SIZE] = os.pread(self._moved_fd, PAGE_SIZE, self._moved[page])
        return bytes(found)

    def _move(self, at: int) -> None:
        if at in self._moved:
            return  # and mapped from there, since it was last uncovered
        if len(self._moved) >= MAX_MOVED:
            raise NoPageLeft(f"overlays have lain on {MAX_MOVED} pages of a restored guest's RAM")
        if self._moved_fd < 0:
            self._moved_fd = os.memfd_create("hvkvm-ram-moved", os.MFD_CLOEXEC)
        place = len(self._moved) * PAGE_SIZE
        os.pwrite(self._moved_fd, self.read(at, PAGE_SIZE), place)
        self._moved[at] = place

    def close(self) -> None:
        """See `Mapping.close`."""
        super().close()
        fd, self._moved_fd = self._moved_fd, -1
        if fd >= 0:
            os.close(fd)
