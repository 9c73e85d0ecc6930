"""The file of a saved machine: a header, guest RAM that can be mapped, and a manifest in JSON.

    0            header, one page: magic, format, where the rest lies, checksums
    RAM_OFFSET   guest RAM as it is, page by page; pages of zeros are holes of the file
    behind it    the manifest (`manifest`): who wrote it, the configuration; and each part's state

With the flag COMPRESSED, RAM is frames of zstd instead, one an extent and one behind the other
(`compressed`). Such a file is unpacked into memory when it is opened, and all its checksums compared.

A file is written beside its name and renamed when it is whole. A reader believes
nothing: every length is held against the file, header and manifest against their
checksums. RAM has a checksum an extent, which `verify` compares; restoring does not,
so that its time does not grow with RAM.

Owner: one thread writes, any number of processes may read and map the same file.
"""

from __future__ import annotations

import errno
import json
import os
from _blake2 import blake2b  # of `hashlib`, which loads OpenSSL: every run would have that at its start
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from struct import Struct
from typing import Any

from hvkvm.errors import StateError
from hvkvm.given_file import beside, check_replaceable, make_name_stable, open_at_once
from hvkvm.memory.mapping import PAGE_SIZE, sealed_memfd
from hvkvm.state.codec import plain, restored
from hvkvm.state.compressed import MAX_PIECE, Packer, Unpacker
from hvkvm.state.manifest import Extent, Manifest

MAGIC = b"hvkvm saved VM\n\0"
FORMAT = 8
"""Goes up when an older reader would misread the file."""

COMPRESSED = 1
"""A flag of the header."""

RAM_OFFSET = 2 << 20
"""Where RAM begins: a multiple of a huge page, so that the map of it can be backed by some."""

MAX_RAM = 1 << 40
"""Bytes; more than any machine has, and less than any file may be."""

MAX_MANIFEST = 128 << 20
"""Bytes. A machine with 254 vCPUs needs some 10 MiB, and a TiB of RAM 66 MiB for its extents."""

MANY_EXTENTS = 100_000
"""From so many on zero pages between others are written too: each extent takes 66 bytes, and time to read."""

_CHUNK = 1 << 20
_DIGEST = 32
_header = Struct(f"<16sIIQQQQ{_DIGEST}s")
"""magic, format, flags, RAM size, manifest offset and length, file size, manifest's checksum."""


def checksum(data: bytes | memoryview) -> bytes:
    """What the header keeps of itself and of the manifest."""
    return blake2b(data, digest_size=_DIGEST).digest()


def ram_checksum(data: bytes) -> int:
    """What an extent keeps of its bytes: CRC-32, since anything stronger takes most of a save's time.

    It is there for disks and copies that damage a file: who makes one up can put any checksum right.
    """
    from zlib import crc32  # a run that saves nothing has no use for it

    return crc32(data)


