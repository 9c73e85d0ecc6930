"""The files of a matrix's results: looked at before its first case runs, written when the last has ended.

What was there is replaced by a file that is whole, so that older results outlast a full disk. What can only
be written where it is, such as a pipe, is open in between: its reader ends when nobody has it open.

Main thread.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

from hvkvm import given_file
from hvkvm.errors import ConfigError

WRITE_SECONDS = 10.0
"""How long the reader of a pipe may take for a result."""

_NOT_REPLACED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.ENOENT)
"""Errors of a folder that takes no file, or of a file mounted by itself: it can be written as it is."""


class ResultFile:
    """The file at `path`, which `flag` names. ConfigError where it is plain that nothing can be written."""

    def __init__(self, flag: str, path: Path) -> None:
        self.path = path
        # A link stays, and leads to the new file.
        self._target = Path(os.path.realpath(path))
        self._file = given_file.open_to_write(path, f"{flag} ")
        try:
            os.write(self._file.fd, b"")  # /dev/full and files of /proc say at once that they take nothing
            if stat.S_ISREG(os.fstat(self._file.fd).st_mode):
                self.close()
        except OSError as error:
            self.close()
            raise ConfigError(f"{flag} {path}: {error.strerror}; name a file that can be written") from None

    @property
    def has_results(self) -> bool:
        """Whether a file is there with something in it."""
        try:
            found = os.stat(self.path)
        except OSError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size > 0

    def write(self, data: bytes) -> None:
        """Write `data` in place of what was there. OSError."""
        if self._file.fd >= 0:
            self._file.begin()
            given_file.write_in_time(self._file.fd, data, WRITE_SECONDS)
        elif self._is_our_output():
            given_file.write_at_once(self.path, data, WRITE_SECONDS)
        else:
            try:
                self._replace(data)
            except OSError as error:
                if error.errno not in _NOT_REPLACED or not os.path.exists(self._target):
                    raise
                given_file.write_at_once(self._target, data, WRITE_SECONDS)

    def close(self) -> None:
        """Let go of what can only be written where it is. Idempotent."""
        self._file.close()

    def _is_our_output(self) -> bool:
        """Whether the table goes to the same file (/dev/stdout, say): it would go to one without a name."""
        with suppress(OSError):
            found = os.stat(self.path)
            return any(os.path.samestat(found, os.fstat(fd)) for fd in (1, 2))
        return False

    def _replace(self, data: bytes) -> None:
        given_file.check_replaceable(self._target)
        partial = given_file.beside(self._target)
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            try:
                self._keep_mode(fd)
                given_file.write_in_time(fd, data, WRITE_SECONDS)
                os.fsync(fd)  # its name may else be stable before its bytes are
            finally:
                os.close(fd)
            os.replace(partial, self._target)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise

    def _keep_mode(self, fd: int) -> None:
        try:
            found = os.stat(self._target)
        except FileNotFoundError:
            return
        with suppress(OSError):  # who may not give files away has one of his own in its place
            os.fchown(fd, found.st_uid, found.st_gid)
        os.fchmod(fd, stat.S_IMODE(found.st_mode))
