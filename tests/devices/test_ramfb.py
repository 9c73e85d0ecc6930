"""ramfb: pixels of every format as a picture and as a PNG file, and framebuffers that cannot be."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from png_files import pixels_of

from hvkvm.devices.ramfb import Ramfb
from hvkvm.machine.screenshot import screenshot
from hvkvm.observe.png import png as real_png

SIZE = 0x8000


class Ram:
    """Guest memory as far as ramfb knows it; a read outside of it is a fault of ramfb's."""

    def __init__(self) -> None:
        self.bytes = bytearray(SIZE)

    def contains(self, gpa: int, n: int) -> bool:
        return gpa >= 0 and n >= 0 and gpa + n <= SIZE

    def read(self, gpa: int, n: int) -> bytes:
        assert self.contains(gpa, n)
        return bytes(self.bytes[gpa : gpa + n])


def config(
    fourcc: bytes = b"XR24", address: int = 0x1000, width: int = 5, height: int = 3, stride: int = 0
) -> bytes:
    return struct.pack(">QIIIII", address, int.from_bytes(fourcc, "little"), 0, width, height, stride)


@pytest.mark.parametrize(
    "fourcc", ["RG24", "BG24", "XR24", "AR24", "XB24", "AB24", "RX24", "RA24", "BX24", "BA24"]
)
@pytest.mark.parametrize("padding", [0, 7])
def test_every_format_becomes_a_png(tmp_path: Path, fourcc: str, padding: int) -> None:
    """A name has the components from a pixel's high bits to its low ones: XR24 is X, R, G, B."""
    names = {"RG24": "RGB", "BG24": "BGR"}.get(fourcc)
    if names is None:
        letters = {"X": "XRGB", "A": "XRGB"} if fourcc[1] == "R" else {"X": "XBGR", "A": "XBGR"}
        names = letters.get(fourcc[0]) or {"R": "RGBX", "B": "BGRX"}[fourcc[0]]
    colours = [(7 * n & 0xFF, 100 + n, 255 - n) for n in range(15)]
    ram, display = Ram(), Ramfb()
    stride = 5 * len(names) + padding
    for index, colour in enumerate(colours):
        parts = dict(zip("RGB", colour, strict=True)) | {"X": 0xEE}
        pixel = bytes(parts[name] for name in reversed(names))
        at = 0x1000 + index // 5 * stride + index % 5 * len(names)
        ram.bytes[at : at + len(pixel)] = pixel
    display.write(0, config(fourcc.encode(), stride=stride if padding else 0))
    path = tmp_path / "screen.png"
    path.write_bytes(b"old")
    assert screenshot(display, ram, path) == (5, 3)
    assert pixels_of(path.read_bytes()) == (5, 3, b"".join(map(bytes, colours)))
    assert [one.name for one in tmp_path.iterdir()] == ["screen.png"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (bytes(28), "has not set up"),
        (config(width=0), "has not set up"),
        (config(b"C8  "), "a format that is not known"),
        (config(width=1 << 14, height=(1 << 11) + 1), "cannot be"),
        (config(width=(1 << 14) + 1, height=1), "cannot be"),
        (config(stride=19), "cannot be"),
        (config(address=SIZE - 59), "not in its RAM"),
        (config(address=(1 << 64) - 4), "not in its RAM"),
        (config(stride=(1 << 32) - 1), "not in its RAM"),
    ],
)
def test_what_cannot_be_shown_is_one_line(tmp_path: Path, content: bytes, why: str) -> None:
    display = Ramfb()
    display.write(0, content)
    with pytest.raises(ValueError, match=why) as caught:
        screenshot(display, Ram(), tmp_path / "screen.png")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_picture_takes_the_place_of_a_file_alone(tmp_path: Path) -> None:
    ram, display = Ram(), Ramfb()
    display.write(0, config())
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(OSError, match="not a regular file; name another"):
        screenshot(display, ram, path)
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert [one.name for one in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize(("name", "number"), [("no/such/screen.png", 2), ("screen.png", errno.ENOSPC)])
def test_what_cannot_be_written_is_named_as_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    """A write's own error has no name, and the one of an open the name that a file has before it is whole."""

    def png(*_picture: object) -> Iterator[bytes]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    display = Ramfb()
    display.write(0, config())
    monkeypatch.setattr("hvkvm.machine.screenshot.png", png)
    with pytest.raises(OSError) as caught:  # noqa: PT011
        screenshot(display, Ram(), tmp_path / name)
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / name))
    assert list(tmp_path.iterdir()) == []


def test_a_name_may_be_as_long_as_the_file_system_lets_it(tmp_path: Path) -> None:
    display = Ramfb()
    display.write(0, config())
    path = tmp_path / ("s" * 251 + ".png")
    assert screenshot(display, Ram(), path) == (5, 3)
    assert list(tmp_path.iterdir()) == [path]


def test_two_write_the_same_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clients of a machine's control socket may ask at a time."""
    display = Ramfb()
    display.write(0, config())
    path = tmp_path / "screen.png"
    taken: list[object] = []

    def png(*picture: object) -> Iterator[bytes]:
        if not taken:
            taken.append(None)
            taken.append(screenshot(display, Ram(), path))
        yield from real_png(*picture)

    monkeypatch.setattr("hvkvm.machine.screenshot.png", png)
    assert screenshot(display, Ram(), path) == (5, 3)
    assert taken == [None, (5, 3)]
    assert list(tmp_path.iterdir()) == [path]


numbers = st.integers(0, 40) | st.integers(0, (1 << 32) - 1)


@given(
    address=st.integers(0, SIZE) | st.integers(0, (1 << 64) - 1),
    fourcc=st.sampled_from((b"XR24", b"BA24", b"RG24")) | st.binary(min_size=4, max_size=4),
    sizes=st.tuples(numbers, numbers, numbers),
)
def test_no_framebuffer_reaches_beyond_ram(address: int, fourcc: bytes, sizes: tuple[int, int, int]) -> None:
    display = Ramfb()
    display.write(0, config(fourcc, address, *sizes))
    try:
        width, height, rows = display.picture(Ram())
    except ValueError:
        return
    assert [len(row) for row in rows] == [3 * width] * height


def test_it_is_saved_and_reset() -> None:
    display, other = Ramfb(), Ramfb()
    display.write(0, config())
    display.write(16, struct.pack(">I", 4))
    other.load(display.content)
    assert other.picture(Ram()).width == 4
    other.reset()
    with pytest.raises(ValueError, match="has not set up"):
        other.picture(Ram())
    with pytest.raises(ValueError, match="another size"):
        other.load(b"")