class Writer:
    """Writes `path` beside its name; `commit` puts it there, anything else leaves nothing. OSError;
    StateError for more beside RAM than could be read again.

    What is there already must be a regular file (EINVAL).

    Use it in a with block. `compress` makes it small, and RAM nothing that can be mapped: CapabilityMissing
    where that cannot be.
    """

    def __init__(self, path: Path, ram_size: int, *, compress: bool = False) -> None:
        path = Path(os.path.realpath(path))  # a link stays, and leads to the new file
        check_replaceable(path)
        self._packer = Packer("--compress") if compress else None
        self._end = RAM_OFFSET
        self._path = path
        self._ram_size = ram_size
        self._partial = beside(path)
        self._extents: list[Extent] = []
        self._fd = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    def write_ram(self, offset: int, data: bytes) -> None:
        """Put `data`, whole pages, at byte `offset` of RAM; in ascending order. Zero pages are left out."""
        runs = _runs(data)
        if len(self._extents) >= MANY_EXTENTS and (found := list(runs)):
            start, (last, size) = found[0][0], found[-1]
            runs = iter([(start, last + size - start)])
        for at, size in runs:
            piece = data[at : at + size]
            if self._packer is None:
                stored, place = piece, RAM_OFFSET + offset + at
            else:
                stored, place = self._packer.pack(piece), self._end
            _write_all(self._fd, memoryview(stored), place)
            self._end += len(stored)
            self._extents.append(Extent(offset + at, size, ram_checksum(piece), len(stored)))

    def commit(self, manifest: Manifest, parts: dict[str, Any]) -> int:
        """Write the rest and rename; returns the file's size in bytes, holes included."""
        tree = {"manifest": plain(manifest._replace(extents=tuple(self._extents))), "parts": plain(parts)}
        text = json.dumps(tree, separators=(",", ":")).encode()
        if len(text) > MAX_MANIFEST:
            raise StateError(f"{len(text)} bytes beside its RAM, of which {MAX_MANIFEST} could be read again")
        flags = 0 if self._packer is None else COMPRESSED
        at = self._end if flags else RAM_OFFSET + self._ram_size
        size = at + len(text)
        fields = (MAGIC, FORMAT, flags, self._ram_size, at, len(text), size, checksum(text))
        head = _header.pack(*fields)
        _write_all(self._fd, memoryview(text), at)
        _write_all(self._fd, memoryview(head + checksum(head)), 0)
        os.fsync(self._fd)
        check_replaceable(self._path)  # again: minutes later it may be the image of a disk
        os.replace(self._partial, self._path)
        self._close()
        with suppress(OSError):  # some file systems cannot do that
            make_name_stable(self._path)
        return size

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._fd >= 0:
            self._close()
            with suppress(OSError):
                self._partial.unlink()


