"""What a run shows and reads: the guest's console, a command's streams, or a command's terminal.

`front_for` makes the one that a configuration asks for. Owner: the main thread.
"""

from __future__ import annotations

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hvkvm.cli.last_output import send_last_output
from hvkvm.cli.output import cannot_write
from hvkvm.errors import ConfigError
from hvkvm.events import Warned
from hvkvm.machine.outcome import Ending, Outcome

if TYPE_CHECKING:
    from hvkvm.backends.console import Console
    from hvkvm.backends.output import Output
    from hvkvm.cli.signals import Signals
    from hvkvm.cli.teller import Teller
    from hvkvm.machine.command import Command
    from hvkvm.machine.config import MachineConfig
    from hvkvm.machine.machine import Machine

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
COMMAND_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
"""Passed on to a command like ENDING_SIGNALS."""
INSISTING = (signal.SIGINT, signal.SIGTERM)
"""The second of such a signal ends the run, whatever the command makes of the first."""
TAIL_LINES = 20
OUTPUT = "standard output"
ERRORS = "standard error"


def with_command_io(config: MachineConfig, options: Any) -> MachineConfig:
    """`config` with a command's streams as `-t`, `-T` and our own terminals have it. ConfigError."""
    if options.terminal is None:
        terminal = os.isatty(0) and os.isatty(1)
    else:
        terminal = options.terminal
        if not config.command:
            flag = "-t" if terminal else "-T"
            raise ConfigError(f"{flag}: is about a guest command's terminal; name a command behind `--`")
    return config._replace(command_io="terminal" if terminal else "streams")


def with_quiet_boot(config: MachineConfig, options: Any) -> MachineConfig:
    """`config` whose Linux prints no more than errors on a console that nobody is shown.

    Each character there is an exit, and together they take half of a boot. Nothing is lost: a run
    that fails shows the end of the kernel's log, read from RAM.
    """
    boots = config.command and config.kernel is not None and config.warm is None and config.restore is None
    if not boots or options.console:
        return config
    from hvkvm.boot.linux import chooses_messages

    if chooses_messages(config.append):
        return config
    return config._replace(append=f"{config.append} quiet".strip())


def signals_for(config: MachineConfig) -> tuple[signal.Signals, ...]:
    """The signals that a run of `config` takes over."""
    numbers = (*ENDING_SIGNALS, signal.SIGQUIT)
    if not config.command and config.restore is None:
        return numbers
    resized = config.command_io == "terminal" or config.restore is not None  # whose file says what runs
    return (*numbers, *COMMAND_SIGNALS, *((signal.SIGWINCH,) if resized else ()))


def front_for(machine: Machine, options: Any) -> Front:
    """The front of `machine`, which it is attached to. Before the machine starts."""
    if not machine.config.command:
        return ConsoleFront(machine)
    if machine.config.command_io == "terminal":
        return TerminalFront(machine, show_console=options.console)
    return StreamsFront(machine, show_console=options.console)


class Front(ABC):
    """What all have in common. A context manager: from before the machine starts to the end."""

    def __init__(self, machine: Machine, *, shows_console: bool) -> None:
        self.machine = machine
        self._shows_console = shows_console

    def signal(self, number: int) -> bool:
        """Pass a signal on; whether the guest gets it, or nobody need, so that it ends nothing here."""
        return number == signal.SIGWINCH

    def take_rest(self, outcome: Outcome) -> None:
        """Take the last output of a run that has ended, and stop the machine."""
        self.machine.stop()

    def send_last_output(self, signals: Signals, seconds: float | None) -> int:
        """See `last_output.send_last_output`; the bytes that are lost, for whatever reason."""
        self.restore_terminal()
        return send_last_output([output for _, output in self.outputs()], signals, seconds) + self._overruns

    def restore_terminal(self) -> None:
        """Leave raw mode, if it is that."""

    @abstractmethod
    def outputs(self) -> list[tuple[str, Output]]:
        """What the guest's output goes to, each with a name for people."""

    def why_lost(self) -> str:
        """Why bytes were lost, for `send_last_output`'s caller."""
        for name, output in self.outputs():
            if output.failure is not None:
                return cannot_write(name, output.failure)
        return f"{self.outputs()[0][0]} was not read in time"

    def begin_line(self, teller: Teller) -> None:
        """Make sure that what we print next on standard error is a line of its own."""

    @property
    def _overruns(self) -> int:
        board = self.machine.board
        return sum(serial.output.overruns for serial in (board.serial, *board.command_ports))

    def last_lines(self, outcome: Outcome) -> dict[str, list[str]]:
        """What explains `outcome` and was not shown: lines of the console and of Linux's log, by name.

        Before the machine is closed.
        """
        if self._shows_console or outcome.ending not in (
            Ending.PANIC,
            Ending.TRIPLE_FAULT,
            Ending.KVM_ERROR,
            Ending.HOST_ERROR,
            Ending.STUCK,
        ):
            return {}
        from hvkvm.machine import kernel_log

        console = self.machine.board.tail.lines(TAIL_LINES)
        log = kernel_log.last_lines(self.machine.platform, TAIL_LINES, console)
        return {"the guest's console, at its end": console, "the guest's kernel log, at its end": log}

    def begin(self) -> None:
        """Take the terminal, or whatever it reads, before the machine starts."""

    @abstractmethod
    def end(self) -> None:
        """Give everything back, however the run ended."""

    def __enter__(self) -> Front:
        self.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


