"""The guest's serial console on the host: stdin, stdout, and the keys in between.

Input is read on the I/O loop and fed to the UART as fast as the guest takes it;
what the UART refuses waits here, and meanwhile nothing more is read. On a
terminal in the foreground the keys are raw and Ctrl-a x ends the guest (see
`escape_keys`); from a pipe or a file every byte is the guest's. The end of
input ends nothing.

In the background a terminal is left alone, and looked at now and then: a shell's
`fg` of a job that runs sends no signal.

Owner: the main thread makes, starts and closes it; `write` is the UART's sink;
the rest runs on the I/O loop.
"""

from __future__ import annotations

import os
import termios
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from hvkvm.backends.console_tail import ConsoleTail
from hvkvm.backends.escape_keys import HELP, Command, EscapeKeys
from hvkvm.backends.output import Output, open_again
from hvkvm.backends.terminal import RawTerminal, in_foreground
from hvkvm.errors import Stopped, exhausted
from hvkvm.runtime.retry import Retry

if TYPE_CHECKING:
    from hvkvm.runtime.io_loop import Handle, IoLoop

READ_SIZE = 1024
INTERRUPT_KEY = 0x03
BACKGROUND_SECONDS = 0.2
"""How often a job in the background looks whether the terminal is its own by now."""
DRAIN_SECONDS = 2.0
"""How long `close` waits for a reader that takes no output before it gives the rest up."""


class HeldOutput(Protocol):
    """The source of output, as far as the console holds it up."""

    def hold(self, held: bool) -> None: ...


class SerialPort(Protocol):
    """What a console needs of a UART: see `devices.port.serial.Serial16550`."""

    on_rx_room: Callable[[], None] | None

    @property
    def output(self) -> HeldOutput: ...

    @property
    def receive_interrupt_enabled(self) -> bool: ...

    def feed(self, data: bytes) -> int: ...

    def feed_break(self) -> bool: ...


