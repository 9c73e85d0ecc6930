"""A NOR flash that keeps firmware variables: Intel's command set, as much of it as firmware uses.

While it shows its array, the guest reads it as ROM (a read-only memory slot) and only writes exit. In
its other modes, which give the status, reads exit too. Programming a byte leaves the array readable, unlike
a real chip: nobody reads between two bytes, and each change of modes makes KVM wait for every vCPU.

Firmware writes on one vCPU at a time; a lock keeps others out. `on_change()` is called after each
change of content, on the vCPU's thread.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable
from typing import Protocol

from hvkvm.tuples import NamedTuple

READ_ARRAY = 0xFF
READ_STATUS = 0x70
CLEAR_STATUS = 0x50
WRITE_BYTE = 0x10
WRITE_BYTE_ALTERNATE = 0x40
BLOCK_ERASE = 0x20
CONFIRM = 0xD0
READ_ID = 0x90

STATUS_READY = 0x80
STATUS_BAD_SEQUENCE = 0x30
BLOCK = 4096
_ERASED = b"\xff" * BLOCK
_NEEDS_EXITS = frozenset((READ_STATUS, BLOCK_ERASE, CONFIRM, READ_ID))
_COMMANDS = frozenset((READ_ARRAY, READ_STATUS, WRITE_BYTE, WRITE_BYTE_ALTERNATE, BLOCK_ERASE, READ_ID))
_MODES = _COMMANDS | {CONFIRM}  # in which a chip can be: behind a confirmed erase, too


class Array(Protocol):
    """The chip's bytes as a guest's ROM."""

    size: int

    def view(self) -> memoryview: ...
    def show(self, *, shown: bool) -> None: ...


class FlashState(NamedTuple):
    """Mode, status and content (zlib)."""

    command: int
    status: int
    content: bytes


class Flash:
    """An MMIO device over `array`, whose bytes are its content."""

    def __init__(self, array: Array, on_change: Callable[[], object] = lambda: None) -> None:
        self._array = array
        self._bytes = array.view()
        self.on_change = on_change
        self._lock = threading.Lock()
        self._command = READ_ARRAY
        self._status = 0

    @property
    def content(self) -> bytes:
        """A copy of the bytes."""
        with self._lock:
            return bytes(self._bytes)

    def read(self, offset: int, size: int) -> int:
        """The status where a mode gives it, else bytes of the array."""
        with self._lock:
            if self._command in (READ_STATUS, BLOCK_ERASE, CONFIRM):
                return self._status
            if self._command == READ_ID:
                return 0
            return int.from_bytes(self._bytes[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """A command, or what one waits for. Of a wide write only the first byte counts."""
        value &= 0xFF
        changed = False
        with self._lock:
            if self._command in (WRITE_BYTE, WRITE_BYTE_ALTERNATE):
                changed = bool(self._bytes[offset] & ~value)
                self._bytes[offset] &= value  # programming only clears bits
                self._status |= STATUS_READY
                self._command = READ_ARRAY
            elif self._command == BLOCK_ERASE:
                if value == CONFIRM:
                    start = offset // BLOCK * BLOCK
                    self._bytes[start : start + BLOCK] = _ERASED[: len(self._bytes) - start]
                    self._status |= STATUS_READY
                    self._command = CONFIRM
                    changed = True
                else:
                    self._status |= STATUS_BAD_SEQUENCE
                    self._enter(READ_ARRAY if value == READ_ARRAY else READ_STATUS)
            elif value == CLEAR_STATUS:
                self._status = 0
                self._enter(READ_ARRAY)
            elif value in _COMMANDS:
                self._enter(value)
            else:
                self._enter(READ_ARRAY)
        if changed:
            self.on_change()

    def _enter(self, command: int) -> None:
        self._command = command
        self._array.show(shown=command not in _NEEDS_EXITS)

    def reset(self) -> None:
        """Show the array; what is in it stays."""
        self._status = 0
        self._enter(READ_ARRAY)

    def save(self) -> FlashState:
        """All of it."""
        return FlashState(self._command, self._status, zlib.compress(bytes(self._bytes), 1))

    def load(self, state: FlashState) -> None:
        """Take it. ValueError for content of another size."""
        size = len(self._bytes)
        try:
            content = zlib.decompressobj().decompress(state.content, size + 1)
        except zlib.error:
            raise ValueError("the firmware's variables are damaged in it") from None
        if len(content) != size:
            raise ValueError("its firmware's variables have another size")
        self._bytes[:] = content
        self._status = state.status & 0xFF
        self._enter(state.command if state.command in _MODES else READ_ARRAY)


class WriteProtected:
    """Firmware's code: a write changes nothing, and is no news."""

    def read(self, offset: int, size: int) -> int:
        """Never asked: a memory slot answers."""
        return -1

    def write(self, offset: int, size: int, value: int) -> None:
        """Nothing."""
