"""What the ways of a guest command's streams have in common: see `machine.command`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from hvkvm.abi.guest_command import MAX_LINE_BYTES
from hvkvm.tuples import NamedTuple


class CommandState(NamedTuple):
    """How far a run and its guest had come with a command's streams, for the run that goes on from a file."""

    started: bool
    """Whether the command had begun."""
    serial: bool
    """Whether the guest came over serial ports."""
    asked: bool
    """Whether it waits for a piece of standard input there."""
    serial_line: bytes
    """The beginning of a line of control over serial ports that has no end yet."""
    vsock_line: bytes
    """And over vsock."""
    unsent: bytes
    """Input that was read, and found no room in the socket of a vsock stream."""


class Way(Protocol):
    """One way of the streams: over vsock, or over serial ports. The I/O loop, if not said otherwise."""

    def send_control(self, line: bytes) -> None:
        """Send a line of control to the guest, if it came this way."""

    def hold(self, name: str, held: bool) -> None:
        """Stop or resume taking output "out" or "err" from the guest. Any thread."""

    def take_rest(self, done: Callable[[], None], *, until_end: bool) -> None:
        """Take all output that there still is, held or not, then call `done()`.

        `until_end`: the guest has sent all, and the ends of its streams too. Once.
        """

    def reset(self) -> None:
        """The guest has gone, and starts anew."""

    def close(self) -> None:
        """Let go of everything. After the loop. Idempotent."""


class Lines:
    """Takes a stream apart into lines. One that is longer than any of ours is dropped."""

    def __init__(self, on_line: Callable[[bytes], object]) -> None:
        self._on_line = on_line
        self._open = b""

    def add(self, data: bytes) -> None:
        """Take data as it came."""
        *lines, rest = (self._open + data).split(b"\n")
        self._open = rest[: MAX_LINE_BYTES + 1]
        for line in lines:
            if len(line) < MAX_LINE_BYTES:
                self._on_line(line)

    @property
    def begun(self) -> bytes:
        """The line that has no end yet."""
        return self._open

    def begin(self, data: bytes) -> None:
        """Go on behind `data`, which `begun` had."""
        self._open = data[: MAX_LINE_BYTES + 1].replace(b"\n", b"")

    def clear(self) -> None:
        """Forget a line that has no end yet."""
        self._open = b""
