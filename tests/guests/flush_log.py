"""Records what a disk's workers do to the file of a raw image, and makes the files that a crash may leave.

As `crash_log`, for requests that run at once: a sync covers what had ended when it began, and nothing else
for sure. What has begun and is not covered may be there or not, each write by itself, cut at a sector.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import NamedTuple, TypeVar

import pytest
from crash_log import SECTOR, Contents, Did

from hvkvm.block import host_file
from hvkvm.block.file_now import FileNow

T = TypeVar("T")


class Step(NamedTuple):
    """Something began or ended: `number` is that of the call, `did` what it does.

    With `stable` it is a write with RWF_DSYNC. With `void` it ended, and has done nothing.
    """

    number: int
    ended: bool
    did: Did
    stable: bool = False
    void: bool = False


class FlushLog:
    """The steps of all threads, in the order in which they happened."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._numbers = iter(range(1 << 62))

    def around(self, call: Callable[[], T], did: Did, *, stable: bool = False) -> T:
        """What `call` returns, False if it has done nothing. Any thread: a list's append is one step."""
        number = next(self._numbers)
        self.steps.append(Step(number, False, did, stable))
        found = call()
        self.steps.append(Step(number, True, did, stable, void=found in (False, -1)))
        return found


@contextmanager
def recording(monkeypatch: pytest.MonkeyPatch, fd_of: Callable[[], int]) -> Iterator[FlushLog]:
    """What is done to the fd of `fd_of()` meanwhile, by HostFile, on any thread."""
    log = FlushLog()
    write, sync, fallocate = host_file.write_fully, host_file.os.fdatasync, host_file.HostFile._fallocate
    write_now = FileNow.writev

    def write_fully(fd: int, buffers, offset: int, flags: int = 0) -> int:  # type: ignore[no-untyped-def]
        if fd != fd_of():
            return write(fd, buffers, offset, flags)
        did, stable = Did("write", offset, b"".join(buffers)), bool(flags & os.RWF_DSYNC)
        return log.around(lambda: write(fd, buffers, offset, flags), did, stable=stable)

    def fdatasync(fd: int) -> None:
        if fd != fd_of():
            sync(fd)
        else:
            log.around(lambda: sync(fd), Did("sync"))

    def allocate(self: host_file.HostFile, mode: int, offset: int, length: int) -> bool:
        if self.fd != fd_of() or not mode:
            return fallocate(self, mode, offset, length)
        did = Did("punch", offset, length=length)
        return log.around(lambda: fallocate(self, mode, offset, length), did)

    def writev_now(self: FileNow, offset: int, buffers) -> int:  # type: ignore[no-untyped-def]
        if self.fd != fd_of():
            return write_now(self, offset, buffers)
        did = Did("write", offset, b"".join(buffers))
        # What it does in part a worker does again, and a crash between both may leave any part of it.
        return log.around(lambda: write_now(self, offset, buffers), did)

    with monkeypatch.context() as patch:
        patch.setattr(host_file, "write_fully", write_fully)
        patch.setattr(FileNow, "writev", writev_now)
        patch.setattr(host_file.os, "fdatasync", fdatasync)
        patch.setattr(host_file.HostFile, "_fallocate", allocate)
        yield log


class Crashes:
    """Replays a log; at any step, what a crash may leave."""

    def __init__(self, before: Contents, log: FlushLog) -> None:
        self._steps = log.steps
        self._at = 0
        self._stable = before.copy()
        self._latest: dict[int, int] = {}
        """By sector: the call that wrote it last, of those that are stable."""
        self._unsure: dict[int, Did] = {}
        """By the number of the call, in the order in which they began."""
        self._ended: set[int] = set()
        self._covered: dict[int, list[int]] = {}
        """By the number of a sync under way: the calls that had ended when it began."""

    def go_to(self, at: int) -> None:
        """As if the crash came when the log had `at` steps; only forward."""
        for step in self._steps[self._at : at]:
            self._take(step)
        self._at = max(self._at, at)

    def _take(self, step: Step) -> None:
        number, did = step.number, step.did
        if did.kind == "sync":
            if not step.ended:
                self._covered[number] = [one for one in self._unsure if one in self._ended]
            else:
                self._settle(self._covered.pop(number))
        elif not step.ended:
            self._unsure[number] = did
        elif step.void:
            del self._unsure[number]
        elif step.stable:
            self._settle([number])
        else:
            self._ended.add(number)

    def _settle(self, numbers: list[int]) -> None:
        for number in numbers:
            if number in self._unsure:  # two syncs may cover one write
                for at, data in self._left_of(number):
                    self._stable.write(at, data)
                    self._latest[at // SECTOR] = number
                del self._unsure[number]
                self._ended.discard(number)

    def _left_of(self, number: int) -> Iterator[tuple[int, bytes]]:
        """The sectors of a call that no later one has made stable: their places and contents."""
        did = self._unsure[number]
        for at in range(did.offset, did.offset + (did.length or len(did.data)), SECTOR):
            if self._latest.get(at // SECTOR, -1) < number:
                data = did.data[at - did.offset :][:SECTOR] if did.kind == "write" else bytes(SECTOR)
                yield at, data

    def least(self) -> Contents:
        """Only what was synced."""
        return self._stable

    def most(self) -> Contents:
        """All that was begun."""
        return self._with(lambda _did: True, lambda: True)

    def some(self, random: Random) -> Contents:
        """What was synced, and of the rest what chance says; writes may be torn."""
        chance = {number: random.choice((0.0, 0.5, 1.0)) for number in self._unsure}
        return self._with(chance.__getitem__, random.random)

    def _with(self, chance: Callable[[int], float], draw: Callable[[], float]) -> Contents:
        contents = self._stable.copy()
        for number in self._unsure:
            for at, data in self._left_of(number):
                if draw() <= chance(number):
                    contents.write(at, data)
        return contents
