"""PNG files as a reader takes them apart: every chunk's checksum, the header, the pixels."""

from __future__ import annotations

import struct
import zlib


def pixels_of(content: bytes) -> tuple[int, int, bytes]:
    """Width, height and RGB pixels of a file whose rows are unfiltered. AssertionError for another."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, []
    while at < len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        data = content[at + 8 : at + 8 + length]
        (checksum,) = struct.unpack_from(">I", content, at + 8 + length)
        assert checksum == zlib.crc32(kind + data)
        chunks.append((kind, data))
        at += 12 + length
    assert (chunks[0][0], chunks[-1]) == (b"IHDR", (b"IEND", b""))
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert rest == [8, 2, 0, 0, 0]
    raw = zlib.decompress(b"".join(data for kind, data in chunks if kind == b"IDAT"))
    size = 1 + 3 * width
    assert len(raw) == size * height
    assert set(raw[::size]) <= {0}
    return width, height, b"".join(raw[line * size + 1 : (line + 1) * size] for line in range(height))
