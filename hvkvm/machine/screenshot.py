"""What the guest's framebuffer shows, as a PNG file."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hvkvm.given_file import beside, check_replaceable
from hvkvm.observe.png import png
from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from hvkvm.devices.ramfb import Ram, Ramfb


class Size(NamedTuple):
    """In pixels."""

    width: int
    height: int


def screenshot(display: Ramfb, ram: Ram, path: Path) -> Size:
    """Write what is shown to `path`, which is replaced when the new file is whole. Blocks; any thread.

    ValueError with the reason where the guest shows nothing; OSError, whose `filename` is `path`.
    """
    picture = display.picture(ram)
    check_replaceable(path)
    partial = beside(path)
    try:
        with partial.open("xb") as file:
            for piece in png(*picture):
                file.write(piece)
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            error.filename = str(path)  # who asked knows this name, and a failed write has none
        raise
    return Size(picture.width, picture.height)
