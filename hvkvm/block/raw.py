"""A raw image: byte n of the disk is byte n of the file or block device."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from hvkvm.block.buffers import Buffers
from hvkvm.block.host_file import HostFile
from hvkvm.block.image import DEFAULTS, Extent, ImageOptions
from hvkvm.errors import ImageError


class RawImage:
    """`path` as a disk. ImageError if it cannot be opened, or its size is no whole number of sectors."""

    format = "raw"

    def __init__(self, path: Path, options: ImageOptions = DEFAULTS, *, sector_size: int = 0) -> None:
        self.sector_size = sector_size or options.sector_size or 512
        self.read_only = options.read_only
        self._discard = options.discard
        self.file = file = HostFile(path, read_only=options.read_only, direct=options.cache == "none")
        try:
            self.size = file.size()
            if self.size % self.sector_size:
                short = self.size % self.sector_size
                raise ImageError(
                    f"{path}: its {self.size} bytes end {short} bytes into a sector of {self.sector_size};"
                    f" is it whole? truncate -s %{self.sector_size} rounds it up"
                )
            if file.alignment > self.sector_size:
                raise ImageError(
                    f"{path}: O_DIRECT needs sectors of {file.alignment} bytes here;"
                    f" say sector={file.alignment}, or leave out cache=none"
                )
        except BaseException:
            file.close()
            raise
        self.physical_sector_size = max(self.sector_size, 4096)

    def readv(self, offset: int, buffers: Buffers) -> int:
        return self.file.readv(offset, buffers)

    def readv_now(self, offset: int, buffers: Buffers) -> int:
        return self.file.now.readv(offset, buffers)

    def writev(self, offset: int, buffers: Buffers, *, fua: bool = False) -> int:
        return self.file.writev(offset, buffers, stable=fua)

    def writev_now(self, offset: int, buffers: Buffers) -> int:
        return self.file.now.writev(offset, buffers)

    def flush(self) -> None:
        if not self.read_only:
            self.file.sync()

    def discard(self, offset: int, length: int) -> None:
        if self._discard:
            self.file.punch(offset, length)

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        self.file.zero(offset, length, may_unmap=may_unmap and self._discard)

    def resize(self, size: int) -> None:
        """A file is made so long, and never shorter, for what lay there would be gone.

        A device, or a file that is not written, is looked at again: somebody else has made it longer.
        """
        if size % self.sector_size:
            raise ImageError(f"{self.file.path}: {size} bytes: not a multiple of {self.sector_size}")
        has = self.file.size()
        if not self.file.is_device and not self.read_only:
            if size < has:
                text = "a disk cannot become smaller; copy what is to be kept to a smaller one"
                raise ImageError(f"{self.file.path}: {size} bytes: has {has}, and {text}")
            self.file.truncate(size)
        elif has < size:
            raise ImageError(f"{self.file.path}: has {has} bytes, not {size}; make it larger first")
        self.size = size

    def extents(self, offset: int, length: int) -> list[Extent]:
        """By SEEK_DATA and SEEK_HOLE; all data where the host cannot say."""
        found: list[Extent] = []
        end = offset + length
        while offset < end:
            try:
                data = min(end, os.lseek(self.file.fd, offset, os.SEEK_DATA))
            except OSError as error:
                if error.errno != errno.ENXIO:  # nor is its next hole anything to go by
                    found.append(Extent(offset, end - offset, True))
                    break
                data = end
            if data > offset:
                found.append(Extent(offset, data - offset, False))
                offset = data
                continue
            try:
                hole = min(end, os.lseek(self.file.fd, offset, os.SEEK_HOLE))
            except OSError:
                hole = end
            found.append(Extent(offset, hole - offset, True))
            offset = hole
        return found

    def inspect(self) -> dict[str, object]:
        return {"format": self.format, "path": str(self.file.path), "size": self.size}

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        self.file.close()
