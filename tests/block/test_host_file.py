"""What a host's file does when the host refuses: nothing is kept of what was not opened, or lost unsaid."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from disk_asker import page_buffer, read

from hvkvm.block import host_file
from hvkvm.block.host_file import HostFile
from hvkvm.block.image import Extent, ImageOptions
from hvkvm.block.overlay import OverlayImage
from hvkvm.block.raw import RawImage
from hvkvm.errors import ImageError

MIB = 1 << 20
PUNCH, ZERO = 0x3, 0x11
"""FALLOC_FL_PUNCH_HOLE and FALLOC_FL_ZERO_RANGE, each with FALLOC_FL_KEEP_SIZE."""


def failing(number: int) -> Callable[..., object]:
    def fail(*_arguments: object) -> object:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("number", "stable", "sticks"),
    [(errno.EIO, True, True), (errno.EIO, False, False), (errno.ENOSPC, True, False)],
)
def test_a_stable_write_that_fails_is_as_a_failed_fsync(
    file: Path, monkeypatch: pytest.MonkeyPatch, number: int, stable: bool, sticks: bool
) -> None:
    """But for a full host, which says of nothing before that it is lost."""
    image = RawImage(file)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", failing(number))
        with pytest.raises(OSError, match=os.strerror(number)):
            image.writev(0, [page_buffer(512)], fua=stable)
    if sticks:
        with pytest.raises(OSError, match="may be lost"):
            image.flush()
    else:
        image.flush()
    image.close()


def test_a_host_that_writes_nothing_more_is_an_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = RawImage(file)
    monkeypatch.setattr(os, "pwritev", lambda *_arguments: 0)
    with pytest.raises(OSError, match="the host wrote nothing more"):
        image.writev(0, [page_buffer(512)])
    monkeypatch.undo()
    image.close()


def test_what_is_refused_is_neither_open_nor_locked(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))
    os.truncate(file, 1000)
    with pytest.raises(ImageError, match="end 488 bytes into a sector"):
        RawImage(file)
    os.truncate(file, 1024)
    RawImage(file).close()
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "fcntl", failing(errno.EIO))
        with pytest.raises(ImageError, match="cannot be locked: Input/output error"):
            RawImage(file)
        with pytest.raises(ImageError, match="cannot be locked"):
            HostFile(file.with_name("new"), read_only=False, create=True)
    assert os.listdir(file.parent) == [file.name], "a file that was made for nothing is gone"
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EINVAL])
def test_a_file_system_without_locks_will_do(
    file: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(fcntl, "fcntl", failing(number))
    RawImage(file).close()


def test_a_file_grows_and_never_shrinks(file: Path) -> None:
    image = RawImage(file)
    for size in (MIB, 2 * MIB):
        image.resize(size)
        assert (image.size, file.stat().st_size) == (size, size)
    with pytest.raises(ImageError, match="cannot become smaller"):
        image.resize(MIB)
    assert (image.size, file.stat().st_size) == (2 * MIB, 2 * MIB)
    image.close()


def test_one_that_is_only_read_is_looked_at_again(file: Path) -> None:
    image = RawImage(file, ImageOptions(read_only=True))
    with pytest.raises(ImageError, match="has 1048576 bytes, not 2097152; make it larger first"):
        image.resize(2 * MIB)
    os.truncate(file, 2 * MIB)
    image.resize(2 * MIB)
    assert image.size == 2 * MIB
    snapshot = OverlayImage(image)
    with pytest.raises(ImageError, match="keeps its size"):
        snapshot.resize(4 * MIB)
    snapshot.close()


class Host:
    """fallocate as some host does it: notes each mode, and fails with what is listed, 0 for success."""

    def __init__(self, *numbers: int) -> None:
        self.modes: list[int] = []
        self._numbers = list(numbers)

    def fallocate(self, _fd: int, mode: int, _offset: int, _length: int) -> int:
        self.modes.append(mode)
        number = self._numbers.pop(0) if self._numbers else 0
        ctypes.set_errno(number)
        return -bool(number)


@pytest.mark.parametrize(
    ("discard", "may_unmap", "modes"),
    [(True, True, [PUNCH, PUNCH]), (True, False, [PUNCH, ZERO]), (False, True, [ZERO])],
)
def test_space_is_given_back_only_where_that_is_allowed(
    file: Path, monkeypatch: pytest.MonkeyPatch, discard: bool, may_unmap: bool, modes: list[int]
) -> None:
    host = Host()
    monkeypatch.setattr(host_file, "_libc", host)
    image = RawImage(file, ImageOptions(discard=discard))
    image.discard(0, 4096)
    image.write_zeroes(0, 4096, may_unmap=may_unmap)
    image.close()
    assert host.modes == modes


def test_a_host_that_cannot_make_zeros_quickly_is_told_from_one_that_is_full(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = RawImage(file)
    for numbers, modes in (((errno.EINTR, 0), [PUNCH] * 2), ((errno.EOPNOTSUPP, 0), [PUNCH, ZERO])):
        host = Host(*numbers)
        monkeypatch.setattr(host_file, "_libc", host)
        image.write_zeroes(0, 4096)
        assert host.modes == modes
    monkeypatch.setattr(host_file, "_libc", Host(errno.EOPNOTSUPP, errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        image.write_zeroes(0, 4096)
    monkeypatch.setattr(host_file, "_libc", Host(errno.EINVAL, errno.EINVAL))
    image.write_zeroes(0, 4096)
    assert read(image, 0, 4096) == bytes(4096)
    image.close()


def test_a_host_that_cannot_say_where_data_are_has_them_everywhere(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a copy of the image would be without them."""
    os.truncate(file, 2 * MIB)
    image = RawImage(file, ImageOptions(read_only=True))
    assert image.extents(MIB, MIB) == [Extent(MIB, MIB, False)]
    lseek = os.lseek
    for which in (os.SEEK_DATA, os.SEEK_HOLE):

        def cannot(fd: int, offset: int, whence: int, which: int = which) -> int:
            if whence == which:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return lseek(fd, offset, whence)

        with monkeypatch.context() as patch:
            patch.setattr(os, "lseek", cannot)
            found = image.extents(0, 2 * MIB)
        assert found[0] == Extent(0, found[0].length, True)
        assert found[0].length >= MIB
    image.close()


def test_what_a_snapshot_has_zeroed_hides_what_lies_below(file: Path) -> None:
    image = OverlayImage(RawImage(file, ImageOptions(read_only=True)))
    image.write_zeroes(0, 65536)
    assert read(image, 0, 65536) == bytes(65536)
    image.writev(65536, [page_buffer(512, b"x")])
    image.write_zeroes(65536 + 4096, 4096)
    image.writev(65536 + 512, [page_buffer(4096 - 512, b"y")])
    assert read(image, 65536, 8192) == b"x" * 512 + b"y" * (4096 - 512) + bytes(4096)
    image.close()
    RawImage(file).close()  # nobody has it any more
