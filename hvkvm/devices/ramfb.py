"""ramfb: a framebuffer in the guest's own RAM, of which the guest says by fw_cfg where and how large it is.

There is nothing to emulate: firmware (OVMF has a driver) allocates the pixels, and whoever wants to see them
reads RAM. UEFI hands them on as its graphics output, so an operating system draws there too. The protocol is
QEMU's (hw/display/ramfb.c).

The guest chooses address, format and sizes, and is believed nothing: all of it is checked whenever pixels are
read. vCPU threads write; any thread reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from hvkvm.abi import fw_cfg
from hvkvm.tuples import NamedTuple

MOST_PIXELS = 1 << 25
"""A little more than 7680 x 4320."""
MOST_SIDE = 1 << 14

_FORMATS = {
    # bytes of a pixel, and where red, green and blue are among them: a word is little-endian
    fw_cfg.DRM_FORMAT_RGB888: (3, (2, 1, 0)),
    fw_cfg.DRM_FORMAT_BGR888: (3, (0, 1, 2)),
    fw_cfg.DRM_FORMAT_XRGB8888: (4, (2, 1, 0)),
    fw_cfg.DRM_FORMAT_ARGB8888: (4, (2, 1, 0)),
    fw_cfg.DRM_FORMAT_XBGR8888: (4, (0, 1, 2)),
    fw_cfg.DRM_FORMAT_ABGR8888: (4, (0, 1, 2)),
    fw_cfg.DRM_FORMAT_RGBX8888: (4, (3, 2, 1)),
    fw_cfg.DRM_FORMAT_RGBA8888: (4, (3, 2, 1)),
    fw_cfg.DRM_FORMAT_BGRX8888: (4, (1, 2, 3)),
    fw_cfg.DRM_FORMAT_BGRA8888: (4, (1, 2, 3)),
}


class Ram(Protocol):
    """What a reader of pixels needs of guest memory."""

    def contains(self, gpa: int, n: int) -> bool: ...
    def read(self, gpa: int, n: int) -> bytes: ...


class Picture(NamedTuple):
    """What is in the framebuffer: `rows` gives one row of pixels after the other, three bytes each: RGB."""

    width: int
    height: int
    rows: Iterator[bytes]


class Ramfb:
    """Where the guest has its framebuffer, if it has said so."""

    def __init__(self) -> None:
        self._content = bytes(fw_cfg.RAMFBCfg.size)

    @property
    def content(self) -> bytes:
        """The file as the guest has written it."""
        return self._content

    def write(self, offset: int, data: bytes) -> None:
        """Part of the file has these bytes now; `data` ends within it."""
        kept = self._content
        self._content = kept[:offset] + data + kept[offset + len(data) :]

    def reset(self) -> None:
        """No framebuffer."""
        self._content = bytes(fw_cfg.RAMFBCfg.size)

    def load(self, content: bytes) -> None:
        """Take a saved file's. ValueError for what is none."""
        if len(content) != fw_cfg.RAMFBCfg.size:
            raise ValueError("its framebuffer has another size")
        self._content = content

    def picture(self, ram: Ram) -> Picture:
        """The pixels as they are now, read while `rows` is gone through. ValueError says why not."""
        address, fourcc, _flags, width, height, stride = fw_cfg.RAMFBCfg.unpack(self._content)
        if not width or not height:
            raise ValueError(
                "the guest has not set up its framebuffer: firmware with a driver for ramfb does"
            )
        name = fourcc.to_bytes(4, "little")
        if name not in _FORMATS:
            raise ValueError(f"the guest's framebuffer has a format that is not known here: {name!r}")
        size, places = _FORMATS[name]
        stride = stride or width * size
        if width > MOST_SIDE or height > MOST_SIDE or width * height > MOST_PIXELS or stride < width * size:
            raise ValueError(
                f"the guest's framebuffer cannot be: {width} x {height} pixels, {stride} bytes a row"
            )
        if not ram.contains(address, stride * (height - 1) + width * size):
            raise ValueError(f"the guest's framebuffer is not in its RAM: at {address:#x}")

        def rows() -> Iterator[bytes]:
            row = bytearray(3 * width)
            for line in range(height):
                pixels = ram.read(address + line * stride, width * size)
                for colour, place in enumerate(places):
                    row[colour::3] = pixels[place::size]
                yield bytes(row)

        return Picture(width, height, rows())
