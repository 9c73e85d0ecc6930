"""Where files that are costly to make are kept between runs: kernels, modules, warm guests, parcels.

Why: taking a vmlinux out of a bzImage or decompressing modules costs more than
the boot that follows, so the result is kept by a key of its source. Any thread, any number of
processes: a file appears complete (rename) or not at all.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hvkvm import given_file

NO_HOME = "/nonexistent"
"""Where nobody can make a file: for a user that the system does not know, as some of a container's are."""

LOCK_SECONDS = 3.0
"""Whoever looks for what is left keeps the others out for about a millisecond."""


def root() -> Path:
    """The cache folder: `$HVKVM_CACHE`, or `~/.cache/hvkvm`. It need not exist yet.

    A variable that is empty counts as one that is not set. A relative one is meant from the folder that the
    process is in, and what finds a file there later may be in another: so the path is absolute.
    """
    chosen = Path(os.environ.get("HVKVM_CACHE") or Path(os.environ.get("HOME") or _home(), ".cache/hvkvm"))
    try:
        return chosen.absolute()
    except OSError:  # that folder has gone, and what is in it cannot be found anyway
        return chosen


def _home() -> str:
    """The user's home without $HOME: `expanduser` takes it from the system then, but not for an empty one."""
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return NO_HOME


def holds(path: Path) -> bool:
    """Whether the cache has this file. What a crash of the host left without a byte counts as not there."""
    try:
        return os.stat(path).st_size > 0
    except OSError:
        return False


@contextmanager
def filling(folder: Path) -> Iterator[None]:
    """While `*.partial` files are made in `folder`, which is made too. What others left is removed first.

    A signal or a crash ends a process where it stands, and its file stays. So all that fill the folder hold a
    lock of it, and who finds nobody else there takes away what is left. OSError where it cannot be made.

    One that somebody else keeps for himself is filled without it after LOCK_SECONDS: nobody takes anything
    away meanwhile. Only if he lets go while it is being filled may the next one take away what is not whole
    yet, and whoever renames that has FileNotFoundError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # a file system without locks keeps what is left
            with suppress(BlockingIOError):
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for left in folder.glob(".*.partial"):
                    with suppress(OSError):  # another user's
                        left.unlink()
            given_file.lock_in_time(place, fcntl.LOCK_SH, LOCK_SECONDS)
        yield
    finally:
        os.close(place)


def forget_oldest(folder: Path, pattern: str, most: int) -> None:
    """Remove the files of that name beyond the `most` that were written last; others may do so meanwhile.

    Who has mapped one keeps what it has.
    """
    by_age: list[tuple[int, Path]] = []
    for path in folder.glob(pattern):
        with suppress(FileNotFoundError):
            by_age.append((path.stat().st_mtime_ns, path))
    by_age.sort()
    for _when, path in by_age[: max(0, len(by_age) - most)]:
        path.unlink(missing_ok=True)


def publish(path: Path, chunks: Iterable[bytes]) -> None:
    """Write `chunks` to `path` so that readers see the whole file or the one before it.

    Raises OSError (full or read-only disk); nothing half-written stays behind.
    """
    with filling(path.parent):
        partial = given_file.beside(path)
        try:
            with open(partial, "wb") as out:
                for chunk in chunks:
                    out.write(chunk)
                out.flush()
                # Else a file system may give it its name before its bytes, and a crash of the host keeps
                # half a kernel for ever.
                os.fsync(out.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
