"""`hvkvm run`: boot a guest on the terminal and return its exit status.

The main thread parses, builds the machine, owns the signals and waits. `front` has
what is shown and read. Ctrl-C reaches the guest once something there listens to it;
before that it ends the run, and before there is a guest also the building of the machine.
SIGQUIT prints who waits for what and the run goes on.
"""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Collection
from time import monotonic
from typing import TYPE_CHECKING, Any

from hvkvm.cli.arguments import Parser, path_word, split_command
from hvkvm.errors import ConfigError, OutputError
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.config_fields import Field, fields_of

if TYPE_CHECKING:
    from hvkvm.cli.front import Front
    from hvkvm.cli.signals import Signals
    from hvkvm.cli.status import StatusLine
    from hvkvm.cli.teller import Teller
    from hvkvm.machine.machine import Machine
    from hvkvm.machine.outcome import Outcome

EPILOG = """exit status:
  the guest command's own; 0 after a power-off; 2 usage; 69 KVM unavailable, or the host has
  no files, memory or threads left; 74 instead of 0 when output, firmware's variables, a
  recording or a timeline are lost; 77 capability missing; 124 timeout; 130 interrupted (129
  by SIGHUP, 143 by SIGTERM); 141 nobody reads the output; 254 triple fault, KVM internal
  error or refusal, a reset without a kernel any more, error in the host's code, the host does
  not answer, or the host has no files, memory or threads left while the guest runs; 255 guest
  panic

a standard output that takes nothing (a full disk, ulimit -f) does not end the guest:
it is said at once, tried again with what the guest prints next, and counted at the end

a guest command's standard input, output and error are ours, and SIGINT, SIGTERM,
SIGHUP, SIGUSR1 and SIGUSR2 are the command's (the second SIGINT or SIGTERM ends the
run); on a terminal it has one of its own, as with -t

keys on the console or terminal: Ctrl-a x quits, Ctrl-a d (or SIGQUIT) says who waits
for what, Ctrl-a b sends a break (SysRq), Ctrl-a h helps, Ctrl-a Ctrl-a sends Ctrl-a

examples:
  hvkvm run --kernel vmlinuz -- uname -r
  hvkvm run --kernel vmlinuz --initrd initrd.img --append 'loglevel=4' --cpus 4
  hvkvm run --kernel vmlinuz --hv relaxed,vpindex,synic,time,stimer -- cat /proc/interrupts
  hvkvm run --from warm.state --file /root/test=./test -- /root/test
"""


class _RunParser(Parser):
    """With the keys of structured options in the help: only that imports their types."""

    def format_help(self) -> str:
        fields = fields_of(MachineConfig)
        for action in self._actions:
            if action.dest in fields:
                field = fields[action.dest]
                action.help = field.help + field.kind.more_help()
        return super().format_help()


def machine_parser(prog: str, description: str, epilog: str, without: Collection[str] = ()) -> Parser:
    """A parser with the options that make a machine, but for those of the fields `without`."""
    p = _RunParser(prog, description, epilog)
    p.add_argument(
        "--config", type=path_word, metavar="TOML", help="read a machine from this file; flags override it"
    )
    for key, field in fields_of(MachineConfig).items():
        if field.flag and key not in without:
            _add(p, key, field)
    return p


def parser() -> Parser:
    """The options of `hvkvm run`; a default of None means "as MachineConfig says"."""
    p = machine_parser("hvkvm run", "Boot a guest; what follows `--` is run inside it.", EPILOG)
    p.add_argument(
        "-t", action="store_true", dest="terminal", default=None, help="give the command a terminal"
    )
    p.add_argument(
        "-T",
        action="store_false",
        dest="terminal",
        default=None,
        help="give it none (it has one if standard input and output are)",
    )
    p.add_argument(
        "--ssh", action="store_true", help="with --net user: lead a port to the guest's ssh, and say which"
    )
    p.add_argument(
        "--console", action="store_true", help="show the console of a guest that runs a command, on stderr"
    )
    p.add_argument("--json", action="store_true", help="print the outcome as one JSON line on standard error")
    p.add_argument("--quiet", action="store_true", help="say nothing on standard error unless the run fails")
    return p


def _add(p: Parser, key: str, field: Field) -> None:
    """One row of the table as an option; its text is read when all are known."""
    if field.kind.flag_value is not None:
        p.add_argument(field.flag, action="store_const", const=True, dest=key, help=field.help)
    else:
        action = "append" if field.kind.repeated else "store"
        p.add_argument(field.flag, action=action, metavar=field.metavar, dest=key, help=field.help)