class Saved:
    """A saved machine, opened to read. StateError in one line for anything that is not one.

    `fd` stays open, for RAM's maps, until `close`: RAM lies at RAM_OFFSET of it, since what was compressed
    is unpacked first (CapabilityMissing where that cannot be). `parts` has each part's state
    as plain values: `state` gives it its type.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.fd = open_at_once(path)
        except OSError as error:
            raise StateError(f"{path}: {error.strerror}") from None
        try:
            self.ram_size, flags, tree = _read(self.fd, path)
            self._packed = bool(flags & COMPRESSED)
            self.manifest = restored(Manifest, tree.get("manifest"), f"{path}: manifest")
            self.parts = _table(tree.get("parts"), path)
            self._check_extents()
            if self._packed:
                self._unpack()
        except BaseException:
            self.close()
            raise

    def _check_extents(self) -> None:
        end = 0
        for extent in self.manifest.extents:
            whole = not (extent.offset % PAGE_SIZE or extent.size % PAGE_SIZE)
            stored = extent.stored == extent.size or (
                self._packed and extent.size <= MAX_PIECE and 0 < extent.stored < 2 * MAX_PIECE
            )
            in_order = end <= extent.offset <= self.ram_size - extent.size
            if not whole or not stored or extent.size <= 0 or not in_order:
                raise StateError(f"{self.path}: manifest: its pieces of RAM do not lie one behind the other")
            end = extent.offset + extent.size

    def _unpack(self) -> None:
        """Put RAM into a file of ours, as an uncompressed file has it."""
        unpacker = Unpacker(f"{self.path}: a compressed file")
        size = RAM_OFFSET + self.ram_size
        try:
            ram = sealed_memfd("hvkvm-saved", size)
        except OSError as error:
            raise StateError(f"{self.path}: no memory to unpack it: {error.strerror}") from None
        at = RAM_OFFSET
        try:
            for extent in self.manifest.extents:
                frame = _read_exactly(self.fd, at, extent.stored)
                data = None if frame is None else unpacker.unpack(frame, extent.size)
                if data is None or ram_checksum(data) != extent.checksum:
                    raise StateError(
                        f"{self.path}: guest RAM at {extent.offset:#x}+{extent.size:#x} is damaged"
                    )
                _write_all(ram, memoryview(data), RAM_OFFSET + extent.offset)
                at += extent.stored
        except BaseException:
            os.close(ram)
            raise
        os.close(self.fd)
        self.fd = ram

    def state(self, kind: type[Any], part: str) -> Any:
        """The state of `part`. StateError: it is missing, or no `kind`."""
        if part not in self.parts:
            raise StateError(f"{self.path}: the state of the {part} is missing")
        return restored(kind, self.parts[part], f"{self.path}: {part}")

    def verify(self) -> None:
        """Read all of RAM and compare its checksums. StateError naming the first damaged piece."""
        for extent in self.manifest.extents:
            data = _read_exactly(self.fd, RAM_OFFSET + extent.offset, extent.size)
            if data is None or ram_checksum(data) != extent.checksum:
                raise StateError(f"{self.path}: guest RAM at {extent.offset:#x}+{extent.size:#x} is damaged")

    def close(self) -> None:
        """Close the file; maps of it stay. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Saved:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def _read(fd: int, path: Path) -> tuple[int, int, dict[str, Any]]:
    head = _read_exactly(fd, 0, _header.size + _DIGEST)
    if head is None or not head.startswith(MAGIC):
        raise StateError(f"{path}: not a saved VM; `hvkvm ctl save` makes one")
    _magic, version, flags, ram_size, at, length, size, digest = _header.unpack_from(head)
    if version != FORMAT or flags & ~COMPRESSED:
        raise StateError(
            f"{path}: saved in format {version}, and this hvkvm reads {FORMAT}; use the other one"
        )
    if checksum(head[: _header.size]) != head[_header.size :]:
        raise StateError(f"{path}: its header is damaged; save the VM again")
    if os.fstat(fd).st_size != size:
        raise StateError(
            f"{path}: {os.fstat(fd).st_size} bytes where {size} were saved; it was cut or added to"
        )
    ram_end = RAM_OFFSET + ram_size
    placed = RAM_OFFSET <= at <= ram_end + ram_end // 8 if flags else at == ram_end
    sound = 0 < ram_size < MAX_RAM and not ram_size % PAGE_SIZE and placed
    if not sound or at + length != size or length > MAX_MANIFEST:
        raise StateError(f"{path}: its header makes no sense; save the VM again")
    text = _read_exactly(fd, at, length)
    if text is None or checksum(text) != digest:
        raise StateError(f"{path}: its manifest is damaged; save the VM again")
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        raise StateError(f"{path}: its manifest cannot be read; save the VM again") from None
    return ram_size, flags, _table(tree, path)


def _table(value: Any, path: Path) -> dict[str, Any]:
    if type(value) is not dict:
        raise StateError(f"{path}: its manifest has a part missing; save the VM again")
    return value


def _read_exactly(fd: int, offset: int, size: int) -> bytes | None:
    """`size` bytes at `offset`; None where the file ends before, or the disk gives an error."""
    pieces = []
    while size:
        try:
            piece = os.pread(fd, min(size, _CHUNK), offset)
        except OSError as error:
            if error.errno == errno.EINTR:
                continue
            return None
        if not piece:
            return None
        pieces.append(piece)
        offset += len(piece)
        size -= len(piece)
    return b"".join(pieces)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(fd, data[:_CHUNK], offset)
        data, offset = data[done:], offset + done


_ZEROS = bytes(PAGE_SIZE)
_CHUNK_OF_ZEROS = bytes(_CHUNK)


def _runs(data: bytes) -> Iterator[tuple[int, int]]:
    """The runs of pages of `data` that are not all zero: (offset, size)."""
    if data == _CHUNK_OF_ZEROS[: len(data)]:
        return
    start: int | None = None
    for at in range(0, len(data), PAGE_SIZE):
        zero = data[at : at + PAGE_SIZE] == _ZEROS
        if zero and start is not None:
            yield start, at - start
            start = None
        elif not zero and start is None:
            start = at
    if start is not None:
        yield start, len(data) - start
