"""`hvkvm run`: boot a guest on the terminal and return its exit status.

The main thread parses, builds the machine, owns the signals and waits. `front` has
what is shown and read. Ctrl-C reaches the guest once something there listens to it;
before that it ends the run. SIGQUIT prints who waits for what and the run goes on.
"""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from hvkvm.cli.arguments import Parser, split_command
from hvkvm.errors import ConfigError, OutputError
from hvkvm.machine.config import (
    KNOWN_DEVICES,
    SIGNAL_CHOICES,
    SYNIC_CHOICES,
    VMBUS_CHOICES,
    VMBUS_VERSIONS,
    MachineConfig,
    parse_size,
)

if TYPE_CHECKING:
    from hvkvm.cli.front import Front
    from hvkvm.cli.signals import Signals
    from hvkvm.cli.status import StatusLine
    from hvkvm.cli.teller import Teller
    from hvkvm.machine.machine import Machine
    from hvkvm.machine.outcome import Outcome

EPILOG = """exit status:
  the guest command's own; 0 after a power-off; 2 usage; 69 KVM unavailable;
  74 instead of 0 when output is lost; 77 capability missing; 124 timeout;
  130 interrupted; 141 nobody reads the output; 254 triple fault or KVM internal
  error; 255 guest panic

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
"""


def parser() -> Parser:
    """The options of `hvkvm run`; a default of None means "as MachineConfig says"."""
    p = Parser("hvkvm run", "Boot a guest; what follows `--` is run inside it.", EPILOG)
    p.add_argument(
        "--config", type=Path, metavar="TOML", help="read a machine from this file; flags override it"
    )
    p.add_argument("--restore", type=Path, metavar="FILE", help="go on from a saved VM; see `hvkvm ctl save`")
    p.add_argument("--kernel", type=Path, metavar="FILE", help="bzImage, vmlinux, PVH ELF or multiboot image")
    p.add_argument(
        "--initrd", type=Path, metavar="FILE", help="initial RAM disk; `-- command` is added to it"
    )
    p.add_argument("--append", metavar="TEXT", help="kernel command line, behind hvkvm's own defaults")
    p.add_argument("--cpus", metavar="N", help="vCPUs (1)")
    p.add_argument(
        "--cpu", metavar="host,-NAME", help="hide CPU features, by /proc/cpuinfo's names: host,-cx16 (host)"
    )
    p.add_argument("--memory", metavar="SIZE", help="guest RAM: 512M, 2G, 0.5G; a bare number is MiB (512M)")
    p.add_argument(
        "--hv", metavar="LIST", help="host-model, passthrough, none, or QEMU's hv-* names (host-model)"
    )
    p.add_argument(
        "--synic",
        metavar="|".join(SYNIC_CHOICES),
        help="who emulates Hyper-V: KVM, or hvkvm in user space on any KVM (auto: KVM where it can)",
    )
    p.add_argument(
        "--signal-path",
        metavar="|".join(SIGNAL_CHOICES),
        help="who answers HvSignalEvent: KVM_HYPERV_EVENTFD or the userspace table (auto)",
    )
    p.add_argument(
        "--device",
        action="append",
        metavar="NAME",
        dest="devices",
        help=f"add a device: {', '.join(KNOWN_DEVICES)}",
    )
    p.add_argument(
        "--vmbus",
        metavar="|".join(VMBUS_CHOICES),
        help="a VMBus host with heartbeat, shutdown and time (off)",
    )
    p.add_argument(
        "--vmbus-max-version",
        metavar="X.Y",
        help=f"the newest VMBus version the host speaks ({VMBUS_VERSIONS[-1]})",
    )
    p.add_argument(
        "--vsock",
        type=Path,
        metavar="PATH",
        help="Unix socket that leads to the guest's AF_VSOCK ports; PATH_PORT takes what the guest connects",
    )
    p.add_argument(
        "--control", metavar="PATH|auto|off", help="the socket by which `hvkvm ctl` reaches this VM (auto)"
    )
    p.add_argument("--name", metavar="NAME", help="what `hvkvm ctl --vm` calls this VM (hvkvm-PID)")
    p.add_argument(
        "--file",
        action="append",
        metavar="GUEST=HOST",
        dest="files",
        help="put a file of this host into the guest",
    )
    p.add_argument(
        "--modules-dir", type=Path, metavar="DIR", help="the guest kernel's lib/modules/VERSION folder"
    )
    p.add_argument(
        "--module", action="append", metavar="NAME", dest="modules", help="load this module at start"
    )
    p.add_argument(
        "--busybox", type=Path, metavar="FILE", help="a static busybox for the guest (found in PATH)"
    )
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
        "--console", action="store_true", help="show the console of a guest that runs a command, on stderr"
    )
    p.add_argument("--timeout", metavar="SECONDS", help="end the run after this long, with status 124")
    p.add_argument("--no-reboot", action="store_true", help="a guest reset ends the run with status 0")
    p.add_argument("--no-acpi", action="store_true", help="give the guest no ACPI tables")
    p.add_argument("--kvm", metavar="PATH", dest="kvm_path", help="the KVM device (/dev/kvm)")
    p.add_argument("--json", action="store_true", help="print the outcome as one JSON line on standard error")
    p.add_argument("--quiet", action="store_true", help="say nothing on standard error unless the run fails")
    return p


