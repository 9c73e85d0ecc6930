"""`hvkvm warm`: boot a guest to where it waits for a command, and save it for `hvkvm run --from`.

The main thread parses, builds the machine, owns the signals and waits.
"""

from __future__ import annotations

import signal
import sys
from time import monotonic
from typing import TYPE_CHECKING, Any

from hvkvm import given_file
from hvkvm.cli.arguments import Parser, path_word
from hvkvm.cli.run import machine_config, machine_parser, values_of
from hvkvm.errors import ConfigError, OutputError
from hvkvm.machine import own_files

if TYPE_CHECKING:
    from hvkvm.cli.signals import Signals
    from hvkvm.cli.teller import Teller
    from hvkvm.machine.config import MachineConfig
    from hvkvm.machine.machine import Machine
    from hvkvm.machine.outcome import Outcome

EPILOG = """exit status:
  0 saved; 1 the guest ended before it waited, or could not be saved; 2 usage; 69 KVM
  unavailable, or the host has no files, memory or threads left; 74 saved, but a recording
  or a timeline is lost; 77 capability missing; 124 timeout; 130 interrupted (129 by SIGHUP,
  143 by SIGTERM); 254 triple fault, KVM internal error or refusal, a reset without a
  kernel any more, error in the host's code, the host does not answer, or the host has no
  files, memory or threads left while the guest runs; 255 guest panic

examples:
  hvkvm warm --kernel vmlinuz -o warm.state
  hvkvm run --from warm.state -- uname -r
  hvkvm warm --kernel vmlinuz --vmbus on --modules-dir DIR --module hv_utils -o warm.state
"""

NOT_FOR_WARM = ("restore", "warm", "vsock")
STATUS_LINE = "booting to where a command is awaited, {seconds:.1f} s, {exits} exits"
TELL_SECONDS = 10.0
"""Where there is no terminal for a status line, a line of progress comes so often."""


def parser() -> Parser:
    """The options of `hvkvm warm`."""
    p = machine_parser(
        "hvkvm warm",
        "Boot a guest, load what is asked, and save it where it waits for a command.",
        EPILOG,
        NOT_FOR_WARM,
    )
    p.add_argument("-o", "--output", type=path_word, metavar="FILE", help="where to save it")
    p.add_argument("--console", action="store_true", help="show the guest's console, on stderr")
    p.add_argument("--quiet", action="store_true", help="say nothing on standard error unless it fails")
    return p


def parse(arguments: list[str]) -> tuple[MachineConfig, Any]:
    """The checked configuration and the raw options. ConfigError."""
    if "--" in arguments:
        raise ConfigError("--: a warm guest waits for its command; give it to `hvkvm run --from FILE`")
    options = parser().parse_args(arguments)
    if options.output is None:
        raise ConfigError("-o: missing; name the file to save the warm guest to")
    if why := given_file.why_no_place(options.output):
        raise ConfigError(f"-o {options.output}: no file can be there: {why}")
    try:
        given_file.check_replaceable(options.output)
    except OSError as error:
        raise ConfigError(f"-o {options.output}: {error.strerror}") from None
    config = machine_config(options, values_of(options))._replace(awaits=True).validate()
    own_files.refuse("-o", options.output, [*own_files.read(config), *own_files.written(config)])
    if options.config is not None:
        own_files.refuse("-o", options.output, [("--config", options.config)])
    return config, options


def main(arguments: list[str]) -> int:
    """Run the verb; returns the exit status."""
    return save_machine(*parse(arguments))


def save_machine(config: MachineConfig, options: Any) -> int:
    """Boot `config` to where it waits, and save it; the exit status."""
    from hvkvm.cli.front import ENDING_SIGNALS
    from hvkvm.cli.signals import EndedEarly, Signals
    from hvkvm.cli.teller import Teller
    from hvkvm.machine.machine import Machine
    from hvkvm.machine.outcome import Ending, Outcome

    with (
        Signals(ENDING_SIGNALS, builds=Machine) as signals,
        Teller(sys.stderr, quiet=options.quiet) as teller,
    ):
        try:
            return _build_and_save(config, options, signals, teller)
        except EndedEarly as early:
            outcome = Outcome(Ending.QUIT, 128 + early.number, str(early))
            teller.say(f"not warm: {outcome}")
            return outcome.status


def _build_and_save(config: MachineConfig, options: Any, signals: Signals, teller: Teller) -> int:
    """See `save_machine`. EndedEarly."""
    from hvkvm.cli.status import StatusLine
    from hvkvm.machine.machine import Machine
    from hvkvm.machine.outcome import Ending
    from hvkvm.machine.warm import TAIL_LINES, save_when_warm

    began = monotonic()
    signals.end_early()
    with Machine(config, observer=teller) as machine:
        if options.console:
            machine.board.attach_sink(lambda data: teller.write(data.decode(errors="replace"), always=True))
        size = save_when_warm(machine.parts, options.output)
        live = not (options.quiet or options.console)
        status = StatusLine(machine, teller, enabled=live, what=STATUS_LINE)
        status.start()
        signals.end_early()
        machine.start()
        outcome = _attend(machine, signals, teller if live else None)
        if outcome.ending is Ending.HOST_ERROR:
            machine.lifecycle.take_error()  # it is told as the run's end
        machine.close()
        status.clear()
        if outcome.ending is not Ending.SAVED:
            lines = [] if options.console else machine.board.tail.lines(TAIL_LINES)
            teller.write("".join(f"  | {line}\n" for line in lines), always=True)
            teller.say(f"not warm: {outcome}")
            return outcome.status or 1
        if not options.quiet:
            room = options.output.stat().st_blocks * 512
            teller.say(
                f"{options.output}: a warm guest, {room >> 20} MiB on disk, {size() >> 20} MiB when mapped,"
                f" {monotonic() - began:.1f} s"
            )
        if options.quiet:  # else they were warned of
            for text in machine.unwritten:
                teller.say(text)
    return OutputError.exit_status if machine.unwritten else 0


def _attend(machine: Machine, signals: Signals, teller: Teller | None) -> Outcome:
    """Wait for the machine's end, its time limit, or a signal, which ends it."""
    from hvkvm.machine.outcome import Ending

    began = monotonic()
    limit = machine.config.timeout
    while machine.outcome is None:
        passed = monotonic() - began
        if limit is not None and passed >= limit:
            machine.expire()
            continue
        number = signals.wait(
            machine.lifecycle.ended_fd, TELL_SECONDS if limit is None else min(TELL_SECONDS, limit - passed)
        )
        if number is not None:
            machine.finish(Ending.QUIT, 128 + number, signal.Signals(number).name)
        elif machine.outcome is None and teller is not None and not teller.isatty():
            exits = sum(machine.exit_counts().values())
            teller.say(STATUS_LINE.format(seconds=monotonic() - began, exits=exits))
    return machine.outcome
