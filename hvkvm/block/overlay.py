"""A throw-away layer over an image (`snapshot=on`): what is written goes to a temporary file.

The file has no name, so it is gone however the run ends, and is as sparse as the writes are. Which sectors
are in it is kept in memory, a bit each, for the chunks that were written to: nothing is ever copied from
below, and no write is read back first.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator

from hvkvm.block.buffers import Buffers, Cutter, clear, read_fully, size_of, write_fully, zeros
from hvkvm.block.file_now import FileNow
from hvkvm.block.image import Extent, Image
from hvkvm.block.ranges import cut, runs
from hvkvm.errors import ImageError
from hvkvm.memory.mapping import PAGE_SIZE, punch

CHUNK_SECTORS = 2048


class OverlayImage:
    """`base` as it was, with what is written since above it. Closes `base`, too."""

    def __init__(self, base: Image, folder: str | None = None) -> None:
        self.base = base
        self.size = base.size
        self.sector_size = base.sector_size
        self.physical_sector_size = base.physical_sector_size
        self.read_only = False
        self.format = base.format
        self._written: dict[int, int] = {}
        """By chunk: its sectors that are in the file, a bit each. Readers need no lock: ints are values."""
        self._lock = threading.Lock()
        # Not /tmp, which is memory on many hosts; QEMU's choice, too.
        folder = folder or os.environ.get("TMPDIR") or "/var/tmp"
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            base.close()
            raise ImageError(
                f"snapshot=on: no temporary file in {folder}: {error.strerror}; set TMPDIR"
            ) from None
        self._fd = self._file.fileno()
        self._now = FileNow(self._fd, able=True)

    @property
    def changed(self) -> bool:
        """Whether anything was written, so that the base is not the whole of it."""
        return bool(self._written)

    def readv(self, offset: int, buffers: Buffers) -> int:
        cutter = Cutter(buffers)
        done = 0
        for at, length, ours in self._runs(offset, size_of(buffers)):
            parts = cutter.take(length)
            if ours:
                got = read_fully(self._fd, parts, at)
                if got < length:  # a hole at the end
                    rest = Cutter(parts)
                    rest.take(got)
                    clear(rest.take(length))
            else:
                got = self.base.readv(at, parts)
                if got < length:
                    return done + got
            done += length
        return done

    def readv_now(self, offset: int, buffers: Buffers) -> int:
        for bits, _n in self._words(offset, size_of(buffers)):
            if bits:
                return 0
        return self.base.readv_now(offset, buffers)

    def writev_now(self, offset: int, buffers: Buffers) -> int:
        done = self._now.writev(offset, buffers)
        if done == size_of(buffers):  # of a part nothing is known yet: a worker writes all of it
            self._mark(offset, done)
        return done

    def writev(self, offset: int, buffers: Buffers, *, fua: bool = False) -> int:
        done = write_fully(self._fd, buffers, offset)
        self._mark(offset, done)
        return done

    def flush(self) -> None:
        """Nothing of it outlives the run, so there is nothing to make stable."""

    def discard(self, offset: int, length: int) -> None:
        """Space of the temporary file is given back; the base's stays."""
        self.write_zeroes(offset, length)

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        first, last = -(-offset // PAGE_SIZE) * PAGE_SIZE, (offset + length) // PAGE_SIZE * PAGE_SIZE
        if first < last and punch(self._fd, first, last - first):
            write_fully(self._fd, zeros(first - offset), offset)
            write_fully(self._fd, zeros(offset + length - last), last)
        else:
            write_fully(self._fd, zeros(length), offset)
        self._mark(offset, length)

    def resize(self, size: int) -> None:
        raise ImageError("a disk with snapshot=on keeps its size")

    def extents(self, offset: int, length: int) -> list[Extent]:
        found: list[Extent] = []
        for at, n, ours in self._runs(offset, length):
            found += [Extent(at, n, True)] if ours else self.base.extents(at, n)
        return found

    def inspect(self) -> dict[str, object]:
        taken = os.fstat(self._fd).st_blocks * 512
        return {**self.base.inspect(), "snapshot": True, "snapshot_bytes": taken}

    def interrupt(self) -> None:
        self.base.interrupt()

    def close(self) -> None:
        self._file.close()
        self.base.close()

    def _mark(self, offset: int, length: int) -> None:
        """After the data is written, so that who sees the mark finds the data."""
        first, end = offset // self.sector_size, (offset + length) // self.sector_size
        with self._lock:
            for chunk, bit, n in cut(first, end, CHUNK_SECTORS):
                self._written[chunk] = self._written.get(chunk, 0) | ((1 << n) - 1) << bit

    def _runs(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """The range cut where it changes between the file and the base: offset, length, whether the file."""
        size = self.sector_size
        at = offset // size * size
        for run, ours in runs(self._words(offset, length)):
            yield at, run * size, ours
            at += run * size

    def _words(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """A bit for each sector of the range, set if it is in the file: bits, how many; in order."""
        first, end = offset // self.sector_size, (offset + length) // self.sector_size
        for chunk, bit, n in cut(first, end, CHUNK_SECTORS):
            yield self._written.get(chunk, 0) >> bit & (1 << n) - 1, n
