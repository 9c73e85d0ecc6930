"""Where `hvkvm disk` makes an image: beside its place, which it gets when it is whole."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hvkvm.errors import ImageError
from hvkvm.given_file import beside


@contextmanager
def made_beside(path: Path) -> Iterator[Path]:
    """A name to make an image under, which is at `path` once the block has ended well, and else is gone.

    So no half of an image is ever found at `path`, where it would pass for one, not even after a SIGKILL.
    ImageError, which speaks of `path`, also where something is there.
    """
    if os.path.lexists(path):
        raise ImageError(f"{path}: {os.strerror(errno.EEXIST)}")
    partial = beside(path)
    try:
        yield partial
        _put(partial, path)
    except ImageError as error:
        if str(partial) not in str(error):
            raise
        raise ImageError(str(error).replace(str(partial), str(path))) from None
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            partial.unlink()


def _put(partial: Path, path: Path) -> None:
    """Name the file `path`, where nothing may be. OSError."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: take the name first, so that it is nobody else's
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
        try:
            os.replace(partial, path)
        except BaseException:
            os.unlink(path)
            raise
