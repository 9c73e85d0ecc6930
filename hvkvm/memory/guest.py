"""Guest RAM: what the VMM reads, writes and maps of it.

RAM is one memfd. Its first 3 GiB lie at gpa 0, the rest at 4 GiB, so that the
MMIO hole below 4 GiB stays free; each part is one KVM memory slot.

The main thread creates and closes. Any thread may access: an access is checked
against the RAM regions, a guest-chosen address outside them raises
GuestMemoryError and nothing else. Addresses (`gpa`) and sizes are bytes.

A page overlay replaces the mapping under a page, so everything here sees what
the guest sees there: the overlay.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from types import TracebackType

from hvkvm.abi.board import RAM_HIGH_BASE, RAM_LOW_LIMIT
from hvkvm.errors import GuestMemoryError
from hvkvm.memory.address_space import AddressSpace, SlotOwner
from hvkvm.memory.mapping import PAGE_SIZE, Mapping, punch, sealed_memfd
from hvkvm.memory.overlay_stacks import OverlayStacks
from hvkvm.memory.private import PrivateMapping
from hvkvm.tuples import NamedTuple

# The GIL stays held: `close()` on another thread cannot unmap the target halfway. Without a GIL the order of
# closing alone sees to that: who may write has ended before.
_memset = ctypes.PyDLL(None).memset
_memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
_memset.restype = None

_PIECE = 1 << 20

HUGE_PAGE_SIZE = 2 << 20
"""Alignment of RAM's host addresses: gpa and hva agree modulo this, so huge pages can back both."""


class RamRegion(NamedTuple):
    """One contiguous piece of RAM, and where it lies in this process."""

    gpa: int
    size: int
    hva: int
    slot: int

    @property
    def end(self) -> int:
        """The gpa after its last byte."""
        return self.gpa + self.size


class RamSource(NamedTuple):
    """A file that has RAM's first contents, from `offset` (a multiple of 4096) on. Left open while mapped."""

    fd: int
    offset: int


