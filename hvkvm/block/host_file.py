"""A file or block device of the host: opened, locked, read, written, made stable, punched.

Why a class of its own: raw disks, VHDX files and overlays all stand on it, so O_DIRECT's alignment, the
lock and what a failed fsync means are settled once.

Any thread may call; a worker's call blocks on the device.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
from mmap import PAGESIZE, mmap
from pathlib import Path

from hvkvm.block.buffers import Buffers, Cutter, is_zeros, read_fully, size_of, write_fully, zeros
from hvkvm.block.file_now import FileNow
from hvkvm.errors import ImageError
from hvkvm.given_file import FLOCK
from hvkvm.memory.page_vector import PageVector

_KEEP_SIZE = 1
_PUNCH_HOLE = 2
_ZERO_RANGE = 16
_BLKSSZGET = 0x1268

# CDLL gives the GIL away: a discard may take seconds.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

_CANNOT = frozenset((errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV, errno.ENOTTY))

# QEMU's bytes for its locks of image files (block/file-posix.c), so that each keeps the other out: a reader
# holds "reads" and "nobody else writes"; our writer holds the whole file.
_LOCK_READS = 100
_LOCK_NO_WRITERS = 201


class HostFile:
    """`path`, opened and locked. ImageError with the reason; the lock goes with `close()`."""

    def __init__(self, path: Path, *, read_only: bool, direct: bool = False, create: bool = False) -> None:
        self.path = path
        self.read_only = read_only
        flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
        flags |= os.O_DIRECT if direct else 0
        flags |= os.O_CREAT | os.O_EXCL if create else 0
        try:
            self.fd = os.open(path, flags, 0o644)
        except OSError as error:
            raise ImageError(_why_not(path, error, direct, read_only)) from None
        try:
            mode = os.fstat(self.fd).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
                raise ImageError(f"{path}: neither a file nor a block device; name an image")
            self.is_device = stat.S_ISBLK(mode)
            self._lock()
            self.alignment = self._find_alignment() if direct else 1
        except BaseException:
            os.close(self.fd)
            if create:
                os.unlink(path)
            raise
        self.now = FileNow(self.fd, able=not direct)
        """What the page cache does at once; the I/O loop's."""
        self._sync_error: OSError | None = None

    def size(self) -> int:
        """Bytes in it, just now. OSError."""
        return os.lseek(self.fd, 0, os.SEEK_END) if self.is_device else os.fstat(self.fd).st_size

    def readv(self, offset: int, buffers: Buffers) -> int:
        """Fill `buffers`; fewer bytes only at the file's end. OSError."""
        if self.alignment > 1 and not self._aligned(buffers):
            n = size_of(buffers)
            view = _bounce(n)
            got = read_fully(self.fd, [view], offset)
            at = 0
            for buffer in Cutter(buffers).take(got):
                buffer[:] = view[at : at + len(buffer)]
                at += len(buffer)
            return got
        return read_fully(self.fd, buffers, offset)

    def writev(self, offset: int, buffers: Buffers, *, stable: bool = False) -> int:
        """Write all of `buffers`; with `stable` they are on the device afterwards. OSError."""
        if stable:
            self._check_sync()
        flags = os.RWF_DSYNC if stable else 0
        try:
            if self.alignment > 1 and not self._aligned(buffers):
                n = size_of(buffers)
                view = _bounce(n)
                at = 0
                for buffer in buffers:
                    view[at : at + len(buffer)] = buffer
                    at += len(buffer)
                done = write_fully(self.fd, [view], offset, flags)
            else:
                done = write_fully(self.fd, buffers, offset, flags)
        except OSError as error:
            if stable and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                self._sync_error = error
            raise
        if done < size_of(buffers):
            raise OSError(errno.EIO, f"{self.path}: the host wrote nothing more")
        return done

    def pread(self, offset: int, n: int) -> bytes:
        """A copy of `n` bytes; fewer at the file's end. Any offset, with O_DIRECT, too. OSError."""
        skip = offset % self.alignment
        whole = _round_up(skip + n, self.alignment)
        view = _bounce(whole)
        got = read_fully(self.fd, [view], offset - skip)
        return bytes(view[skip : min(got, skip + n)])

    def pwrite(self, offset: int, data: bytes) -> None:
        """Write all of `data`; whole sectors for O_DIRECT. OSError."""
        self.writev(offset, [memoryview(data)])

    def sync(self) -> None:
        """Make stable what was written (fdatasync). OSError.

        For ever after one failure: Linux drops the pages that could not be written, and a second fdatasync
        that succeeds would say nothing about them.
        """
        self._check_sync()
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            self._sync_error = error
            raise

    def punch(self, offset: int, length: int) -> bool:
        """Make a hole that reads as zeros; False where the host cannot. OSError."""
        return self._fallocate(_PUNCH_HOLE | _KEEP_SIZE, offset, length)

    def zero(self, offset: int, length: int, *, may_unmap: bool) -> None:
        """Make a range read as zeros, as cheaply as the host can. OSError."""
        if may_unmap and self._fallocate(_PUNCH_HOLE | _KEEP_SIZE, offset, length):
            return
        if self._fallocate(_ZERO_RANGE | _KEEP_SIZE, offset, length):
            return
        self.writev(offset, zeros(length))

    def allocate(self, offset: int, length: int) -> bool:
        """Take space for a range, beyond the end too; False where the host cannot say. OSError: ENOSPC."""
        return self._fallocate(0, offset, length)

    def truncate(self, size: int) -> None:
        """Make it `size` bytes; new ones read as zeros. OSError."""
        os.ftruncate(self.fd, size)

    def close(self) -> None:
        """Close and unlock. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _check_sync(self) -> None:
        if self._sync_error is not None:
            error = self._sync_error
            text = f"writing back failed before ({error.strerror}), and what was written may be lost"
            raise OSError(error.errno or errno.EIO, text)

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        while _libc.fallocate(self.fd, mode, offset, length):
            number = ctypes.get_errno()
            if number in _CANNOT:
                return False
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number))
        return True

    def _aligned(self, buffers: Buffers) -> bool:
        mask = self.alignment - 1
        if type(buffers) is PageVector:
            return buffers.is_aligned(self.alignment)
        return not any(len(one) & mask or _address_of(one) & mask for one in buffers)

    def _find_alignment(self) -> int:
        """What O_DIRECT wants of offsets, lengths and addresses: what the device says, or 512 to 4096."""
        if self.is_device:
            answer = fcntl.ioctl(self.fd, _BLKSSZGET, b"\0" * 4)
            return max(512, int.from_bytes(answer, "little"))
        with mmap(-1, PAGESIZE) as page, memoryview(page) as view:
            for alignment in (512, 1024, 2048):
                try:
                    os.preadv(self.fd, [view[alignment : 2 * alignment]], alignment)
                    return alignment
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise ImageError(f"{self.path}: {error.strerror}") from None
        return 4096

    def _lock(self) -> None:
        """An open-file-description lock, as QEMU's: it goes when the fd is closed, in a crash too."""
        ranges = ((_LOCK_READS, 1), (_LOCK_NO_WRITERS, 1)) if self.read_only else ((0, 0),)
        kind = fcntl.F_RDLCK if self.read_only else fcntl.F_WRLCK
        for start, length in ranges:
            try:
                fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    to = "writes to" if self.read_only else "uses"
                    raise ImageError(
                        f"{self.path}: another program {to} it; end that, or use a copy"
                    ) from None
                if error.errno not in _CANNOT and error.errno != errno.ENOLCK:
                    raise ImageError(f"{self.path}: cannot be locked: {error.strerror}") from None


def _bounce(n: int) -> memoryview:
    """`n` bytes at a page of their own. Nobody closes them: the traceback of an error has views of them."""
    return memoryview(mmap(-1, max(PAGESIZE, _round_up(n, PAGESIZE))))[:n]


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def _address_of(buffer: memoryview) -> int:
    """Where it begins, as far as alignment goes: 1 if ctypes will not show it, so that it is copied."""
    if buffer.readonly or not len(buffer):
        return 0 if is_zeros(buffer) else 1
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _why_not(path: Path, error: OSError, direct: bool, read_only: bool) -> str:
    if direct and error.errno == errno.EINVAL:
        return f"{path}: its file system has no O_DIRECT; leave out cache=none"
    if not read_only and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"{path}: {error.strerror}; say readonly=on to read it only"
    return f"{path}: {error.strerror}"
