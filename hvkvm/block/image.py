"""What holds the data of a disk: the protocol of every image, and how one is opened by format.

An image blocks and is safe for several threads at once: workers call it. It raises OSError or ImageError;
`Disk` makes results of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

from hvkvm.block.buffers import Buffers
from hvkvm.errors import ImageError

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


def open_image(name: str, options: ImageOptions = DEFAULTS) -> Image:
    """The image `name`: a path, or "nbd:unix:PATH" or "nbd:HOST:PORT", each with ":exportname=NAME" or not.

    ImageError with the reason and remedy; ImageDamaged for a file that lies.
    """
    if options.cache not in CACHES:
        raise ImageError(f"cache={options.cache}: choose {' or '.join(CACHES)}")
    if options.sector_size not in (0, *SECTOR_SIZES):
        raise ImageError(f"sector={options.sector_size}: choose 512 or 4096")
    if options.snapshot and not options.read_only:
        from hvkvm.block.overlay import OverlayImage

        return OverlayImage(open_image(name, options._replace(read_only=True, snapshot=False)))
    if name.startswith("nbd:"):
        from hvkvm.block.nbd.handshake import parse_address
        from hvkvm.block.nbd.image import NbdImage

        return NbdImage(parse_address(name), options)
    path = Path(name)
    kind = options.format or guess_format(path)
    if kind == "raw":
        from hvkvm.block.raw import RawImage

        return RawImage(path, options)
    if kind == "vhdx":
        from hvkvm.block.vhdx.image import VhdxImage

        return VhdxImage(path, options)
    known = " or ".join(FORMATS)
    raise ImageError(f"{path}: format {kind} is not known; choose {known}, or serve it with qemu-nbd")


_MAGICS = ((b"vhdxfile", "vhdx"), (b"QFI\xfb", "qcow2"), (b"KDMV", "vmdk"), (b"conectix", "vhd"))


def guess_format(path: Path) -> str:
    """The format by the file's first bytes: "raw" if they are of none that is known. ImageError.

    The guest writes the first bytes of a raw disk, so they alone make nothing of it but raw: a VHDX must
    be named so, too.
    """
    try:
        with path.open("rb", buffering=0) as file:
            head = file.read(8)
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from None
    found = next((name for magic, name in _MAGICS if head.startswith(magic)), "raw")
    if found == "vhdx" and path.suffix.lower() not in (".vhdx", ".avhdx"):
        raise ImageError(f"{path}: begins like a VHDX, but is not named .vhdx; say format=vhdx or format=raw")
    if found not in FORMATS:
        raise ImageError(f"{path}: begins like {found}; serve it with qemu-nbd, or say format=raw")
    return found
