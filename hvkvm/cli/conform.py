"""`hvkvm conform`: what a guest sees of the SynIC's, hypercalls' and VMBus's rules under any VMM."""

from __future__ import annotations

from typing import Any

from hvkvm.cli.arguments import Parser
from hvkvm.cli.output import show
from hvkvm.errors import ConfigError

FORMATS = ("table", "tap", "junit", "json")
EPILOG = """COMMAND starts any VMM that loads a multiboot image and shows the guest's serial port COM1
on standard output; {kernel} in it is the image's path. The guest looks for
hyperv-testdev at port 0x3000 and for a VMBus; what is not there is "absent".

exit status: 0 every rule holds; 1 some do not; 2 usage; 69 the VMM cannot be started, or did
not run the guest; 74 the result could not be written; 130 interrupted (129 by SIGHUP, 143
by SIGTERM), and then the VMM has ended, too

examples:
  hvkvm conform --vmm hvkvm
  hvkvm conform --vmm hvkvm --synic user --format tap
  hvkvm conform --vmm qemu
  hvkvm conform --vmm "qemu-system-x86_64 -accel tcg -nographic -kernel {kernel}"
"""
DEFAULT_SECONDS = 300.0
NOT_RUN = 69


def parser() -> Parser:
    """The options."""
    p = Parser("hvkvm conform", "Hold a VMM to what a guest may expect of Hyper-V's interfaces.", EPILOG)
    p.add_argument("--vmm", metavar="hvkvm|qemu|COMMAND", default="hvkvm", help="what is tried (hvkvm)")
    p.add_argument(
        "--synic", metavar="auto|kernel|user", default="auto", help="with --vmm hvkvm: as of hvkvm run"
    )
    p.add_argument("--format", metavar="|".join(FORMATS), default="table", help="of the result (table)")
    p.add_argument("--timeout", metavar="SECONDS", default=str(DEFAULT_SECONDS), help="for the guest (300)")
    return p


def parse(arguments: list[str]) -> Any:
    """The checked options. ConfigError."""
    options = parser().parse_args(arguments)
    if options.format not in FORMATS:
        raise ConfigError(f"--format {options.format}: unknown; choose {', '.join(FORMATS)}")
    if options.synic not in ("auto", "kernel", "user"):
        raise ConfigError(f"--synic {options.synic}: unknown; choose auto, kernel, user")
    try:
        options.timeout = float(options.timeout)
        if not options.timeout > 0:
            raise ValueError
    except ValueError:
        raise ConfigError(f"--timeout {options.timeout}: not a time; write seconds, such as 60") from None
    return options


def main(arguments: list[str]) -> int:
    """Run the verb; returns the exit status."""
    options = parse(arguments)
    from hvkvm.cli.output import complain
    from hvkvm.cli.signals import ending_by_exit
    from hvkvm.testing import conform

    command = conform.command_of(options.vmm, options.synic)
    with ending_by_exit():  # the VMM has a session of its own, and would go on
        found, printed = conform.run(command, options.timeout)
    if all(one.seen is None for one in found):
        complain(f"hvkvm: --vmm {options.vmm}: the guest said nothing; this is what was printed:")
        complain(printed[-2000:].rstrip() or "nothing")
        return NOT_RUN
    if options.format == "json":
        import json

        show(json.dumps(conform.as_json(found)))
    elif options.format == "junit":
        show(conform.junit(found, options.vmm))
    else:
        show("\n".join((conform.tap if options.format == "tap" else conform.table)(found)))
    return 0 if all(one.verdict in ("ok", "absent") for one in found) else 1
