"""Files that a user names: opened, read and written without waiting, replaced only where they are files.

`open(2)` of a FIFO waits for its other end: a wrong name would be a run that hangs and does not say why.
What may be a pipe (a text of settings, say) is not read by this module.

Before Python 3.14 `Path.is_dir` and `Path.exists` raise OSError for a name that is too long or lies in a
folder that this user may not enter. `os.path` has those that do not. Any thread.
"""

from __future__ import annotations

import errno
import os
import select
import stat
from contextlib import suppress
from pathlib import Path
from struct import Struct
from time import monotonic, sleep

from hvkvm.errors import ConfigError

FLOCK = Struct("hhqqi4x")
"""`struct flock` of fcntl(2): kind, whence, first byte, how many (0: all that follow), 0."""

_IMAGE_LOCKS = (100, 200)
"""First and number of the bytes that stand for uses of a disk's image (QEMU's block/file-posix.c)."""
_IN_USE = "is the image of a disk that is in use"
_LOCK_PAUSE = 0.03


def open_at_once(path: Path) -> int:
    """An fd to read `path`, also of what is no file: a FIFO without a writer just has no bytes. OSError."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)


def read(path: Path, most: int = -1) -> bytes:
    """Its bytes, `most` of them at most. OSError; EINVAL, with words of its own, for no regular file."""
    fd = open_at_once(path)
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, "is not a regular file")
        with open(fd, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(fd)


def check_replaceable(path: Path) -> None:
    """A file may be renamed to `path`, where nothing is yet or a regular file. OSError, EINVAL for others.

    Whoever may write in /dev could else make a file of a device that all use. EBUSY for a disk's image
    that is in use, by whomever.
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
    try:
        fd = open_at_once(path)
    except OSError:  # one that this user may not read can be no disk of his
        return
    try:
        if _is_image_in_use(fd):
            raise OSError(errno.EBUSY, f"{_IN_USE}; name another", str(path))
    finally:
        os.close(fd)


def _is_image_in_use(fd: int) -> bool:
    """Whether somebody has it open as a disk's image, by the locks that QEMU and `block.host_file` take."""
    from fcntl import F_OFD_GETLK, F_UNLCK, F_WRLCK, fcntl

    try:
        # Asking for a lock to write finds locks to read, too, and needs no permission to write.
        found = fcntl(fd, F_OFD_GETLK, FLOCK.pack(F_WRLCK, os.SEEK_SET, *_IMAGE_LOCKS, 0))
    except OSError:  # a file system without locks
        return False
    return bool(FLOCK.unpack(found)[0] != F_UNLCK)


def beside(path: Path) -> Path:
    """A name beside `path` for what is renamed to it once it is whole: not too long, and nobody else's.

    No process id: threads share it, in containers every run may have the same, and what was killed left one.
    """
    # 50 characters are 200 bytes at most, of 255.
    return path.with_name(f".{path.name[:50]}.{os.urandom(4).hex()}.partial")


def make_name_stable(path: Path) -> None:
    """What was renamed to `path` has that name after a power cut, too. OSError where that cannot be had."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class OutputFile:
    """A file that a run writes: opened early, so that a wrong name is told, and as it was until `begin`.

    OSError: EBUSY for a disk's image that is in use, ENXIO for a pipe without its reader. `fd` does not
    block, and is its owner's alone to make blocking.
    """

    def __init__(self, path: Path, mode: int = 0o666) -> None:
        self.path = path
        self._begun = self._made = False
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            self.fd = os.open(path, flags | os.O_EXCL, mode)
            self._made = True
        except FileExistsError:
            try:
                self.fd = os.open(path, flags, mode)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    raise OSError(errno.ENXIO, "nobody reads this pipe") from None
                raise
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        kind = os.fstat(self.fd).st_mode
        if (stat.S_ISREG(kind) or stat.S_ISBLK(kind)) and _is_image_in_use(self.fd):
            raise OSError(errno.EBUSY, _IN_USE)

    def begin(self) -> None:
        """Take what a regular file held: the run has begun. OSError; EBUSY as above, if it is one by now."""
        self._check()
        self._begun = True
        if stat.S_ISREG(os.fstat(self.fd).st_mode):
            os.ftruncate(self.fd, 0)

    def close(self) -> None:
        """Close it. One that was made here and never begun goes, too. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd < 0:
            return
        with suppress(OSError):
            if self._made and not self._begun and os.path.samestat(os.fstat(fd), os.lstat(self.path)):
                os.unlink(self.path)
        os.close(fd)


def open_to_write(path: Path, flag: str, mode: int = 0o666) -> OutputFile:
    """The file that `flag`, with the character behind it, names for a run to write. ConfigError."""
    try:
        return OutputFile(path, mode)
    except OSError as error:
        remedy = "start its reader first" if error.errno == errno.ENXIO else "name a file that can be written"
        raise ConfigError(f"{flag}{path}: {error.strerror}; {remedy}") from None


def write_at_once(path: Path, data: bytes, seconds: float) -> None:
    """Make or empty the file, and write it in time. OSError; ENXIO for a pipe that nobody reads."""
    file = OutputFile(path)
    try:
        file.begin()
        write_in_time(file.fd, data, seconds)
    finally:
        file.close()


def write_in_time(fd: int, data: bytes, seconds: float) -> None:
    """Write all of `data` to an fd that does not block. OSError; ETIMEDOUT after `seconds` without room."""
    view = memoryview(data)
    end = monotonic() + seconds
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            left = end - monotonic()
            if left <= 0:
                raise OSError(errno.ETIMEDOUT, "is not read") from None
            poller.poll(left * 1000)


def lock_in_time(fd: int, how: int, seconds: float) -> bool:
    """Whether the lock of flock(2) was had within `seconds`: others may keep it, stopped say. OSError."""
    from fcntl import LOCK_NB, flock

    end = monotonic() + seconds
    while True:
        try:
            flock(fd, how | LOCK_NB)
            return True
        except BlockingIOError:
            if monotonic() >= end:
                return False
            sleep(_LOCK_PAUSE)


def why_no_folder(folder: Path) -> str:
    """Why `folder` is none that this user could use, with the remedy; "" where it is one."""
    try:
        if stat.S_ISDIR(os.stat(folder).st_mode):
            return ""
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        remedy = "name a folder that this user may enter" if error.errno == errno.EACCES else "name another"
        return f"{folder}: {error.strerror}; {remedy}"
    return f"no folder {folder}; create it, or name another"


def why_no_place(path: Path) -> str:
    """Why no file can be made at `path`, as far as looking tells, with the remedy; "" where one can."""
    if os.path.isdir(path):
        return "is a directory; name a file in it"
    if why := why_no_folder(path.parent):
        return why
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        return f"{error.strerror}; name another"
    return ""