class GuestMemory:
    """`size` bytes of RAM, zeroed or as in `source`, registered with `vm`.

    `size` is a positive multiple of 4096 (ValueError). Raises OSError when the
    kernel has no memory to map, KvmIoctlError when KVM refuses a slot.
    """

    def __init__(self, vm: SlotOwner, size: int, source: RamSource | None = None) -> None:
        if size <= 0 or size % PAGE_SIZE:
            raise ValueError(f"guest RAM of {size} bytes: not a positive multiple of {PAGE_SIZE}")
        self.size = size
        self.space = AddressSpace(vm)
        self._low_end = self._high_end = 0
        self._maps: list[Mapping] = []
        regions = []
        self.fd = sealed_memfd("hvkvm-ram", size) if source is None else -1
        """The memfd: file offset 0 is gpa 0, offset RAM_LOW_LIMIT is gpa RAM_HIGH_BASE. -1 with a source."""
        try:
            low = min(size, RAM_LOW_LIMIT)
            for gpa, offset, length in ((0, 0, low), (RAM_HIGH_BASE, low, size - low)):
                if not length:
                    continue
                if source is None:
                    mapping = Mapping(self.fd, offset, length, align=HUGE_PAGE_SIZE)
                    mapping.prefer_huge_pages()
                else:
                    mapping = PrivateMapping(source.fd, source.offset + offset, length, align=HUGE_PAGE_SIZE)
                self._maps.append(mapping)
                slot = self.space.show(gpa, length, mapping.hva)
                regions.append(RamRegion(gpa, length, mapping.hva, slot))
        except BaseException:
            self.close()
            raise
        self.regions = tuple(regions)
        self._low_end = low
        self._high_end = RAM_HIGH_BASE + size - low if size > low else 0
        self.overlays = OverlayStacks(self.space, self)
        """Which overlay pages lie where; `OverlayPage` alone uses it."""

    def _locate(self, gpa: int, n: int) -> tuple[Mapping, int]:
        """The mapping that holds all of [gpa, gpa+n), and gpa's offset in it."""
        if gpa >= 0 and n >= 0:
            end = gpa + n
            if end <= self._low_end:
                return self._maps[0], gpa
            if gpa >= RAM_HIGH_BASE and end <= self._high_end:
                return self._maps[1], gpa - RAM_HIGH_BASE
        raise GuestMemoryError(gpa, n)

    def contains(self, gpa: int, n: int) -> bool:
        """Whether all of [gpa, gpa+n) is RAM. Never raises: for guest-chosen ranges."""
        if gpa < 0 or n < 0:
            return False
        end = gpa + n
        return end <= self._low_end or (gpa >= RAM_HIGH_BASE and end <= self._high_end)

    def hva(self, gpa: int, n: int) -> int:
        """The host address of [gpa, gpa+n), valid until `close()`; for `atomics`. GuestMemoryError."""
        mapping, at = self._locate(gpa, n)
        return mapping.hva + at

    def view(self, gpa: int, n: int) -> memoryview:
        """A writable zero-copy view, which `close()` revokes. GuestMemoryError."""
        mapping, at = self._locate(gpa, n)
        return mapping.view(at, n)

    def read(self, gpa: int, n: int) -> bytes:
        """A copy of `n` bytes. GuestMemoryError. Not atomic against a running guest beyond one byte."""
        mapping, at = self._locate(gpa, n)
        return mapping.read(at, n)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Write all bytes of `data`. GuestMemoryError, and then nothing was written."""
        source = data if type(data) is bytes else memoryview(data).cast("B")
        n = len(source)
        mapping, at = self._locate(gpa, n)
        mapping.root[at : at + n] = source

    def fill(self, gpa: int, n: int, fd: int, offset: int) -> int:
        """Copy up to `n` bytes at `offset` of the file `fd` to RAM; how many it were, 0 at the file's end.

        File to file inside the kernel: no page of RAM is mapped here for it, nor
        cleared first, which halves the time a kernel image takes. Goes to RAM
        itself, under any overlay. For loaders: one thread at a time.
        GuestMemoryError; OSError where the file system cannot do that.
        """
        mapping, at = self._locate(gpa, n)
        if self.fd < 0:
            return os.preadv(fd, [mapping.view(at, n)], offset)
        os.lseek(self.fd, mapping.offset + at, os.SEEK_SET)
        return os.sendfile(self.fd, fd, offset, n)

    def clear(self, gpa: int, n: int) -> None:
        """Make `n` bytes of RAM zero, giving whole pages back to the host: free where nobody wrote.

        For loaders, like `fill`: RAM itself, under any overlay. GuestMemoryError.
        """
        mapping, at = self._locate(gpa, n)
        first, last = -(-at // PAGE_SIZE) * PAGE_SIZE, (at + n) // PAGE_SIZE * PAGE_SIZE
        if first < last and self.fd >= 0 and punch(self.fd, mapping.offset + first, last - first):
            _memset(mapping.hva + at, 0, first - at)
            _memset(mapping.hva + last, 0, at + n - last)
        else:
            _memset(mapping.hva + at, 0, n)

    def zero(self, gpa: int, n: int) -> None:
        """Fill `n` bytes with zeros. GuestMemoryError."""
        mapping, at = self._locate(gpa, n)
        _memset(mapping.hva + at, 0, n)

    def read_u32(self, gpa: int) -> int:
        """A little-endian 4-byte word; one load if `gpa` is a multiple of 4. GuestMemoryError."""
        mapping, at = self._locate(gpa, 4)
        if at & 3:
            return int.from_bytes(mapping.read(at, 4), "little")
        return mapping.words4[at >> 2]

    def read_u64(self, gpa: int) -> int:
        """A little-endian 8-byte word; one load if `gpa` is a multiple of 8. GuestMemoryError."""
        mapping, at = self._locate(gpa, 8)
        if at & 7:
            return int.from_bytes(mapping.read(at, 8), "little")
        return mapping.words8[at >> 3]

    def write_u32(self, gpa: int, value: int) -> None:
        """Write a little-endian 4-byte word; one store if `gpa` is a multiple of 4. GuestMemoryError."""
        mapping, at = self._locate(gpa, 4)
        if at & 3:
            mapping.root[at : at + 4] = value.to_bytes(4, "little")
        else:
            mapping.words4[at >> 2] = value

    def write_u64(self, gpa: int, value: int) -> None:
        """Write a little-endian 8-byte word; one store if `gpa` is a multiple of 8. GuestMemoryError."""
        mapping, at = self._locate(gpa, 8)
        if at & 7:
            mapping.root[at : at + 8] = value.to_bytes(8, "little")
        else:
            mapping.words8[at >> 3] = value

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        """RAM under any overlay, for saving: what may not be zero, as (offset, bytes), in order.

        Offsets count RAM's bytes without the hole below 4 GiB; pieces are whole pages,
        of at most 1 MiB. While no vCPU runs, for a copy of one moment. OSError; GuestMemoryError once closed.
        """
        if self._low_end < 0:
            raise GuestMemoryError(0, self.size)
        base = 0
        for mapping in self._maps:
            for start, end in mapping.stretches():
                for at in range(start, end, _PIECE):
                    yield base + at, mapping.under(at, min(_PIECE, end - at))
            base += mapping.size

    def show_page(self, gpa: int, fd: int) -> None:
        """Present the first page of `fd` at the RAM page `gpa`; for overlays.

        GuestMemoryError, OSError; NoPageLeft in a restored guest.
        """
        mapping, at = self._locate(gpa, PAGE_SIZE)
        mapping.show(at, PAGE_SIZE, fd, 0)

    def restore_page(self, gpa: int) -> None:
        """Present RAM itself at `gpa` again. GuestMemoryError, OSError."""
        mapping, at = self._locate(gpa, PAGE_SIZE)
        mapping.restore(at, PAGE_SIZE)

    def close(self) -> None:
        """Revoke every view and unmap. Every vCPU thread has ended by now. Idempotent."""
        self._low_end = self._high_end = -1  # from here on everything is outside RAM
        for mapping in self._maps:
            mapping.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> GuestMemory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
