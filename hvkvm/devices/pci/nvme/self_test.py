"""Device Self-test: reads of the disk on demand, and the log of what they found (NVM Express 1.4, 5.8).

A short test reads a block at the disk's beginning, one in its middle and its last; an extended one does the
same, since there is no medium here that would wear out. Owner: the I/O loop.
"""

from __future__ import annotations

import struct
from typing import Protocol

from hvkvm.block.request import Op, Request, Result, Status

_RESULT = struct.Struct("<BBBBQIQBBH")
"""status and code, segment, valid information, reserved, power-on hours, namespace, LBA, three of status."""
_LOG_HEAD = 4
MOST_RESULTS = 20
_PASSED, _ABORTED, _FAILED = 0x0, 0x1, 0x7
_NONE = 0xF

TestResult = tuple[int, int, int]
"""Code and outcome of a test, and the namespace it read."""


class Disk(Protocol):
    """What a test reads."""

    @property
    def size(self) -> int: ...
    def submit(self, request: Request) -> None: ...


class SelfTest:
    """Of one controller's disk, with the results of the last ones, newest first."""

    def __init__(self, disk: Disk, sector_size: int) -> None:
        self.results: list[TestResult] = []
        self._disk = disk
        self._sector = sector_size
        self._running: tuple[int, int] | None = None
        self._out = 0
        """Reads that the disk has not answered, also those of a test that was ended."""

    def start(self, code: int, nsid: int) -> bool:
        """Begin a test that was asked for by its code; False while one is running or waits for the disk."""
        if self._running is not None or self._out:
            return False
        self._running = code, nsid
        last = max(self._disk.size // self._sector - 1, 0)
        # All at once, so that a disk that comes to rest has the whole test behind it.
        for sector in (0, last // 2, last):
            buffer = memoryview(bytearray(self._sector))
            self._out += 1
            self._disk.submit(Request(Op.READ, sector * self._sector, (buffer,), self._read))
        return True

    def abort(self) -> None:
        """End the one that is running, if any."""
        self._finish(_ABORTED)

    def _read(self, result: Result) -> None:
        self._out -= 1
        if result.status is not Status.OK:
            self._finish(_FAILED)
        elif not self._out:
            self._finish(_PASSED)

    def _finish(self, outcome: int) -> None:
        if self._running is not None:
            code, nsid = self._running
            self._running = None
            self.results.insert(0, (code, outcome, nsid))
            del self.results[MOST_RESULTS:]

    def log(self) -> bytes:
        """The log page."""
        running = 0 if self._running is None else self._running[0]
        data = bytearray(_LOG_HEAD + MOST_RESULTS * _RESULT.size)
        data[0] = running
        for index in range(MOST_RESULTS):
            code, outcome, nsid = self.results[index] if index < len(self.results) else (0, _NONE, 0)
            at = _LOG_HEAD + index * _RESULT.size
            _RESULT.pack_into(data, at, code << 4 | outcome, 0, 1 if nsid else 0, 0, 0, nsid, 0, 0, 0, 0)
        return bytes(data)

    def reset(self) -> None:
        """Forget what is running: its reads count still, for nobody. Results outlive a reset."""
        self._running = None

    def load(self, results: tuple[TestResult, ...]) -> None:
        """Take a saved controller's results; what cannot be in a log is left out."""
        self.results = [(code & 0xF, outcome & 0xF, nsid & 0xFFFFFFFF) for code, outcome, nsid in results]
        del self.results[MOST_RESULTS:]
