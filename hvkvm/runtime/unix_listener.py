"""Unix sockets that listen at a path: the name taken, told from others' and given back.

Why: a process that was killed leaves its socket's file behind. Whoever wants the
name next may replace that, and must not replace the socket of one that lives, of
one that is about to listen, or a file of another kind. A lock on the folder keeps
two that start at once from taking each other's socket for a dead one's.

What comes to it is `acceptor`'s. Any thread.
"""

from __future__ import annotations

import _socket  # of `socket`, which takes milliseconds to import: every run would have them at its start
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hvkvm.errors import NameTaken
from hvkvm.given_file import lock_in_time

MAX_PATH = 107
"""Bytes of a Unix socket's path, the NUL not counted."""

LOCK_SECONDS = 3.0
"""Whoever starts or looks holds the lock for less than a millisecond."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Alone in `folder`. OSError, also when another process keeps its lock, stopped in there say."""
    from fcntl import LOCK_EX

    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not lock_in_time(fd, LOCK_EX, LOCK_SECONDS):
            raise OSError(errno.EBUSY, f"another process keeps {folder} locked")
        yield
    finally:
        os.close(fd)


def dead(path: Path) -> bool:
    """Whether `path` is a socket that nobody listens at. OSError if it is not there."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    probe = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        probe.setblocking(False)
        return probe.connect_ex(str(path)) == errno.ECONNREFUSED
    finally:
        probe.close()


def listen_fd(path: Path, backlog: int, mode: int | None = None) -> int:
    """A socket that listens at `path`, non-blocking; a dead process's socket there is replaced.

    `mode` is the file's, None for what the umask leaves. NameTaken, or OSError
    for a path that cannot be bound.
    """
    if len(os.fsencode(path)) > MAX_PATH:
        raise OSError(errno.ENAMETOOLONG, f"longer than the {MAX_PATH} bytes of a socket's path")
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        with locked(path.parent):
            try:
                listener.bind(str(path))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                if not stat.S_ISSOCK(os.lstat(path).st_mode):  # a link to a socket is none
                    raise NameTaken("exists and is no socket", "remove it") from None
                if not dead(path):
                    raise NameTaken("another program listens there", "end it") from None
                path.unlink()
                listener.bind(str(path))
            try:
                if mode is not None:
                    # Nobody can connect before listen(), so nobody finds it with another mode.
                    os.chmod(path, mode)
                listener.listen(backlog)
            except BaseException:
                path.unlink()
                raise
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener.detach()


Identity = tuple[int, int, int]
"""The file's device and number, and the process whose it is."""


def identity(path: Path) -> Identity | None:
    """What tells our socket's file from a successor's, while our socket is open; None when there is none.

    Once it is closed, the file system may give its number to the successor. A
    forked child's is another one: what its parent made is not its own to remove.
    """
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, os.getpid()


def remove(path: Path, owned: Identity | None) -> None:
    """Unlink our socket's file before closing it, unless another lies there by now. Raises nothing."""
    try:
        with locked(path.parent):
            if owned is not None and identity(path) == owned:
                path.unlink()
    except OSError:
        return
