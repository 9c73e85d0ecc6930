"""Opens a disk image by its name, as the format that is asked for or that its first bytes show."""

from __future__ import annotations

from errno import EINVAL
from pathlib import Path

from hvkvm import given_file
from hvkvm.block.image import CACHES, DEFAULTS, FORMATS, SECTOR_SIZES, Image, ImageOptions
from hvkvm.errors import ImageDamaged, ImageError


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
    be named so, too. A VHDX that has lost its own is not given to a guest as a raw disk, to be written over.
    """
    try:
        head = given_file.read(path, 8)
    except OSError as error:
        if error.errno != EINVAL:
            raise ImageError(f"{path}: {error.strerror}") from None
        head = b""  # no file: whoever opens the image says so
    found = next((name for magic, name in _MAGICS if head.startswith(magic)), "raw")
    is_named_so = path.suffix.lower() in (".vhdx", ".avhdx")
    if found == "raw" and is_named_so and head:
        what = "not vhdxfile, but the file is named .vhdx; if it is a raw disk, say that its format is raw"
        raise ImageDamaged(path, "file type identifier", 0, what)
    if found == "vhdx" and not is_named_so:
        raise ImageError(
            f"{path}: begins like a VHDX, but is not named .vhdx; say which format it has, vhdx or raw"
        )
    if found not in FORMATS:
        raise ImageError(
            f"{path}: begins like {found}; serve it with qemu-nbd, or say that its format is raw"
        )
    return found