_DECIDED_BY_FILE = {
    "--kernel": "kernel",
    "--append": "append",
    "--cpus": "cpus",
    "--cpu": "cpu",
    "--memory": "memory",
    "--hv": "hv",
    "--synic": "synic",
    "--device": "devices",
    "--vmbus": "vmbus",
    "--vmbus-max-version": "vmbus_max_version",
    "--no-acpi": "acpi",
}
"""Options of a machine that goes on from a file, which has them already."""


def config_from(arguments: list[str]) -> tuple[MachineConfig, Any]:
    """Parse `arguments`; returns the checked configuration and the raw options."""
    own, command = split_command(arguments)
    options = parser().parse_args(own)
    values: dict[str, Any] = {}
    for key in (
        "kernel",
        "initrd",
        "append",
        "cpu",
        "hv",
        "synic",
        "signal_path",
        "vmbus",
        "vmbus_max_version",
        "vsock",
        "control",
        "name",
        "modules_dir",
        "busybox",
        "kvm_path",
    ):
        if (value := getattr(options, key)) is not None:
            values[key] = value
    for key in ("devices", "modules"):
        if (value := getattr(options, key)) is not None:
            values[key] = tuple(value)
    if options.files is not None:
        values["files"] = tuple(map(_file, options.files))
    if options.cpus is not None:
        values["cpus"] = _number("--cpus", options.cpus, int, "2")
    if options.memory is not None:
        values["memory"] = parse_size(options.memory)
    if options.timeout is not None:
        values["timeout"] = _number("--timeout", options.timeout, float, "30")
    if options.no_reboot:
        values["reboot"] = False
    if options.no_acpi:
        values["acpi"] = False
    if command:
        values["command"] = command
    elif "--" in arguments:
        raise ConfigError("--: no command behind it; name the guest command, or leave `--` out for a console")
    if options.config is not None:
        return MachineConfig.from_toml(options.config, control="auto")._replace(**values).validate(), options
    if options.restore is not None:
        if decided := [flag for flag, key in _DECIDED_BY_FILE.items() if key in values]:
            raise ConfigError(f"--restore {options.restore}: the file decides {decided[0]}; leave it out")
        values |= {"restore": options.restore, "kernel": options.restore}
    if "kernel" not in values:
        raise ConfigError("--kernel: missing; name the guest kernel's file, or a --config that does")
    return MachineConfig(**{"control": "auto", **values}).validate(), options


