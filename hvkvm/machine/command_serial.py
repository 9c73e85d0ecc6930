"""The streams of a guest command over serial ports: see `machine.command`.

Output needs no flow control of ours: a UART that is held says that it cannot send.
Input would overrun a guest that is slow to read, since Linux takes what
the UART has and drops what its buffers cannot hold. So the guest asks for each piece.

Owner: the I/O loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from hvkvm.abi.guest_command import SERIAL_PIECE
from hvkvm.machine.command_way import Lines

if TYPE_CHECKING:
    from hvkvm.backends.host_input import HostInput
    from hvkvm.devices.port.serial import Serial16550

_HEAD_BYTES = 8
"""Room for the number in front of a piece."""


class CommandSerial:
    """`ports` are for input and output, error, control; without a `source` only control is ours."""

    def __init__(
        self,
        ports: Sequence[Serial16550],
        source: HostInput | None,
        took: Callable[[str, bytes], object],
        on_line: Callable[[bytes], object],
    ) -> None:
        streams, errors, self._control = ports
        self._source = source
        self._input = streams
        self._on_line = on_line
        self.connected = False
        """Whether the guest came this way."""
        self.asked = False
        """Whether it waits for a piece of input."""
        self.lines = Lines(self._line)
        self._outputs = {}
        self._control.output.sink = self.lines.add
        if source is not None:
            streams.output.sink = partial(self._take, took, "out")
            errors.output.sink = partial(self._take, took, "err")
            self._outputs = {"out": streams.output, "err": errors.output}

    def _take(self, took: Callable[[str, bytes], object], name: str, data: bytes) -> None:
        self.connected = True  # each port has batches of its own: control may still wait for its turn
        took(name, data)

    def _line(self, line: bytes) -> None:
        self.connected = True
        if line == b"input":
            # A guest that asks and does not read what it got has no room: it is not answered.
            if self._source is not None and self._input.rx_room() >= _HEAD_BYTES + SERIAL_PIECE:
                self._ask()
        else:
            self._on_line(line)

    def _ask(self) -> None:
        if self._source is not None:
            self.asked = True
            self._source.request(SERIAL_PIECE, self._give)

    def go_on(self, *, connected: bool, asked: bool, line: bytes) -> None:
        """Be where another run was that saved its guest."""
        self.connected = connected
        self.lines.begin(line)
        if asked:
            self._ask()

    def _give(self, data: bytes) -> None:
        self.asked = False
        self._input.feed(b"%d\n%b" % (len(data), data))

    def send_control(self, line: bytes) -> None:
        """Send a line, if the guest came this way; one that does not read them loses some."""
        if self.connected and self._control.rx_room() >= len(line):
            self._control.feed(line)

    def hold(self, name: str, held: bool) -> None:
        """Stop or resume taking output. Any thread."""
        self._outputs[name].hold(held)

    def take_rest(self, done: Callable[[], None], *, until_end: bool) -> None:
        """The UARTs have it all already."""
        for output in self._outputs.values():
            output.flush(even_if_held=True)
        done()

    def reset(self) -> None:
        """The guest has gone; the ports are reset by the board. It has asked for input in vain.

        What it has not read is dropped: the rest of a piece or of a line would be another one's to the next.
        Keys for a terminal wait on.
        """
        self._control.drop_input()
        if self._source is not None:
            self._input.drop_input()
            self._source.withdraw()
        self.connected = self.asked = False
        self.lines.clear()

    def close(self) -> None:
        """Nothing to let go of."""
