"""The file in which a machine's firmware variables are kept: one machine's at a time, and always whole.

Each change replaces the file, so whenever this process or its host dies it holds variables as they were at
one moment. Who has it holds a lock (flock) on the file, and takes the lock of the next one before that gets
the name: so there is no moment without, and nothing is left behind that would have to be removed. A symbolic
link stays one: what it leads to is locked and replaced.

Owner: whoever made it, and one thread at a time that replaces. Blocks.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path

from hvkvm.boot.firmware import variables_size
from hvkvm.errors import BootError
from hvkvm.given_file import open_at_once

_TRIES = 100
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""A file system without locks: then nobody keeps two machines apart."""


class VariablesFile:
    """`path`, made from `template` if it is not there yet or empty. BootError in one line."""

    def __init__(self, path: Path, template: bytes) -> None:
        self._fd = -1
        try:
            self.path = Path(os.path.realpath(path))  # or the folder that we are in is gone
            self._fd = _locked(self.path)
            self._check_writable()
            self.content = self._read(template)
        except OSError as error:
            self.close()
            raise BootError(
                f"--firmware-vars {path}: {error.strerror}; name a file that can be made"
            ) from None
        except BootError as error:
            self.close()
            raise BootError(f"--firmware-vars {path}: {error}") from None

    def _check_writable(self) -> None:
        """Who cannot keep variables says so now, and not once the guest has changed some. BootError."""
        for what, path in (("it", self.path), ("its folder", self.path.parent)):
            if not os.access(path, os.W_OK):
                raise BootError(f"this user may not write {what}; name one that can be replaced")

    def _read(self, template: bytes) -> bytes:
        """What the file holds. BootError, OSError."""
        found = os.pread(self._fd, len(template) + 1, 0)
        if not found:
            self.replace(template)
            found = template
        if len(found) != len(template) or variables_size(found) != len(template):
            raise BootError(
                f"not the variables of this firmware, which take {len(template)} bytes;"
                " name another file, or one that is not there yet"
            )
        return found

    def replace(self, content: bytes) -> None:
        """Whoever opens the file finds the old variables or these. OSError."""
        path = self.path
        beside = path.with_name(f".{path.name}.new")
        with suppress(FileNotFoundError):
            beside.unlink()  # of somebody who was killed: whoever has the lock is the only one here
        fd = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _lock(fd)
            with suppress(FileNotFoundError):
                os.fchmod(fd, path.stat().st_mode & 0o777)
            view = memoryview(content)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
            os.replace(beside, path)
        except BaseException:
            with suppress(OSError):
                beside.unlink()
            os.close(fd)
            raise
        os.close(self._fd)
        self._fd = fd

    def close(self) -> None:
        """Let others have it. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _locked(path: Path) -> int:
    """The file, open and locked. BootError where another machine has it, OSError."""
    for _ in range(_TRIES):
        fd = _opened(path)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise BootError("no regular file; name one, or one that is not there yet")
            _lock(fd)
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        except BlockingIOError:
            os.close(fd)
            break
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # another file has the name by now, and whoever put it there its lock
    raise BootError("in use by another machine; give each a file of its own")


def _opened(path: Path) -> int:
    try:
        return open_at_once(path)
    except FileNotFoundError:
        return os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _lock(fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
