"""A file as it will be once its log is replayed, without writing to it: for readers."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from operator import itemgetter
from typing import Protocol

from hvkvm.block.host_file import HostFile
from hvkvm.block.vhdx.layout import SECTOR


class Source(Protocol):
    """Where structures are read from: `n` bytes at `offset`, fewer at the end. Offsets and sizes of 4 KiB."""

    def pread(self, offset: int, n: int) -> bytes: ...
    def size(self) -> int: ...


class PatchedFile:
    """`file` with `sectors` of 4 KiB (by file offset) in place of its own, and `zeroed` ranges.

    The ranges are offset and length, disjoint and in order; there may be very many.
    """

    def __init__(
        self, file: HostFile, sectors: dict[int, bytes], zeroed: list[tuple[int, int]], size: int
    ) -> None:
        self._file = file
        self._sectors = sectors
        self._zeroed = zeroed
        self._size = max(size, file.size())

    def size(self) -> int:
        """Bytes of it, extended as the log says."""
        return self._size

    def pread(self, offset: int, n: int) -> bytes:
        """A copy of `n` bytes."""
        n = max(0, min(n, self._size - offset))
        data = bytearray(self._file.pread(offset, n).ljust(n, b"\0"))
        for start, length in self._zeroed_in(offset, n):
            first, last = max(start, offset), min(start + length, offset + n)
            data[first - offset : last - offset] = bytes(last - first)
        for start in range(offset // SECTOR * SECTOR, offset + n, SECTOR):
            sector = self._sectors.get(start)
            if sector is not None:
                first, last = max(start, offset), min(start + SECTOR, offset + n)
                data[first - offset : last - offset] = sector[first - start : last - start]
        return bytes(data)

    def patches(self, offset: int, n: int) -> bool:
        """Whether the log changes anything of a range."""
        if self._zeroed_in(offset, n):
            return True
        if n // SECTOR < len(self._sectors):
            return any(
                start in self._sectors for start in range(offset // SECTOR * SECTOR, offset + n, SECTOR)
            )
        return any(offset - SECTOR < start < offset + n for start in self._sectors)

    def _zeroed_in(self, offset: int, n: int) -> list[tuple[int, int]]:
        """The ranges that meet `n` bytes at `offset`."""
        first = bisect_right(self._zeroed, offset, key=sum)
        return self._zeroed[first : bisect_left(self._zeroed, offset + n, key=itemgetter(0))]
