"""The "newc" cpio archive that Linux unpacks as its initramfs.

Why: a guest's first file system is made here in memory, with no external tool,
the same bytes for the same input. Pure functions, any thread. Source: the kernel's
Documentation/driver-api/early-userspace/buffer-format.rst.

The kernel accepts several archives one after the other, each padded to four
bytes, so pieces that seldom change can be kept ready and joined.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator

from hvkvm.errors import BootError
from hvkvm.tuples import NamedTuple

_MAGIC = "070701"
_FIELD_MAX = 0xFFFFFFFF
# PATH_MAX: the kernel's unpacker skips longer names without a word.
_NAME_MAX = 4095


class Entry(NamedTuple):
    """One archive member; `mode` includes the file type, `data` is a file's content or a link's target."""

    name: str
    mode: int
    data: bytes = b""
    major: int = 0
    minor: int = 0


def directory(name: str, mode: int = 0o755) -> Entry:
    """A directory; it must come before what it holds."""
    return Entry(name, stat.S_IFDIR | mode)


def regular(name: str, data: bytes, mode: int = 0o644) -> Entry:
    """A regular file holding `data`."""
    return Entry(name, stat.S_IFREG | mode, data)


def symlink(name: str, target: str) -> Entry:
    """A symbolic link to `target`."""
    return Entry(name, stat.S_IFLNK | 0o777, target.encode())


def char_device(name: str, major: int, minor: int, mode: int = 0o600) -> Entry:
    """A character device node."""
    return Entry(name, stat.S_IFCHR | mode, b"", major, minor)


def with_parents(entries: Iterable[Entry]) -> Iterator[Entry]:
    """The same entries, each after the directories it needs; a directory is emitted once."""
    made: set[str] = set()
    for entry in entries:
        name = entry.name.strip("/")
        parts = name.split("/")
        for depth in range(1, len(parts)):
            parent = "/".join(parts[:depth])
            if parent not in made:
                made.add(parent)
                yield directory(parent)
        if stat.S_ISDIR(entry.mode):
            if name in made:
                continue
            made.add(name)
        yield entry


def archive(entries: Iterable[Entry]) -> Iterator[bytes]:
    """Stream one complete archive (with its trailer, padded to 4 bytes) for `entries`.

    Times, owners and inode numbers do not depend on the host. Raises BootError
    for a name or a size that the format cannot hold.
    """
    for number, entry in enumerate(entries, 1):
        yield from _member(number, entry)
    yield from _member(0, Entry("TRAILER!!!", 0))


def pack(entries: Iterable[Entry]) -> bytes:
    """`archive` as one bytes object."""
    return b"".join(archive(entries))


def _member(number: int, entry: Entry) -> Iterator[bytes]:
    name = entry.name.strip("/").encode(errors="surrogateescape")
    if not name or b"\0" in name or len(name) > _NAME_MAX:
        raise BootError(f"initramfs: {entry.name[:80]!r} cannot be a file name there")
    size = len(entry.data)
    if size > _FIELD_MAX:
        raise BootError(f"initramfs: {entry.name} is {size} bytes; a member holds less than 4 GiB")
    # ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
    fields = (number, entry.mode, 0, 0, 1, 0, size, 0, 0, entry.major, entry.minor, len(name) + 1, 0)
    head = (_MAGIC + "".join(f"{value:08X}" for value in fields)).encode() + name + b"\0"
    yield head + bytes(-len(head) % 4)
    if size:
        yield entry.data
        if size % 4:
            yield bytes(-size % 4)
