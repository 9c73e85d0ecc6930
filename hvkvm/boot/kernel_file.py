"""A file that is loaded into guest RAM: read by offset, never past its end.

Why: kernels and initrds come from users and may be missing, truncated or
change while they are read; here that becomes a BootError that names the flag.
Data goes from the page cache into guest RAM with one copy, inside the kernel.
Called by the loaders; the thread that loads owns it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import TracebackType

from hvkvm.boot.layout import GuestRam
from hvkvm.errors import BootError
from hvkvm.given_file import open_at_once

_READ_AT_ONCE = 1 << 30  # Linux moves at most 2 GiB - 4 KiB a call


class KernelFile:
    """An open regular file given by `flag` ("--kernel", "--initrd").

    Raises BootError when it is missing, a directory, unreadable or empty.
    """

    def __init__(self, path: Path, flag: str, *, shown: Path | None = None) -> None:
        """`shown` is the path for people, where `path` is a cached piece of it."""
        self.path = shown or path
        self.flag = flag
        try:
            self._fd = open_at_once(path)
        except FileNotFoundError:
            raise BootError(f"{flag} {path}: no such file; check the path") from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise BootError(f"{flag} {path}: {reason}; give a file that can be read") from None
        try:
            status = os.fstat(self._fd)
            if stat.S_ISDIR(status.st_mode):
                raise BootError(f"{flag} {path}: is a directory; name the file in it")
            if not stat.S_ISREG(status.st_mode):
                raise BootError(f"{flag} {path}: is not a regular file; copy it to one first")
            if status.st_size == 0:
                raise BootError(f"{flag} {path}: is empty; build or copy it again")
        except BaseException:
            os.close(self._fd)
            raise
        self.size = status.st_size

    def __enter__(self) -> KernelFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; further reads fail."""
        os.close(self._fd)

    def head(self, n: int) -> bytes:
        """The first `n` bytes, fewer when the file is shorter."""
        return os.pread(self._fd, min(n, self.size), 0)

    def read(self, offset: int, n: int, what: str) -> bytes:
        """`n` bytes at `offset`; BootError when the file has not that much."""
        self._check(offset, n, what)
        data = os.pread(self._fd, n, offset)
        if len(data) != n:
            raise self.truncated(what)
        return data

    def copy_to(self, memory: GuestRam, gpa: int, offset: int, n: int, what: str) -> None:
        """Copy `n` bytes at `offset` of the file to guest address `gpa`, all inside RAM below 4 GiB."""
        self._check(offset, n, what)
        while n:
            at_once = min(n, _READ_AT_ONCE)
            try:
                done = memory.fill(gpa, at_once, self._fd, offset)
            except OSError:  # not every file system can splice
                with memory.view(gpa, at_once) as window:
                    done = os.preadv(self._fd, [window], offset)
            if done == 0:  # it shrank since the check
                raise self.truncated(what)
            gpa, offset, n = gpa + done, offset + done, n - done

    def _check(self, offset: int, n: int, what: str) -> None:
        if offset < 0 or n < 0 or offset + n > self.size:
            raise self.truncated(what)

    def truncated(self, what: str) -> BootError:
        """The error for `what` lying past the end of the file."""
        return self.error(f"is truncated: {what} lies past its {self.size} bytes", "copy or build it again")

    def error(self, reason: str, remedy: str) -> BootError:
        """A BootError about this file, in the one form all have."""
        return BootError(f"{self.flag} {self.path}: {reason}; {remedy}")


class Payload:
    """An initrd or module: a file, or bytes made in this process.

    `size` in bytes; `name` leads messages, `label` is what the guest may read.
    Raises BootError for a file that cannot be read.
    """

    def __init__(self, source: bytes | bytearray | memoryview | Path, flag: str = "--initrd") -> None:
        self._file: KernelFile | None = None
        self._data = memoryview(b"")
        if isinstance(source, Path):
            self._file = KernelFile(source, flag)
            self.size = self._file.size
            self.name, self.label = f"{flag} {source}", source.name
        else:
            self._data = memoryview(source).cast("B")
            self.size = len(self._data)
            self.name, self.label = flag, "initrd"

    def __enter__(self) -> Payload:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def copy_to(self, memory: GuestRam, gpa: int) -> None:
        """Copy all of it to `gpa`, inside RAM below 4 GiB."""
        if self._file is not None:
            self._file.copy_to(memory, gpa, 0, self.size, "its content")
        else:
            memory.write(gpa, self._data)
