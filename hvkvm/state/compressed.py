"""RAM of a saved machine as zstd has it: for keeping files, not for guests that shall begin at once.

Python has zstd itself from 3.14 on. Before, or where it was built without, the library is zstandard, an
extra of this package: of those for Python (zstandard, pyzstd, backports.zstd) it unpacked a kernel image
fastest, at 1.1 GB/s of processor time and 0.8 and 0.7; all packed at 250 MB/s (level 3). Either is imported
when somebody asks for it, and reads what the other has written.

Each piece is a frame of its own, which says how much is in it. A reader believes
that only if it is what the manifest says. Any thread; one object, one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from hvkvm.errors import CapabilityMissing

LEVEL = 3
MAX_PIECE = 1 << 20
"""Bytes in one frame, at most: what a reader has in memory at a time."""
REMEDY = "needs the Python module zstandard; install it, such as by pip install 'hvkvm[zstd]'"


Pack = Callable[[bytes], bytes]
Unpack = Callable[[bytes, int], "bytes | None"]
"""The bytes of a frame that says it has so many; None else, and of a damaged one."""


def _pythons() -> tuple[Pack, Unpack]:
    from compression import zstd  # type: ignore[import-not-found,unused-ignore]

    def unpack(frame: bytes, size: int) -> bytes | None:
        reader = zstd.ZstdDecompressor()
        try:
            # Before anything is unpacked: room is made for what a frame says of itself.
            if zstd.get_frame_info(frame).decompressed_size != size:
                return None
            data: bytes = reader.decompress(frame, size)
        except zstd.ZstdError:
            return None
        return data if reader.eof else None

    return lambda data: bytes(zstd.compress(data, LEVEL)), unpack


def _librarys() -> tuple[Pack, Unpack]:
    import zstandard

    packer, reader = zstandard.ZstdCompressor(level=LEVEL), zstandard.ZstdDecompressor()

    def unpack(frame: bytes, size: int) -> bytes | None:
        try:
            # As above.
            if zstandard.get_frame_parameters(frame).content_size != size:
                return None
            return bytes(reader.decompress(frame))
        except zstandard.ZstdError:
            return None

    return lambda data: bytes(packer.compress(data)), unpack


def _codec(what: str) -> tuple[Pack, Unpack]:
    for codec in (_pythons, _librarys):
        with suppress(ImportError):
            return codec()
    raise CapabilityMissing(f"{what}: {REMEDY}")


class Packer:
    """`pack(data)` makes frames. CapabilityMissing, naming `what`, where no module for it is there."""

    def __init__(self, what: str) -> None:
        self._pack, _unpack = _codec(what)

    def pack(self, data: bytes) -> bytes:
        """The frame of `data`, of at most MAX_PIECE bytes."""
        return self._pack(data)


class Unpacker:
    """`unpack(frame, size)` takes them apart. CapabilityMissing as `Packer`."""

    def __init__(self, what: str) -> None:
        _pack, self._unpack = _codec(what)

    def unpack(self, frame: bytes, size: int) -> bytes | None:
        """The `size` bytes of a frame; None where it is damaged or has another size."""
        data = self._unpack(frame, size)
        return data if data is not None and len(data) == size else None
