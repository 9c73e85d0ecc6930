"""The host's end of a guest command: its streams, its signals, and whether it has started.

The guest's init connects the streams as `abi.guest_command` says: to vsock ports
if it can (`command_vsock`), else by serial ports (`command_serial`). Standard
input is read as the guest has room for it; standard output and error go to
`backends.output.Output`, which holds the guest up while nobody reads. A command
with a terminal has a serial port for it, which is `backends.console.Console`'s, and
only control here.

A guest that is reset runs its command again, and connects again. One that goes on from a
file finds here what it had: `CommandState` says how far it had come, the serial ports or the
bus have the streams. What it had sent by then was shown by the run that saved it.

Owner: the main thread makes and closes it; what else is any thread's says so;
the rest runs on the I/O loop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from hvkvm.errors import Stopped
from hvkvm.machine.command_serial import CommandSerial
from hvkvm.machine.command_way import CommandState

if TYPE_CHECKING:
    from hvkvm.backends.host_input import HostInput
    from hvkvm.backends.output import Output
    from hvkvm.machine.board import Board
    from hvkvm.machine.bus import Bus
    from hvkvm.machine.command_vsock import CommandVsock
    from hvkvm.machine.command_way import Way
    from hvkvm.runtime.io_loop import IoLoop
    from hvkvm.runtime.timers import Timer

SIGNAL_SECONDS = 10.0
"""A guest that has not carried out a signal by then does not answer."""

REST_SECONDS = 10.0
"""How long the last output of a guest that has ended may take from its rings to the queues here."""


class Command:
    """The command of a machine whose configuration has one, with streams or a terminal of its own.

    Make it before the guest runs, and close it before the machine. `source` and `outputs` ("out", "err")
    are what its streams lead to; without them it has a terminal, of `window()` rows
    and columns. `bus` None: there is no vsock.
    """

    def __init__(
        self,
        io: IoLoop,
        board: Board,
        bus: Bus | None,
        source: HostInput | None = None,
        outputs: Mapping[str, Output] | None = None,
        *,
        window: Callable[[], tuple[int, int]] = lambda: (24, 80),
    ) -> None:
        self._io = io
        self._board = board
        self._outputs = outputs or {}
        self._window = window
        self._started = False
        self.in_line = False
        """Whether what came last of standard error has no newline at its end."""
        self._unanswered: Timer | None = None
        self._owed: list[str] = []  # signals that the guest has not carried out yet
        self._anew = False  # since a reset it has not been ready
        self._telling = False
        self._serial = CommandSerial(board.command_ports, source, self._took, self._heard)
        self._vsock: CommandVsock | None = None
        self._ways: list[Way] = [self._serial]
        if bus is not None and source is not None:
            from hvkvm.machine.command_vsock import CommandVsock

            self._vsock = CommandVsock(io, bus.vsock, source, self._took, self._heard)
            self._ways.append(self._vsock)
        for name, output in self._outputs.items():
            self._connect(name, output)
        board.on_reset = self._reset
        board.command_state = self.save
        if board.command_loaded is not None:
            self._go_on(board.command_loaded)

    def save(self) -> CommandState:
        """How far it has come. The machine is at rest."""
        serial, (line, unsent) = self._serial, (b"", b"") if self._vsock is None else self._vsock.left()
        return CommandState(self._started, serial.connected, serial.asked, serial.lines.begun, line, unsent)

    def _go_on(self, state: CommandState) -> None:
        """Be where the run was that saved the guest. Before this one runs."""
        self._started = state.started
        self._serial.go_on(connected=state.serial, asked=state.asked, line=state.serial_line)
        if self._vsock is not None:
            self._vsock.go_on(state.vsock_line, state.unsent)
        if state.started and not self._outputs:
            self.tell_window()

    def _connect(self, name: str, output: Output) -> None:
        def hold(held: bool) -> None:
            for way in self._ways:
                way.hold(name, held)

        def broken() -> None:
            self._soon(self._say, f"close {name}")

        output.on_congestion = hold
        output.on_broken = broken

    @property
    def started(self) -> bool:
        """Whether the command runs, by what the guest said. Any thread."""
        return self._started

    # --- from the guest --------------------------------------------------------------------------

    def _took(self, name: str, data: bytes) -> None:
        """Output has come. The main thread too, when the machine has stopped."""
        self._started = True  # whoever has seen it may send a signal, though "ready" is still on its way
        self._board.note_output()
        if name == "err":
            self.in_line = not data.endswith(b"\n")
        self._outputs[name].write(data)

    def _heard(self, line: bytes) -> None:
        """A line of control. Whatever else a guest says means nothing."""
        if line == b"ready":
            self._started = True
            self._board.note_output()
            for name in self._owed if self._anew else ():
                self._say(f"signal {name}")
            self._anew = False
        elif line == b"signaled":
            self._answered()
        elif line == b"size":
            self.tell_window()

    # --- to the guest ----------------------------------------------------------------------------

    def signal(self, name: str, on_silence: Callable[[], object]) -> bool:
        """Have the signal `name` ("INT") sent to the command, if it has started; whether it has.

        `on_silence()` on the I/O loop if the guest does not answer. Any thread.
        """
        return self._started and self._soon(self._signal, name, on_silence)

    def _signal(self, name: str, on_silence: Callable[[], object]) -> None:
        if self._unanswered is None:
            self._unanswered = self._io.call_later(SIGNAL_SECONDS, on_silence)
        if name not in self._owed:
            self._owed.append(name)
        self._say(f"signal {name}")

    def _answered(self) -> None:
        self._owed.clear()
        timer, self._unanswered = self._unanswered, None
        if timer is not None:
            timer.cancel()

    def tell_window(self) -> None:
        """Tell the guest the size of its terminal, if it has asked before. Any thread.

        The size is that when it is told, and so one request is enough, however often a guest asks.
        """
        if not self._telling:
            self._telling = True
            if not self._soon(self._tell):
                self._telling = False

    def _tell(self) -> None:
        self._telling = False
        rows, columns = self._window()
        self._say(f"size {rows} {columns}")

    def _say(self, words: str) -> None:
        for way in self._ways:
            way.send_control(f"{words}\n".encode())

    def _soon(self, fn: Callable[..., object], *args: object) -> bool:
        try:
            self._io.call_soon(fn, *args)
        except Stopped:
            return False
        return True

    # --- ends ------------------------------------------------------------------------------------

    def take_rest(self, *, exited: bool) -> None:
        """Wait until what output there still is has come, REST_SECONDS at most. The main thread.

        When the run has ended and the machine is not yet stopped. `exited`: the guest's init has seen the
        command's end and has sent all.
        """
        for way in self._ways:
            done = threading.Event()

            def take(way: Way = way, done: threading.Event = done) -> None:
                way.take_rest(done.set, until_end=exited)

            if self._soon(take):
                done.wait(REST_SECONDS)

    def _reset(self) -> None:
        self._started = False
        self._anew = True
        for way in self._ways:
            way.reset()

    def close(self) -> None:
        """Let go of everything. When the machine has stopped. Idempotent."""
        with suppress(Stopped):
            self._answered()
        for way in self._ways:
            way.close()