def config_from(arguments: list[str]) -> tuple[MachineConfig, Any]:
    """Parse `arguments`; returns the checked configuration and the raw options."""
    own, command = split_command(arguments)
    options = parser().parse_args(own)
    values = values_of(options)
    if command:
        values["command"] = command
    elif "--" in arguments:
        raise ConfigError("--: no command behind it; name the guest command, or leave `--` out for a console")
    return machine_config(options, values), options


def machine_config(options: Any, values: dict[str, Any]) -> MachineConfig:
    """The checked configuration that `values`, of `values_of`, and `options.config` make. ConfigError."""
    from_file: dict[str, Any] = {}
    if options.config is not None:
        from_file = MachineConfig.read_toml(options.config)
    made = {"control": "auto", **from_file, **values}
    if made.get("restore") or made.get("warm"):
        _leave_to_the_file(options, values, from_file)
        made["kernel"] = made.get("restore") or made["warm"]
    if not made.keys() & {"kernel", "firmware", "disks", "cdroms"}:
        raise ConfigError("--kernel: missing; name the guest kernel's file, or a --config that does")
    config = MachineConfig(**made).validate()
    if options.config is not None:
        from hvkvm.machine.own_files import refuse, written

        for flag, path in written(config):
            refuse(flag, path, [("--config", options.config)])
    return config


def _leave_to_the_file(options: Any, values: dict[str, Any], from_file: dict[str, Any]) -> None:
    """Refuse what the command line or a --config says of what a saved machine's file decides. ConfigError."""
    made = {**from_file, **values}
    flag = f"{'--restore' if 'restore' in made else '--from'} {made.get('restore') or made['warm']}"
    for key, field in fields_of(MachineConfig).items():
        if field.in_saved and key in values:
            raise ConfigError(f"{flag}: the file decides {field.flag}; leave it out")
    if key := MachineConfig.decided_by_file(from_file):
        raise ConfigError(f"{flag}: the file decides {key}; leave it out of --config {options.config}")


def values_of(options: Any) -> dict[str, Any]:
    """Every field that the command line gives, read as its kind says. ConfigError."""
    values: dict[str, Any] = {}
    for key, field in fields_of(MachineConfig).items():
        given = getattr(options, key, None)
        if given is None:
            continue
        kind = field.kind
        if kind.flag_value is not None:
            values[key] = kind.flag_value
        elif kind.repeated:
            values[key] = tuple(kind.from_text(field.flag, text) for text in given)
        else:
            values[key] = kind.from_text(field.flag, given)
    return values


def main(arguments: list[str]) -> int:
    """Run the verb; returns the exit status."""
    # What is made before the guest runs is there to stay: looking for garbage in it is time lost.
    gc.disable()
    try:
        from hvkvm.cli.front import with_command_io, with_quiet_boot

        config, options = config_from(arguments)
        return run_machine(with_quiet_boot(with_command_io(config, options), options), options)
    finally:
        gc.enable()


def run_machine(config: MachineConfig, options: Any) -> int:
    """Run `config`, whose command's streams are settled, in front of our own streams; the exit status."""
    from hvkvm.backends.console import DRAIN_SECONDS
    from hvkvm.cli.front import signals_for
    from hvkvm.cli.signals import EndedEarly, Signals
    from hvkvm.cli.teller import Teller
    from hvkvm.machine.machine import Machine
    from hvkvm.machine.outcome import Ending, Outcome

    ssh = ""
    if options.ssh:
        from hvkvm.cli.ssh import with_ssh

        config, ssh = with_ssh(config)
    began = monotonic()
    with (
        Signals(signals_for(config), builds=Machine) as signals,
        Teller(sys.stderr, quiet=options.quiet or options.json) as teller,
    ):
        try:
            return _build_and_run(config, options, signals, teller, ssh, began)
        except EndedEarly as early:
            outcome = Outcome(Ending.QUIT, 128 + early.number, str(early))
            _conclude(None, outcome, monotonic() - began, options, teller)
            teller.close(DRAIN_SECONDS)
            return outcome.status