class Console:
    """Connects one UART to two host fds, which stay the caller's.

    Make the UART with `console.write` as sink, then `connect` it, then `start`.
    `input_fd` None reads nothing. `on_quit()` is called on the I/O loop: for
    Ctrl-a x, and for Ctrl-c as long as nothing in the guest listens to the UART;
    `on_dump()` for Ctrl-a d.
    """

    def __init__(
        self,
        io: IoLoop,
        *,
        input_fd: int | None = 0,
        output_fd: int = 1,
        on_quit: Callable[[], None] | None = None,
        on_dump: Callable[[], None] | None = None,
        on_output_broken: Callable[[], None] | None = None,
        on_output_failed: Callable[[OSError], None] | None = None,
        tail: ConsoleTail | None = None,
    ) -> None:
        self.tail = ConsoleTail() if tail is None else tail
        """The last lines of output, for diagnoses."""
        self.output = Output(output_fd, io, on_broken=on_output_broken, on_failed=on_output_failed)
        self._io = io
        self._input_fd = input_fd
        self._on_quit = on_quit
        self._on_dump = on_dump
        self._serial: SerialPort | None = None
        self._terminal: RawTerminal | None = None
        self._keys: EscapeKeys | None = None
        self._own: int | None = None
        self._reader: Handle | None = None
        self._unwatchable = False
        self._pieces: deque[bytes | Command] = deque()  # input that the UART had no room for, breaks among it
        self._look_again = Retry(io, self._look, BACKGROUND_SECONDS)
        # _reader, _closed and the terminal's mode, between the loop and close(). Reentrant: signal handlers
        # restore the terminal.
        self._lock = threading.RLock()
        self._closed = False

    def connect(self, serial: SerialPort) -> None:
        """Take input to `serial` and let the output hold it up. Before `start`."""
        self._serial = serial
        serial.on_rx_room = self._room
        self.output.on_congestion = serial.output.hold

    def start(self) -> None:
        """Go raw if stdin is our terminal, and begin to read as soon as it is. Main thread."""
        fd = self._input_fd
        if fd is None or self._serial is None:
            return
        try:
            if os.isatty(fd):
                self._terminal = RawTerminal(fd, on_continue=self._look_soon)
                self._terminal.handle_signals()
                self._keys = EscapeKeys()
                self._take_terminal()
            self._own = open_again(fd, os.O_RDONLY)
            os.fstat(fd)
        except OSError:
            return  # started with stdin closed
        self._look_soon()

    def write(self, data: bytes) -> None:
        """Show the guest's output. The UART's sink: the I/O loop, or the main thread at the end."""
        self.tail.add(data)
        self.output.write(data)

    def restore_terminal(self) -> None:
        """Leave raw mode now. Any thread, signal handlers."""
        with self._lock:
            terminal, self._terminal = self._terminal, None
            if terminal is not None:
                terminal.restore()

    def close(self) -> None:
        """Stop reading, send what waits (for DRAIN_SECONDS at most), restore the terminal. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            reader, self._reader = self._reader, None
        try:
            if reader is not None:
                reader.remove()
            self._look_again.cancel()
            self.output.drain(DRAIN_SECONDS)
            self.output.close()
        finally:
            self.restore_terminal()
            if self._own is not None:
                os.close(self._own)
                self._own = None

    # --- input; on the I/O loop ------------------------------------------------------------------

    def _look_soon(self) -> None:
        """Look on the loop. Any thread, signal handlers."""
        with suppress(Stopped):
            self._io.call_soon(self._look)

    def _look(self) -> None:
        """Read, unless the input is a terminal that is not ours: then look again before long."""
        if self._keys is None or self._take_terminal():
            if not self._pieces:
                self._watch()
            return
        self._unwatch()
        hung_up = self._input_fd is None or not os.isatty(self._input_fd)
        if not hung_up and not self._closed:
            self._look_again.later()

    def _take_terminal(self) -> bool:
        """Whether the terminal is ours; it is raw then. The main thread too."""
        with self._lock:
            if self._terminal is None or self._input_fd is None or not in_foreground(self._input_fd):
                return False
            with suppress(termios.error):  # it has hung up, which reading will tell
                self._terminal.enter()
            return True

    def _watch(self) -> None:
        """Read when there is something to read."""
        fd = self._own if self._own is not None else self._input_fd
        with self._lock:
            if self._closed or self._reader is not None or fd is None:
                return
            try:
                self._reader = self._io.add_reader(fd, self._readable)
                return
            except Stopped:
                return
            except (OSError, ValueError) as error:
                if exhausted(error) is not None:
                    self._look_again.later()
                    return
                # Else a file or /dev/null: epoll does not take what is always readable.
        self._unwatchable = True
        self._readable()

    def _unwatch(self) -> None:
        with self._lock:
            reader, self._reader = self._reader, None
        if reader is not None:
            reader.remove()

    def _readable(self) -> None:
        fd = self._own if self._own is not None else self._input_fd
        if fd is None or self._closed:
            return
        if self._keys is not None and not in_foreground(fd):
            self._look()
            return
        try:
            data = os.read(fd, READ_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            if self._keys is not None and not in_foreground(fd):
                self._look()  # taken from us just now: SIGTTIN is blocked on this thread, which makes it EIO
                return
            data = b""  # EIO: the terminal has hung up
        if not data:
            self._unwatch()
            return
        if self._keys is None:
            self._pieces.append(data)
        else:
            self._typed(self._keys.pieces(data))
        self._offer()
        if self._unwatchable and not self._pieces:
            with suppress(Stopped):
                self._io.call_soon(self._readable)

    def _typed(self, pieces: list[bytes | Command]) -> None:
        """Obey commands at once; a break waits for its turn among the keys."""
        for piece in pieces:
            if isinstance(piece, Command) and piece is not Command.BREAK:
                self._obey(piece)
            else:
                self._pieces.append(piece)
            # A guest that boots or hangs has nobody to hear Ctrl-c; waiting there for ever would be a trap.
            interrupts = isinstance(piece, bytes) and INTERRUPT_KEY in piece
            if interrupts and self._serial and not self._serial.receive_interrupt_enabled:
                self._obey(Command.QUIT)

    def _offer(self) -> None:
        """Give the UART what it takes; read no more while something is left."""
        serial, pieces = self._serial, self._pieces
        while pieces and serial is not None:
            piece = pieces[0]
            if isinstance(piece, bytes):
                pieces[0] = piece[serial.feed(piece) :]
                if pieces[0]:
                    break
            elif not serial.feed_break():
                break
            pieces.popleft()
        if pieces:
            self._unwatch()  # until _room

    def _room(self) -> None:
        """The UART has room again."""
        if self._closed or not self._pieces:
            return
        self._offer()
        if not self._pieces:
            if self._unwatchable:
                self._readable()
            else:
                self._look()

    def _obey(self, command: Command) -> None:
        if command is Command.HELP:
            self.output.write(HELP.replace("\n", "\r\n").encode())
        elif command is Command.DUMP:
            if self._on_dump is not None:
                self._on_dump()
        elif self._on_quit is not None:
            self._on_quit()

    def __enter__(self) -> Console:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
