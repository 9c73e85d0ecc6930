"""Reads and writes of a host's file that wait for nothing: the page cache answers, or says that it cannot.

RWF_NOWAIT is what a file system has for that. A tmpfs has none, and needs none until the host is short of
memory: then a read waits for the swap, and a write until pages are free. Both are slow, but so is everything
where others want the processor: a slow call is a reason to look closer, and not to do without for good.

Owner: the I/O loop.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from time import monotonic

from hvkvm.block.buffers import IOV_MAX, Buffers
from hvkvm.memory.page_vector import PageVector

SLOW_SECONDS = 0.02
"""A call in memory that takes longer may have waited for memory, or for a processor."""

SUSPECTED = 256
"""So many reads after such a one are watched: whether one that takes as long comes from a device."""

PAUSE = 50.0
"""So many times as long as a slow write took the next ones are left to workers."""

_TMPFS_MAGIC = 0x01021994
_NEVER = frozenset((errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL))
_libc = ctypes.CDLL(None, use_errno=True)


class FileNow:
    """The file `fd`; not `able` if it is of a kind that always waits, as with O_DIRECT."""

    __slots__ = ("_in_memory", "_paused_until", "_reads", "_suspected", "_writes", "fd")

    def __init__(self, fd: int, *, able: bool) -> None:
        self.fd = fd
        self._reads = self._writes = able
        self._in_memory = _in_memory(fd)
        self._suspected = 0
        self._paused_until = 0.0

    def readv(self, offset: int, buffers: Buffers) -> int:
        """Fill `buffers`; fewer bytes where that cannot be at once, -1 where it never can."""
        if not self._reads:
            return -1
        if len(buffers) > IOV_MAX:
            return 0
        try:
            if not self._in_memory:
                if type(buffers) is PageVector:
                    return buffers.read(self.fd, offset, os.RWF_NOWAIT)
                return os.preadv(self.fd, buffers, offset, os.RWF_NOWAIT)
            # What comes from the swap is read from a device by this thread; to look costs as much as to read.
            before = _blocks_read() if self._suspected else -1
            began = monotonic()
            if type(buffers) is PageVector:
                n = buffers.read(self.fd, offset)
            else:
                n = os.preadv(self.fd, buffers, offset)
            slow = monotonic() - began > SLOW_SECONDS
            if slow or self._suspected:
                self._suspect(before, slow)
            return n
        except BlockingIOError:
            return 0
        except OSError:
            self._reads = False  # a file system without it; the error itself comes again from a worker
            return -1

    def writev(self, offset: int, buffers: Buffers) -> int:
        """Write `buffers`; fewer bytes where that cannot be at once, -1 where it never can.

        It can in a tmpfs, and where a file system has RWF_NOWAIT for such writes, as XFS and Btrfs have.
        """
        if not self._writes:
            return -1
        if len(buffers) > IOV_MAX:
            return 0
        try:
            if self._in_memory:
                return self._write_memory(offset, buffers)
            if type(buffers) is PageVector:
                return buffers.write(self.fd, offset, os.RWF_NOWAIT)
            return os.pwritev(self.fd, buffers, offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno in _NEVER:
                self._writes = False
                return -1
            return 0  # a full disk: it comes again from a worker

    def _suspect(self, before: int, slow: bool) -> None:
        """A read that took long, or one that is watched since another did: `before` it, if it was watched."""
        if not slow:
            self._suspected -= 1
            return
        if before >= 0 and _blocks_read() > before:
            self._reads = False
        self._suspected = SUSPECTED

    def _write_memory(self, offset: int, buffers: Buffers) -> int:
        began = monotonic()
        if began < self._paused_until:
            return 0
        if type(buffers) is PageVector:
            n = buffers.write(self.fd, offset)
        else:
            n = os.pwritev(self.fd, buffers, offset)
        took = monotonic() - began
        if took > SLOW_SECONDS:
            self._paused_until = began + PAUSE * took
        return n


def _in_memory(fd: int) -> bool:
    """Whether the file lies in a tmpfs."""
    found = (ctypes.c_long * 32)()  # struct statfs has 120 bytes, and begins with f_type
    return not _libc.fstatfs(fd, found) and found[0] == _TMPFS_MAGIC


def _blocks_read() -> int:
    """How much this thread has read from devices."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_inblock
