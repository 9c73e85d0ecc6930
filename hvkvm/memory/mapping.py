"""A shared file mapping that hands out zero-copy views and can take them back.

Why: `mmap.mmap` cannot be closed while a view of it lives, cannot be placed
MAP_FIXED and cannot be aligned. Here the kernel mapping lives as long as the
last Python buffer on it, so no order of closing can leave a buffer dangling.

Owner: the thread that made the object closes it; views
may be read and written from any thread.

Without a GIL two threads must not cut slices of one memoryview: all slices and casts
of it count in one managed buffer, whose count is no atomic in any CPython up to 3.15
(gh-155606). A lost count ends the buffer early, and every use of it is a ValueError
then. So `root` and the words are for accesses to items and for writing to slices, which
count nothing; who reads takes a copy (`read`), and there each view has its own buffer.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import weakref
from collections import deque
from collections.abc import Iterator
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED, PAGESIZE, PROT_READ, PROT_WRITE

from hvkvm.memory.atomics import FREE_THREADED

PAGE_SIZE = 4096
"""Size of a guest page and of an overlay, bytes."""

# From asm-generic/mman.h; Python's mmap module has no names for them.
_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_MADV_HUGEPAGE = 14
_MAP_FAILED = ctypes.c_void_p(-1).value

_PRUNE_AT = 256
"""So many views are remembered before the first look for dead ones among them."""

# CDLL releases the GIL: remapping pages of a running guest waits for KVM's MMU notifiers.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def punch(fd: int, offset: int, size: int) -> bool:
    """Give a file's pages back, which makes them zero in every mapping; False where that cannot be done.

    `offset` and `size` are multiples of PAGE_SIZE. What is a hole already costs nothing.
    """
    return not _libc.fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, size)


def _mmap(address: int | None, size: int, prot: int, flags: int, fd: int = -1, offset: int = 0) -> int:
    result = _libc.mmap(address, size, prot, flags, fd, offset)
    if result is None or result == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"mmap of {size} bytes: {os.strerror(number)}")
    return int(result)


def _munmap(address: int, size: int) -> None:
    if size:
        _libc.munmap(address, size)


def _reserve(size: int, align: int) -> int:
    """Reserve `size` bytes of address space on an `align` boundary; the caller maps over it."""
    if align <= PAGESIZE:
        return _mmap(None, size, _PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | _MAP_NORESERVE)
    start = _mmap(None, size + align, _PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | _MAP_NORESERVE)
    hva = -(-start // align) * align
    _munmap(start, hva - start)
    _munmap(hva + size, start + align - hva)
    return hva


def sealed_memfd(name: str, size: int) -> int:
    """A memfd of exactly `size` bytes that nobody can shrink under a mapping (a shrink means SIGBUS)."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def data_stretches(fd: int, offset: int, size: int) -> Iterator[tuple[int, int]]:
    """The parts of `size` bytes of a file from `offset` that are no holes: (from, up to), in order. OSError.

    Asked of the file, since looking at a hole through a shared map fills it.
    """
    at, limit = offset, offset + size
    while at < limit:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # a hole up to the end
            raise
        if at < limit:
            end = min(os.lseek(fd, at, os.SEEK_HOLE), limit)
            yield at, end
            at = end


