"""Hands a copy of a warm guest the command that the guest waits for.

A warm guest was saved while its init read its control port (`guest_scripts.AWAIT`).
A copy gets a line there, and finds the rest in a memory of its own at
`board.ORDERS_ADDRESS` (`abi.guest_orders`), or where its kernel has no /dev/mem asks
for it piece by piece over a serial port. It asks for the time as late as it can. Then
the command's own streams begin, as in a guest that was booted for it.

Owner: the main thread makes, starts and closes it; lines are heard on the I/O loop.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from time import time_ns
from typing import TYPE_CHECKING

from hvkvm.abi import guest_orders as abi
from hvkvm.abi.board import ORDERS_ADDRESS, ORDERS_SIZE
from hvkvm.abi.guest_command import SERIAL_PIECE
from hvkvm.errors import ConfigError
from hvkvm.machine.command_way import Lines
from hvkvm.memory.window import Window

if TYPE_CHECKING:
    from hvkvm.devices.port.serial import Serial16550
    from hvkvm.machine.board import Board
    from hvkvm.machine.config import MachineConfig
    from hvkvm.machine.platform import Platform

LONGEST_TIME = 100
"""Bytes of a line of `_time_and_seed`, at most."""


class Orders:
    """What the guest on `platform` is handed; nothing yet where it is only now made warm.

    Make it before the guest runs. Raises ConfigError for more files than there is room for,
    BootError for one that cannot be read.
    """

    def __init__(self, platform: Platform, board: Board, stack: ExitStack) -> None:
        self.awaited = False
        """Whether a guest that is made warm waits for its command."""
        self.on_awaited: Callable[[], object] = lambda: None
        """Called then, on the I/O loop."""
        self._archive = b"" if platform.config.warm is None else _archive(platform.config)
        self._data: Serial16550 = board.command_ports[0]
        self._control: Serial16550 = board.command_ports[2]
        self._sent = 0
        self._lines = Lines(self._heard)
        self._next: Callable[[bytes], object] = lambda _data: None
        self._window = Window(platform.memory, ORDERS_ADDRESS, abi.ARCHIVE_OFFSET + len(self._archive))
        stack.callback(self._window.close)
        self._window.write(abi.ARCHIVE_OFFSET, self._archive)
        self._window.write(0, abi.head())

    def start(self) -> None:
        """Have the guest go on. Just before it runs. Main thread."""
        self._next = self._control.output.sink
        self._control.output.sink = self._lines.add
        if self._archive:
            # A guest saved by hvkvm of November 2026 or before does not ask for the time: it is in here.
            self._control.feed(b"orders " + self._time_and_seed())

    def _time_and_seed(self) -> bytes:
        """The host's time and random numbers, into the page, and for who has no /dev/mem as a line."""
        now = time_ns()
        self._window.write(0, abi.head(len(self._archive), now, os.urandom(abi.SEED_SIZE)))
        nearest = round(now / 1e9)
        return f"{nearest} {os.urandom(abi.SEED_SIZE).hex()}\n".encode()

    def _heard(self, line: bytes) -> None:
        if line.startswith(b"warm "):
            self.awaited = True
            self.on_awaited()
        elif line == b"now":
            # As below: who asks and does not read has no answer, and none before there is a command.
            if self._archive and self._control.rx_room() > LONGEST_TIME:
                self._control.feed(self._time_and_seed())
        elif line == b"piece":
            # One that asks and does not read what it got has no room: it is not answered.
            piece = self._archive[self._sent : self._sent + SERIAL_PIECE]
            if self._data.rx_room() > len(piece) + len(b"2048\n"):
                self._sent += len(piece)
                self._data.feed(b"%d\n%b" % (len(piece), piece))
        elif line == b"taken":
            self._control.output.sink = self._next
            self._window.empty()
        else:
            self._next(line + b"\n")


def _archive(config: MachineConfig) -> bytes:
    from hvkvm.boot import command_files

    archive = command_files.orders(
        config.command,
        files=dict(config.files),
        command_io=config.command_io,
        vsock=config.vmbus == "on",
        terminal_type=os.environ.get("TERM"),
    )
    room = ORDERS_SIZE - abi.ARCHIVE_OFFSET
    if len(archive) > room:
        raise ConfigError(
            f"--file: {len(archive) >> 20} MiB of files, and a warm guest is handed at most {room >> 20};"
            " give them to `hvkvm warm`, so that every copy has them"
        )
    return archive