def _build_and_run(
    config: MachineConfig, options: Any, signals: Signals, teller: Teller, ssh: str, began: float
) -> int:
    """See `run_machine`. EndedEarly."""
    from hvkvm.backends.console import DRAIN_SECONDS
    from hvkvm.cli.front import front_for, tell_last_lines
    from hvkvm.cli.last_output import patience
    from hvkvm.cli.status import StatusLine
    from hvkvm.cli.teller import CLOSE_SECONDS
    from hvkvm.machine.machine import Machine
    from hvkvm.machine.outcome import Ending

    signals.end_early()
    with Machine(config, observer=teller) as machine:
        offered = machine.hyperv.offered
        if not offered.features and config.hv != "none" and not options.quiet and not options.json:
            note = f"--hv {config.hv}: this kernel's KVM can back none; `hvkvm doctor` names the remedies"
            teller.say(f"running without enlightenments: {note}")
        elif offered.features and config.synic == "auto" and not options.quiet and not options.json:
            choice = offered.choice
            who = "in user space" if choice.synic == "user" else "by KVM"
            teller.say(f"SynIC {who}: {choice.why}")
        for note in (machine.boot_note, machine.root_note):
            if note and not options.quiet and not options.json:
                teller.say(note)
        if ssh:
            teller.write(f"hvkvm: {ssh}\n", always=True)
        status = StatusLine(machine, teller, enabled=not options.quiet and not options.json)
        front = front_for(machine, options)
        status.start()
        gc.freeze()
        gc.enable()
        with front:
            signals.end_early()
            machine.start()
            end = None if config.timeout is None else monotonic() + config.timeout
            outcome, report = _attend(machine, signals, status, teller, end, front)
            if outcome.ending is Ending.HOST_ERROR:
                machine.lifecycle.take_error()  # it is told as the run's end
            fatal = ""
            if outcome.ending in (Ending.TRIPLE_FAULT, Ending.KVM_ERROR) and not options.json:
                fatal = _describe(machine, fatal=True)
            front.take_rest(outcome)
            last_lines = {} if options.json else front.last_lines(outcome)
            machine.close()  # a reader who takes his time holds no guest RAM
            status.clear()
            lost = front.send_last_output(signals, patience(outcome, end))
        unkept = "" if machine.firmware is None else machine.firmware.unkept
        if lost or unkept or machine.unwritten or options.json or not outcome.clean:
            front.begin_line(teller)
        if unkept:
            teller.say(f"the firmware's variables are not kept: {config.firmware_vars}: {unkept}")
        if lost:
            teller.say(f"{lost} bytes of the guest's output are lost: {front.why_lost()}")
        if options.quiet or options.json:  # else they were warned of
            for text in machine.unwritten:
                teller.say(text)
        if report:
            teller.write(f"{report}\n", always=True)
        tell_last_lines(last_lines, teller)
        if fatal:
            teller.write(f"{fatal}\n", always=True)
        _conclude(machine, outcome, monotonic() - began, options, teller)
        told_to_end = outcome.ending in (Ending.QUIT, Ending.TIMEOUT)
        told = teller.close(DRAIN_SECONDS if told_to_end else CLOSE_SECONDS)
    missing = lost or unkept or machine.unwritten or not told
    return OutputError.exit_status if outcome.status == 0 and missing else outcome.status


def _attend(
    machine: Machine, signals: Signals, status: StatusLine, teller: Teller, end: float | None, front: Front
) -> tuple[Outcome, str]:
    """Wait for the machine's end, its time limit, or signals; what a time-out has to tell beside it."""
    from hvkvm.machine.outcome import Ending

    report = ""
    while machine.outcome is None:
        left = None if end is None else end - monotonic()
        if left is not None and left <= 0:
            status.clear()
            report = _describe(machine)
            machine.expire()
            continue
        number = signals.wait(machine.lifecycle.ended_fd, left)
        if number == signal.SIGQUIT:
            status.clear()
            teller.write(f"{_describe(machine)}\n", always=True)
        elif number is not None and not front.signal(number):
            machine.finish(Ending.QUIT, 128 + number, signal.Signals(number).name)
    return machine.outcome, report


def _describe(machine: Machine, *, fatal: bool = False) -> str:
    """The machine, or what ended it; one that cannot be described goes on all the same.

    An hvkvm that was exchanged while it runs, for days perhaps, cannot be imported from any more.
    """
    try:
        from hvkvm.machine import dump

        return dump.describe_fatal(machine.parts) if fatal else dump.describe(machine.parts)
    except Exception as error:
        from hvkvm.runtime.guard import fault_text

        return f"hvkvm: no description can be had: {fault_text(error)}"


def _conclude(
    machine: Machine | None, outcome: Outcome, seconds: float, options: Any, teller: Teller
) -> None:
    """Say how it ended: JSON when asked, one line when it was not clean. `machine` None: it was not built."""
    if options.json:
        import json

        offered = None if machine is None else machine.hyperv.offered
        record = {
            "ending": outcome.ending.value,
            "status": outcome.status,
            "detail": outcome.detail,
            "seconds": round(seconds, 3),
            "resets": 0 if machine is None else machine.resets,
            "features": "" if offered is None else str(offered.features),
            "synic": "" if offered is None else offered.synic,
            "exits": {} if machine is None else machine.exit_counts(),
        }
        teller.write(f"{json.dumps(record)}\n", always=True)
    elif not outcome.clean:
        teller.say(str(outcome))
