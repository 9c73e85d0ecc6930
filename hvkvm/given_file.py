"""Files that a user names: opened and read without waiting for anybody, replaced only where they are files.

`open(2)` of a FIFO waits for its writer: a wrong name would be a run that hangs and does not say why.
What may be a pipe (a text of settings, say) is not read by this module. Any thread.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def open_at_once(path: Path) -> int:
    """An fd to read `path`, also of what is no file: a FIFO without a writer just has no bytes. OSError."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)


def read(path: Path, most: int = -1) -> bytes:
    """Its bytes, `most` of them at most. OSError; EINVAL, with words of its own, for no regular file."""
    fd = open_at_once(path)
    with open(fd, "rb") as file:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, "is not a regular file")
        return file.read(most)


def check_replaceable(path: Path) -> None:
    """A file may be renamed to `path`, where nothing is yet or a regular file. OSError, EINVAL for others.

    Whoever may write in /dev could else make a file of a device that all use.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise OSError(
            errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL,
            "is not a regular file; name another",
            str(path),
        )
