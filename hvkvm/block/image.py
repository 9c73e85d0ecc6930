"""What holds the data of a disk: the interface of every image, and the options to open one with.

An image blocks and is safe for several threads at once: workers call it. It raises OSError or ImageError;
`Disk` makes results of them. `open_image` opens one by its format.
"""

from __future__ import annotations

from typing import Protocol

from hvkvm.block.buffers import Buffers
from hvkvm.tuples import NamedTuple

FORMATS = ("raw", "vhdx")
CACHES = ("writeback", "none")
SECTOR_SIZES = (512, 4096)


class Extent(NamedTuple):
    """`length` bytes at `offset` that hold data, or read as zeros without taking space."""

    offset: int
    length: int
    data: bool


class Image(Protocol):
    """The data of a disk of `size` bytes, a multiple of `sector_size` (512, 2048 or 4096)."""

    @property
    def size(self) -> int: ...
    @property
    def sector_size(self) -> int: ...
    @property
    def physical_sector_size(self) -> int: ...
    @property
    def read_only(self) -> bool: ...
    @property
    def format(self) -> str: ...

    def readv(self, offset: int, buffers: Buffers) -> int:
        """Fill `buffers`; fewer bytes only where the host's file ends early."""
        ...

    def readv_now(self, offset: int, buffers: Buffers) -> int:
        """As readv, without waiting for anything: fewer bytes where that cannot be, -1 where it never can."""
        ...

    def writev(self, offset: int, buffers: Buffers, *, fua: bool = False) -> int: ...

    def writev_now(self, offset: int, buffers: Buffers) -> int:
        """As writev, waiting for nothing: fewer bytes where that cannot be, -1 where it never can."""
        ...

    def flush(self) -> None: ...
    def discard(self, offset: int, length: int) -> None: ...
    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None: ...

    def resize(self, size: int) -> None:
        """Make it `size` bytes. ImageError where the image cannot have that size."""
        ...

    def extents(self, offset: int, length: int) -> list[Extent]:
        """What of a range holds data, in order and without gaps; may call data what is zero."""
        ...

    def inspect(self) -> dict[str, object]: ...

    def interrupt(self) -> None:
        """End calls that wait for a peer, which fail then. Nothing can end one that waits for this host."""
        ...

    def close(self) -> None: ...


class ImageOptions(NamedTuple):
    """How an image file is to be opened: QEMU's words."""

    format: str = ""
    """"raw" or "vhdx"; empty: by what the file begins with."""
    read_only: bool = False
    snapshot: bool = False
    """Writes go to a temporary file that is gone at the end."""
    cache: str = "writeback"
    """"writeback": the host's page cache. "none": O_DIRECT."""
    sector_size: int = 0
    """512 or 4096, for raw; 0: the image's own, or 512."""
    discard: bool = True
    """Whether a discard gives space back to the host."""


DEFAULTS = ImageOptions()