def _file(text: str) -> tuple[str, Path]:
    guest, equals, host = text.partition("=")
    if not (guest and equals and host):
        raise ConfigError(f"--file {text}: not two paths; write GUEST=HOST, such as /root/test=./test")
    return guest, Path(host)


def _number(flag: str, text: str, kind: Callable[[str], Any], example: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{flag} {text}: not a number; write one, such as {flag} {example}") from None


def main(arguments: list[str]) -> int:
    """Run the verb; returns the exit status."""
    # What is made before the guest runs is there to stay: looking for garbage in it is time lost.
    gc.disable()
    try:
        return _run(arguments)
    finally:
        gc.enable()


def _run(arguments: list[str]) -> int:
    config, options = config_from(arguments)
    from hvkvm.backends.console import DRAIN_SECONDS
    from hvkvm.cli.front import front_for, signals_for, tell_last_lines, with_command_io
    from hvkvm.cli.last_output import patience
    from hvkvm.cli.signals import Signals
    from hvkvm.cli.status import StatusLine
    from hvkvm.cli.teller import CLOSE_SECONDS, Teller
    from hvkvm.machine.machine import Machine
    from hvkvm.machine.outcome import Ending

    config = with_command_io(config, options)
    began = monotonic()
    with (
        Signals(signals_for(config)) as signals,
        Teller(sys.stderr, quiet=options.quiet or options.json) as teller,
        Machine(config, observer=teller) as machine,
    ):
        offered = machine.hyperv.offered
        if not offered.features and config.hv != "none" and not options.quiet:
            note = f"--hv {config.hv}: this kernel's KVM can back none; `hvkvm doctor` names the remedies"
            teller.say(f"running without enlightenments: {note}")
        elif offered.features and config.synic == "auto" and not options.quiet and not options.json:
            choice = offered.choice
            who = "in user space" if choice.synic == "user" else "by KVM"
            teller.say(f"SynIC {who}: {choice.why}")
        status = StatusLine(machine, teller, enabled=not options.quiet and not options.json)
        front = front_for(machine, options)
        status.start()
        gc.freeze()
        gc.enable()
        with front:
            machine.start()
            end = None if config.timeout is None else monotonic() + config.timeout
            outcome, report = _attend(machine, signals, status, teller, end, front)
            front.take_rest(outcome)
            machine.close()  # a reader who takes his time holds no guest RAM
            status.clear()
            lost = front.send_last_output(signals, patience(outcome, end))
        if lost or options.json or not outcome.clean:
            front.begin_line(teller)
        if lost:
            teller.say(f"{lost} bytes of the guest's output are lost: {front.why_lost()}")
        if report:
            teller.write(f"{report}\n", always=True)
        if not options.json:
            tell_last_lines(front, outcome, teller)
        _conclude(machine, outcome, monotonic() - began, options, teller)
        told_to_end = outcome.ending in (Ending.QUIT, Ending.TIMEOUT)
        told = teller.close(DRAIN_SECONDS if told_to_end else CLOSE_SECONDS)
    return OutputError.exit_status if outcome.status == 0 and (lost or not told) else outcome.status


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


def _describe(machine: Machine) -> str:
    from hvkvm.machine.dump import describe

    return describe(machine.parts)


def _conclude(machine: Machine, outcome: Outcome, seconds: float, options: Any, teller: Teller) -> None:
    """Say how it ended: JSON when asked, one line when it was not clean."""
    if options.json:
        import json

        record = {
            "ending": outcome.ending.value,
            "status": outcome.status,
            "detail": outcome.detail,
            "seconds": round(seconds, 3),
            "resets": machine.resets,
            "features": str(machine.hyperv.offered.features),
            "synic": machine.hyperv.offered.synic,
            "exits": machine.exit_counts(),
        }
        teller.write(f"{json.dumps(record)}\n", always=True)
    elif not outcome.clean:
        teller.say(str(outcome))