class _OnTerminal(Front):
    """A console on our standard input and output, which may be a terminal: the guest's, or a command's."""

    _console: Console
    """The subclass makes it."""

    def outputs(self) -> list[tuple[str, Output]]:
        """See Front."""
        return [(OUTPUT, self._console.output)]

    def restore_terminal(self) -> None:
        """See Front."""
        self._console.restore_terminal()

    def begin(self) -> None:
        """See Front."""
        self._console.start()

    def end(self) -> None:
        """See Front."""
        self._console.close()


class ConsoleFront(_OnTerminal):
    """The guest's console on our standard input and output."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine, shows_console=True)
        self._console = make_console(machine)
        machine.board.attach_console(self._console)


def on_failed(machine: Machine, name: str) -> Callable[[OSError], None]:
    """Tells that the output `name` takes nothing."""

    def tell(error: OSError) -> None:
        text = f"{cannot_write(name, error)}; the guest goes on, and what it prints is lost"
        machine.platform.observer.event(Warned("output", text))

    return tell


def make_console(machine: Machine, *, own_tail: bool = False) -> Console:
    """A console on our standard input and output whose keys act on `machine`."""
    from hvkvm.backends.console import Console

    return Console(
        machine.platform.io,
        on_quit=lambda: machine.finish(Ending.QUIT, 130, "by the console's keys"),
        on_dump=lambda: os.kill(os.getpid(), signal.SIGQUIT),
        on_output_broken=lambda: machine.finish(Ending.QUIT, 141, "nobody reads the console any more"),
        on_output_failed=on_failed(machine, OUTPUT),
        tail=None if own_tail else machine.board.tail,
    )


class CommandFront(Front):
    """What streams and a terminal have in common."""

    def __init__(self, machine: Machine, *, show_console: bool) -> None:
        super().__init__(machine, shows_console=show_console)
        from hvkvm.backends.output import Output

        self.command: Command
        """The subclass makes it."""
        self._sent: set[int] = set()
        self.errors = Output(2, machine.platform.io, on_failed=on_failed(machine, ERRORS))
        """Standard error, where the guest's console is shown if it is."""
        if show_console:
            machine.board.attach_sink(self.errors.write)

    def signal(self, number: int) -> bool:
        """See Front: passed on, unless the command has not started yet or somebody insists."""
        if number == signal.SIGWINCH:
            self.command.tell_window()
            return True
        if number in INSISTING and number in self._sent:
            return False
        self._sent.add(number)
        name = signal.Signals(number).name

        def no_answer() -> None:
            self.machine.finish(Ending.QUIT, 128 + number, f"{name}, which the guest did not pass on")

        return self.command.signal(name.removeprefix("SIG"), no_answer)

    def take_rest(self, outcome: Outcome) -> None:
        """See Front."""
        self.command.take_rest(exited=outcome.ending is Ending.COMMAND_EXITED)
        self.let_go()

    def begin_line(self, teller: Teller) -> None:
        """See Front."""
        if self.command.in_line:
            teller.write("\n", always=True)

    def let_go(self) -> None:
        """Stop the machine and leave it. Idempotent."""
        self.machine.stop()
        self.command.close()


class StreamsFront(CommandFront):
    """A command's standard input, output and error are ours."""

    def __init__(self, machine: Machine, *, show_console: bool) -> None:
        super().__init__(machine, show_console=show_console)
        from hvkvm.backends.host_input import HostInput
        from hvkvm.backends.output import Output
        from hvkvm.machine.command import Command

        self._input = HostInput(0, machine.platform.io)
        self._output = Output(1, machine.platform.io, on_failed=on_failed(machine, OUTPUT))
        self.command = Command(
            machine.platform.io,
            machine.board,
            machine.bus,
            self._input,
            {"out": self._output, "err": self.errors},
        )
        if show_console:
            self._hold_console_too()

    def _hold_console_too(self) -> None:
        hold_command, console = self.errors.on_congestion, self.machine.board.serial.output

        def hold(held: bool) -> None:
            if hold_command is not None:
                hold_command(held)
            console.hold(held)

        self.errors.on_congestion = hold

    def let_go(self) -> None:
        """Stop the machine and leave it. Idempotent."""
        super().let_go()
        self._input.close()

    def outputs(self) -> list[tuple[str, Output]]:
        """See Front."""
        return [(OUTPUT, self._output), (ERRORS, self.errors)]

    def end(self) -> None:
        """See Front."""
        self.let_go()
        self._output.close()
        self.errors.close()


class TerminalFront(CommandFront, _OnTerminal):
    """A command's terminal is ours."""

    def __init__(self, machine: Machine, *, show_console: bool) -> None:
        super().__init__(machine, show_console=show_console)
        from hvkvm.machine.command import Command

        self.command = Command(machine.platform.io, machine.board, machine.bus, window=window_size)
        self._console = make_console(machine, own_tail=True)
        machine.board.attach_terminal(self._console)
        if show_console:
            self.errors.on_congestion = machine.board.serial.output.hold

    def outputs(self) -> list[tuple[str, Output]]:
        """See Front."""
        return [*super().outputs(), (ERRORS, self.errors)]

    def end(self) -> None:
        """See Front."""
        try:
            self.let_go()
        finally:
            super().end()
            self.errors.close()


def window_size() -> tuple[int, int]:
    """Rows and columns of our terminal; 24 and 80 where none of ours says."""
    for stream in (1, 0, 2):
        try:
            size = os.get_terminal_size(stream)
        except OSError:
            continue
        if size.lines > 0 and size.columns > 0:
            return size.lines, size.columns
    return 24, 80


def tell_last_lines(found: dict[str, list[str]], teller: Teller) -> None:
    """Print what `Front.last_lines` found to standard error."""
    for name, lines in found.items():
        if lines:
            shown = "".join(f"  | {line}\n" for line in lines)
            teller.write(f"hvkvm: {name}:\n{shown}", always=True)
