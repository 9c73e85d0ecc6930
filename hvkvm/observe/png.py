"""PNG files of RGB pixels. Pure; the format is that of RFC 2083."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_LEVEL = 1
"""Of zlib: screens compress well, and somebody waits."""


def png(width: int, height: int, rows: Iterable[bytes]) -> Iterator[bytes]:
    """The file in pieces, of `rows` of 3 * `width` bytes each, `height` of them, from the top."""
    yield _SIGNATURE
    yield _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    packer = zlib.compressobj(_LEVEL)
    for row in rows:
        if piece := packer.compress(b"\0" + row):  # each row begins with its filter: none
            yield _chunk(b"IDAT", piece)
    yield _chunk(b"IDAT", packer.flush())
    yield _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
