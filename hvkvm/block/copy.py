"""Copying images and giving back what they do not need: for `hvkvm disk`. Blocks; on the caller's thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from mmap import mmap

from hvkvm.block.image import Image
from hvkvm.block.raw import RawImage
from hvkvm.errors import ImageError

PIECE = 4 << 20
GRAIN = 64 << 10
"""Zeros of so many bytes, at a multiple of it, are left out."""
_ZEROS = bytes(GRAIN)

Progress = Callable[[int, int], object]
"""Called with bytes done and bytes in all."""


def piece() -> memoryview:
    """PIECE bytes of whole pages. Nobody closes them: the traceback of an error has views of them."""
    return memoryview(mmap(-1, PIECE))


def copy(source: Image, target: Image, progress: Progress) -> int:
    """Copy all data to `target`, all zeros so far and no smaller; bytes written. OSError, ImageError."""
    written = 0
    size = source.size
    view = piece()
    offset = 0
    while offset < size:
        # A part at a time: a list of all extents of 64 TiB could be long.
        part = min(size - offset, 1 << 30)
        for extent in source.extents(offset, part):
            if extent.data:
                written += copy_range(source, target, extent.offset, extent.length, view, progress, size)
        offset += part
        progress(offset, size)
    target.flush()
    return written


def copy_range(
    source: Image, target: Image, offset: int, length: int, view: memoryview, progress: Progress, size: int
) -> int:
    """Copy what of a range is not zeros, through `view`; bytes written."""
    written = 0
    end = offset + length
    while offset < end:
        n = min(PIECE, end - offset)
        try:
            got = source.readv(offset, [view[:n]])
        except OSError as error:
            why = error.strerror or error
            raise ImageError(f"the source cannot be read at byte {offset:#x}: {why}") from None
        if got < n:
            raise ImageError(f"the source has ended at byte {offset:#x}, before its size of {size}")
        for first, last in data_runs(view[:n]):
            target.writev(offset + first, [view[first:last]])
            written += last - first
        offset += n
        progress(offset, size)
    return written


def data_runs(view: memoryview) -> Iterator[tuple[int, int]]:
    """The parts of `view` that are not whole grains of zeros: from, to."""
    start = None
    for at in range(0, len(view), GRAIN):
        grain = view[at : at + GRAIN]
        if grain.tobytes() == _ZEROS[: len(grain)]:
            if start is not None:
                yield start, at
                start = None
        elif start is None:
            start = at
    if start is not None:
        yield start, len(view)


def compact_raw(image: RawImage, progress: Progress) -> None:
    """Punch holes where a raw image holds zeros. OSError."""
    view = piece()
    for extent in image.extents(0, image.size):
        at, end = extent.offset, extent.offset + extent.length
        while extent.data and at < end:
            n = min(PIECE, end - at)
            image.readv(at, [view[:n]])
            before = 0
            for first, last in [*data_runs(view[:n]), (n, n)]:
                if first > before:
                    image.discard(at + before, first - before)
                before = last
            at += n
            progress(at, image.size)
    image.flush()
