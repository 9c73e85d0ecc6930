"""A VHDX file as a disk: read, written, flushed.

A write puts data in its place and changes metadata in memory; only a flush makes both stable (`flusher`).
Fresh blocks lie at the end of the file, where they read as zeros.
"""

from __future__ import annotations

from pathlib import Path

from hvkvm.block.buffers import Buffers, Cutter, clear, size_of
from hvkvm.block.host_file import HostFile
from hvkvm.block.image import DEFAULTS, Extent, ImageOptions
from hvkvm.block.vhdx.bitmap import SectorBitmaps
from hvkvm.block.vhdx.flusher import Flusher
from hvkvm.block.vhdx.layout import (
    FULLY_PRESENT,
    MIB,
    NOT_PRESENT,
    OFFSET_MASK,
    PARTIALLY_PRESENT,
    STATE_MASK,
    ZERO,
)
from hvkvm.block.vhdx.locator import find_parent
from hvkvm.block.vhdx.patched import PatchedFile
from hvkvm.block.vhdx.replay import apply_replay
from hvkvm.block.vhdx.resize import grown, store_size
from hvkvm.block.vhdx.structures import read_structures
from hvkvm.errors import ImageError

MAX_PARENTS = 64


class VhdxImage:
    """`path` as a disk. ImageError, ImageDamaged. Nothing is written to a damaged file, nor to a parent."""

    format = "vhdx"

    def __init__(
        self, path: Path, options: ImageOptions = DEFAULTS, *, parent: Path | None = None, children: int = 0
    ) -> None:
        self.path = path
        self.read_only = options.read_only
        self._discard = options.discard
        self.file = HostFile(path, read_only=options.read_only, direct=options.cache == "none")
        self.parent: VhdxImage | None = None
        try:
            self._open(options, parent, children)
        except OSError as error:
            self.close_files()
            raise ImageError(f"{path}: {error.strerror or error}") from None
        except BaseException:
            self.close_files()
            raise

    def _open(self, options: ImageOptions, parent: Path | None, children: int) -> None:
        self.header, replay, self.source, self.metadata, self.bat = read_structures(
            self.path, self.file, options
        )
        self.geometry = self.metadata.geometry
        self.size = self.geometry.disk_size
        self.sector_size = self.geometry.sector_size
        self.physical_sector_size = self.metadata.physical_sector_size
        self.pages = self.bat.pages
        self.bitmaps = SectorBitmaps(self.bat)
        if self.metadata.parent is not None:
            self.parent = self._open_parent(options, parent, children)
        self.replayed = replay.entries if replay is not None else 0
        if replay is not None and not self.read_only:
            self.header = apply_replay(self.file, self.header, replay)
            self.source = self.pages.source = self.file
        self._end = -(-self.source.size() // MIB) * MIB
        self.flusher = Flusher(self.file, self.header, self.pages, lambda: self._end)

    def _open_parent(self, options: ImageOptions, given: Path | None, children: int) -> VhdxImage:
        locator = self.metadata.parent
        if locator is None:
            raise ImageError(f"{self.path}: a child that names no parent")
        if children >= MAX_PARENTS:
            raise ImageError(f"{self.path}: more than {MAX_PARENTS} parents, or a circle of them")
        path = given or find_parent(self.path, locator)
        if path is None:
            raise ImageError(
                f"{self.path}: its parent {locator.paths[0]} is not there; put it back beside it"
            )
        above = VhdxImage(path, options._replace(read_only=True, sector_size=0), children=children + 1)
        if above.header.data_write_guid not in locator.linkages:
            above.close()
            raise ImageError(f"{self.path}: its parent {path} was written to since, or is another disk")
        if above.sector_size != self.metadata.geometry.sector_size:
            above.close()
            raise ImageError(f"{self.path}: its parent {path} has sectors of another size")
        return above

    # Reading.

    def readv(self, offset: int, buffers: Buffers) -> int:
        n = size_of(buffers)
        cutter = Cutter(buffers)
        done = 0
        for block, within, length in self.geometry.pieces(offset, n):
            # A request inside of one block, as most are, keeps its list as it is.
            got = self._read_block(block, within, buffers if length == n else cutter.take(length), length)
            done += got
            if got < length:
                break
        return done

    def readv_now(self, offset: int, buffers: Buffers) -> int:
        block, within = divmod(offset, self.geometry.block_size)
        n = size_of(buffers)
        if within + n > self.geometry.block_size or self.source is not self.file:
            return 0
        entry = self.bat.peek(self.geometry.payload_index(block))
        if entry is None:
            return 0
        if entry & STATE_MASK == FULLY_PRESENT:
            return self.file.now.readv((entry & OFFSET_MASK) + within, buffers)
        if entry & STATE_MASK == PARTIALLY_PRESENT or self.parent is not None:
            return 0
        clear(buffers)
        return n

    def _read_block(self, block: int, within: int, parts: Buffers, length: int) -> int:
        entry = self.bat.get(self.geometry.payload_index(block))
        state = entry & STATE_MASK
        if state == FULLY_PRESENT:
            return self._read_file((entry & OFFSET_MASK) + within, parts, length)
        if state != PARTIALLY_PRESENT:
            if state == NOT_PRESENT and self.parent is not None:
                self._read_parent(block * self.geometry.block_size + within, parts, length)
            else:
                clear(parts)
            return length
        cutter = Cutter(parts)
        done = 0
        for run, ours in self.bitmaps.runs(block, within, length):
            some = cutter.take(run)
            if ours:
                got = self._read_file((entry & OFFSET_MASK) + within + done, some, run)
                if got < run:
                    return done + got
            else:
                self._read_parent(block * self.geometry.block_size + within + done, some, run)
            done += run
        return done

    def _read_file(self, position: int, parts: Buffers, length: int) -> int:
        source = self.source
        if isinstance(source, PatchedFile) and source.patches(position, length):
            data = source.pread(position, length)
            at = 0
            for part in parts:
                part[:] = data[at : at + len(part)]
                at += len(part)
            return length
        return self.file.readv(position, parts)

    def _read_parent(self, offset: int, parts: Buffers, length: int) -> None:
        parent = self.parent
        if parent is None:
            raise ImageError(f"{self.path}: a block is its parent's, and it has none")
        inside = max(0, min(length, parent.size - offset))
        cutter = Cutter(parts)
        if inside and parent.readv(offset, cutter.take(inside)) < inside:
            raise ImageError(f"{parent.path}: has ended early")
        clear(cutter.take(length - inside))

    # Writing.

    def writev_now(self, offset: int, buffers: Buffers) -> int:
        """Into a block that is in the file, so that no metadata changes."""
        block, within = divmod(offset, self.geometry.block_size)
        if not self.flusher.writing or within + size_of(buffers) > self.geometry.block_size:
            return 0
        entry = self.bat.peek(self.geometry.payload_index(block))
        if entry is None or entry & STATE_MASK != FULLY_PRESENT:
            return 0
        return self.file.now.writev((entry & OFFSET_MASK) + within, buffers)

    def writev(self, offset: int, buffers: Buffers, *, fua: bool = False) -> int:
        self.flusher.begin()
        n = size_of(buffers)
        cutter = Cutter(buffers)
        settled = True
        for block, within, length in self.geometry.pieces(offset, n):
            parts = buffers if length == n else cutter.take(length)
            entry = self._allocated(block)
            # Stable by itself only if all metadata is, which leads to it.
            stable = fua and self.pages.clean and entry & STATE_MASK == FULLY_PRESENT
            self.file.writev((entry & OFFSET_MASK) + within, parts, stable=stable)
            if entry & STATE_MASK == PARTIALLY_PRESENT:
                self.bitmaps.mark(block, within, length)
            settled = settled and stable
        if fua and not settled:
            self.flush()
        return n

    def flush(self) -> None:
        self.flusher.flush()

    def discard(self, offset: int, length: int) -> None:
        """Give the space of blocks in the file back; the blocks stay."""
        if not self._discard or self.metadata.fixed:
            return
        self.flusher.begin()
        for block, within, n in self.geometry.pieces(offset, length):
            entry = self.bat.get(self.geometry.payload_index(block))
            if entry & STATE_MASK >= FULLY_PRESENT:
                self.file.punch((entry & OFFSET_MASK) + within, n)

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        self.flusher.begin()
        may_unmap = may_unmap and self._discard and not self.metadata.fixed
        for block, within, n in self.geometry.pieces(offset, length):
            if self._zero_unallocated(block, whole=n == self.geometry.block_size):
                continue
            entry = self._allocated(block)
            self.file.zero((entry & OFFSET_MASK) + within, n, may_unmap=may_unmap)
            if entry & STATE_MASK == PARTIALLY_PRESENT:
                self.bitmaps.mark(block, within, n)

    def _zero_unallocated(self, block: int, *, whole: bool) -> bool:
        """Whether a block that is not in the file reads as zeros now."""
        index = self.geometry.payload_index(block)
        with self.pages.lock:
            state = self.bat.get(index) & STATE_MASK
            if state == ZERO or (state == NOT_PRESENT and self.parent is None):
                return True
            if state >= FULLY_PRESENT or (not whole and self.parent is not None):
                return False
            self.bat.set(index, ZERO)
            return True

    def _allocated(self, block: int) -> int:
        """The BAT entry of a block, which is in the file afterwards."""
        index = self.geometry.payload_index(block)
        entry = self.bat.get(index)
        if entry & STATE_MASK >= FULLY_PRESENT:
            return entry
        with self.pages.lock:
            entry = self.bat.get(index)
            state = entry & STATE_MASK
            if state >= FULLY_PRESENT:
                return entry
            # What was zero stays so around the write; what the parent has must stay visible.
            partial = self.parent is not None and state == NOT_PRESENT
            if partial:
                self.bitmaps.prepare(block, self._take_space)
            entry = self._take_space(self.geometry.block_size)
            entry |= PARTIALLY_PRESENT if partial else FULLY_PRESENT
            self.bat.set(index, entry)
            return entry

    def _take_space(self, length: int) -> int:
        """`length` bytes of zeros at the end of the file; where. With `pages.lock` held. OSError."""
        at = self._end
        self.file.truncate(at + length)
        self._end = at + length
        self.bat.grown(self._end)
        return at

    def resize(self, size: int) -> None:
        """Grow it, as far as its BAT has room."""
        old = self.geometry
        if size == old.disk_size:
            return
        new = grown(self.path, old, size, self.bat.region.length)
        self.flusher.begin()
        with self.pages.lock:
            self.geometry = self.bat.geometry = new
            self.size = size
            for index in range(old.entries, new.entries):
                if self.bat.get(index):
                    self.bat.set(index, 0)
            store_size(self.pages, self.metadata.size_at, size)
        if self.metadata.fixed:
            for block in range(old.blocks, new.blocks):
                entry = self._allocated(block)
                self.file.allocate(entry & OFFSET_MASK, new.block_size)
        self.flush()

    # Looking.

    def extents(self, offset: int, length: int) -> list[Extent]:
        found: list[Extent] = []
        geometry, end = self.geometry, offset + length
        while offset < end:
            block, within = divmod(offset, geometry.block_size)
            absent = self.bat.absent(block)
            n = min(max(absent, 1) * geometry.block_size - within, end - offset)
            state = NOT_PRESENT if absent else self.bat.get(geometry.payload_index(block)) & STATE_MASK
            if state >= FULLY_PRESENT:
                found.append(Extent(offset, n, True))
            elif state == NOT_PRESENT and self.parent is not None:
                inside = max(0, min(n, self.parent.size - offset))
                found += self.parent.extents(offset, inside) if inside else []
                found += [Extent(offset + inside, n - inside, False)] if inside < n else []
            else:
                found.append(Extent(offset, n, False))
            offset += n
        return found

    def inspect(self) -> dict[str, object]:
        kind = "differencing" if self.parent is not None else "fixed" if self.metadata.fixed else "dynamic"
        return {
            "format": self.format,
            "path": str(self.path),
            "type": kind,
            "size": self.size,
            "block_size": self.geometry.block_size,
            "file_size": self._end,
            "parent": str(self.parent.path) if self.parent is not None else None,
        }

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        """Flush, say that the log is empty, close. Idempotent. OSError if what was written is not stable."""
        if self.file.fd < 0:
            return
        try:
            self.flusher.close()
        finally:
            self.close_files()

    def close_files(self) -> None:
        """Close as a crash would: nothing more is written."""
        self.file.close()
        if self.parent is not None:
            self.parent.close()
