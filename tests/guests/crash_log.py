"""Records what is written to one file, and makes the files that a crash at any moment may leave.

As dm-log-writes does for a block device, but finer: what was written since the last sync that ended may be
there or not, each write by itself, in any order, cut at a sector. What was synced is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest

from hvkvm.block import host_file

SECTOR = 512
PAGE = 4096


class Did(NamedTuple):
    """One thing done to the file: "write", "truncate", "punch", "sync"; a truncate has its size as offset."""

    kind: str
    offset: int = 0
    data: bytes = b""
    length: int = 0


class Contents:
    """A sparse file in memory."""

    def __init__(self) -> None:
        self.pages: dict[int, bytearray] = {}
        self.size = 0

    def copy(self) -> Contents:
        other = Contents()
        other.pages = {number: bytearray(page) for number, page in self.pages.items()}
        other.size = self.size
        return other

    def write(self, offset: int, data: bytes) -> None:
        self.size = max(self.size, offset + len(data))
        at = 0
        while at < len(data):
            number, within = divmod(offset + at, PAGE)
            n = min(PAGE - within, len(data) - at)
            self.pages.setdefault(number, bytearray(PAGE))[within : within + n] = data[at : at + n]
            at += n

    def do(self, did: Did) -> None:
        if did.kind == "write":
            self.write(did.offset, did.data)
        elif did.kind == "truncate":
            self.size = did.offset
            assert all(number * PAGE < self.size for number in self.pages), "nothing here shrinks a file"
        elif did.kind == "punch":
            end = min(did.offset + did.length, self.size)
            at = did.offset
            while at < end:
                n = min(PAGE - at % PAGE, end - at)
                if at // PAGE in self.pages:
                    self.pages[at // PAGE][at % PAGE : at % PAGE + n] = bytes(n)
                at += n

    def save(self, path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(self.size)
            for number, page in self.pages.items():
                file.seek(number * PAGE)
                file.write(page[: self.size - number * PAGE])


def contents_of(path: Path) -> Contents:
    """What a file has now."""
    contents = Contents()
    contents.size = path.stat().st_size
    with path.open("rb") as file:
        for number in range(-(-contents.size // PAGE)):
            page = file.read(PAGE)
            if any(page):
                contents.pages[number] = bytearray(page.ljust(PAGE, b"\0"))
    return contents


@contextmanager
def recording(monkeypatch: pytest.MonkeyPatch, fd_of: Callable[[], int]) -> Iterator[list[Did]]:
    """What is done to the fd of `fd_of()` meanwhile, by HostFile, in order."""
    log: list[Did] = []
    write, truncate = host_file.write_fully, host_file.os.ftruncate
    sync, fallocate = host_file.os.fdatasync, host_file.HostFile._fallocate

    def write_fully(fd: int, buffers, offset: int, flags: int = 0) -> int:  # type: ignore[no-untyped-def]
        done = write(fd, buffers, offset, flags)
        if fd == fd_of():
            log.append(Did("write", offset, b"".join(buffers)))
            if flags:
                log.append(Did("stable", len(log) - 1))
        return done

    def ftruncate(fd: int, size: int) -> None:
        truncate(fd, size)
        if fd == fd_of():
            log.append(Did("truncate", size))

    def fdatasync(fd: int) -> None:
        sync(fd)
        if fd == fd_of():
            log.append(Did("sync"))

    def allocate(self: host_file.HostFile, mode: int, offset: int, length: int) -> bool:
        worked = fallocate(self, mode, offset, length)
        if self.fd == fd_of() and worked and mode:
            log.append(Did("punch", offset, length=length))
        return worked

    with monkeypatch.context() as patch:
        patch.setattr(host_file, "write_fully", write_fully)
        patch.setattr(host_file.os, "ftruncate", ftruncate)
        patch.setattr(host_file.os, "fdatasync", fdatasync)
        patch.setattr(host_file.HostFile, "_fallocate", allocate)
        yield log


def crashes(
    before: Contents, log: list[Did], random: Random, variants: int
) -> Iterator[tuple[int, Contents]]:
    """For a crash after each step of `log`: how many steps were begun, and files that may be left."""
    stable = before.copy()
    unsure: list[Did] = []
    for step, did in enumerate(log, 1):
        if did.kind == "sync":
            for one in unsure:
                stable.do(one)
            unsure = []
        elif did.kind == "stable":
            # A write with RWF_DSYNC: that one is there, and with it the file's size.
            for one in unsure:
                if one.kind == "truncate" or one is log[did.offset]:
                    stable.do(one)
            unsure = [one for one in unsure if one.kind != "truncate" and one is not log[did.offset]]
        else:
            unsure.append(did)
        whole = stable.copy()
        for one in unsure:
            whole.do(one)
        yield step, whole
        if not unsure:
            continue
        for _ in range(variants):
            some = stable.copy()
            for one in unsure:
                if one.kind == "write":
                    _tear(some, one, random)
                elif random.random() < 0.5:
                    some.do(one)
            yield step, some


def _tear(contents: Contents, did: Did, random: Random) -> None:
    """Some of a write: nothing, all, or some of its sectors."""
    kind = random.random()
    if kind < 0.35:
        return
    if kind < 0.7:
        contents.do(did)
        return
    for at in range(0, len(did.data), SECTOR):
        if random.random() < 0.5:
            contents.write(did.offset + at, did.data[at : at + SECTOR])