class Mapping:
    """`size` bytes of `fd` from `offset`, mapped shared and writable at `hva` (a multiple of `align`).

    Raises OSError when the kernel refuses. `fd` stays the caller's; `show()`
    needs it open.
    """

    def __init__(self, fd: int, offset: int, size: int, *, align: int = PAGE_SIZE) -> None:
        self.fd = fd
        self.offset = offset
        self.size = size
        self.hva = hva = _reserve(size, align)
        try:
            self.restore(0, size)
        except BaseException:
            _munmap(hva, size)
            raise
        array = (ctypes.c_char * size).from_address(hva)
        # Every view of this mapping, and every view of such a view, keeps `array` alive through a
        # managed buffer: so the kernel mapping goes when the last of them does, never before.
        self._alive = weakref.ref(array)
        weakref.finalize(array, _munmap, hva, size).atexit = False
        self._array: ctypes.Array[ctypes.c_char] | None = array
        self.root = memoryview(array).cast("B")
        """Every byte, to be written to by any thread. Released by `close()`."""
        words = size - size % 8
        self.words4 = self.root[:words].cast("I")
        """The same bytes as 4-byte words: an item access is one load or one store."""
        self.words8 = self.root[:words].cast("Q")
        self._views: deque[weakref.ref[memoryview]] = deque()
        self._prune_at = _PRUNE_AT

    def prefer_huge_pages(self) -> None:
        """Have the kernel take pages of 2 MiB where it may: one fault and one nested mapping each, not 512.

        For a memfd that is where /sys/kernel/mm/transparent_hugepage/shmem_enabled is `advise` or more.
        """
        _libc.madvise(self.hva, self.size, _MADV_HUGEPAGE)

    def show(self, at: int, size: int, fd: int, offset: int) -> None:
        """Atomically present `size` bytes of `fd` from `offset` at byte `at` of this mapping.

        MAP_FIXED replaces the old pages under the mm's write lock, and a fault of
        any vCPU that comes in between waits for that lock: it meets the old page
        or the new one, never a hole. Raises OSError.
        """
        self._present(at, size, fd, offset, MAP_SHARED)

    def restore(self, at: int, size: int) -> None:
        """Undo `show()`: present the mapping's own file again. Raises OSError."""
        self._present(at, size, self.fd, self.offset + at, MAP_SHARED)

    def _present(self, at: int, size: int, fd: int, offset: int, sharing: int) -> None:
        flags = sharing | _MAP_FIXED | _MAP_NORESERVE
        _mmap(self.hva + at, size, PROT_READ | PROT_WRITE, flags, fd, offset)

    def stretches(self) -> Iterator[tuple[int, int]]:
        """The parts that may hold something else than zeros: (from, up to), in order. OSError."""
        for start, end in data_stretches(self.fd, self.offset, self.size):
            yield start - self.offset, end - self.offset

    def under(self, at: int, size: int) -> bytes:
        """The mapping's own bytes, whatever is shown over them."""
        return os.pread(self.fd, size, self.offset + at)

    def view(self, at: int, size: int) -> memoryview:
        """A zero-copy view that `close()` revokes. The caller has checked the bounds."""
        view = self._own_view(at, size) if FREE_THREADED else self.root[at : at + size]
        self._views.append(weakref.ref(view))
        if len(self._views) > self._prune_at:
            self._prune()
        return view

    def _own_view(self, at: int, size: int) -> memoryview:
        """A view with a managed buffer of its own, for some 200 ns more than a slice takes."""
        array = self._array
        if array is None:
            raise ValueError("this mapping is closed")
        return memoryview(array).cast("B")[at : at + size]

    def read(self, at: int, size: int) -> bytes:
        """A copy. The caller has checked the bounds. ValueError when closed."""
        array = self._array
        if array is None:
            raise ValueError("this mapping is closed")
        return array[at : at + size]  # type: ignore[return-value]  # bytes, of an array of c_char

    def _prune(self) -> None:
        """Forget the views that are gone. Each step is atomic: threads that add meanwhile lose none."""
        views = self._views
        for _ in range(len(views)):
            try:
                reference = views.popleft()
            except IndexError:  # another thread prunes too
                break
            if reference() is not None:
                views.append(reference)
        self._prune_at = max(_PRUNE_AT, 2 * len(views))

    def close(self) -> None:
        """Revoke every view, then unmap. Idempotent.

        A revoked memoryview raises ValueError on use. What Python cannot revoke
        (a slice of a view, a ctypes structure on one) falls on private zero pages
        instead, which stay mapped until it is dropped; guest memory is out of its
        reach then. Where the kernel has none to give, such a holder keeps what it has.
        Holders of bare addresses must be gone before.
        """
        self._array = None
        views = [reference() for reference in self._views.copy()]
        for view in (*views, self.words4, self.words8, self.root):
            if view is not None:
                with contextlib.suppress(BufferError):
                    view.release()
        del view, views
        held = self._alive()  # from here on: nobody else may have the addresses before they are covered
        if held is not None:
            flags = MAP_PRIVATE | MAP_ANONYMOUS | _MAP_FIXED | _MAP_NORESERVE
            with contextlib.suppress(OSError):
                _mmap(self.hva, self.size, PROT_READ | PROT_WRITE, flags)
