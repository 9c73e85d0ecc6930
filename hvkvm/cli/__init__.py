"""The `hvkvm` command: one file a verb, only the chosen one is imported.

Exit status: 0 ok; N the guest command's own; 1 a verb's answer is no, as its page
says; 2 usage; 69 KVM unavailable, or the host has no files, memory or threads left;
74 output that could not be written; 77 capability missing; 124 timeout;
130 interrupted (129 by SIGHUP, 143 by SIGTERM); 141 nobody reads the output;
254 triple fault, KVM internal error or refusal, a reset without a kernel any more,
error in the host's code, the host does not answer, or the host has no files, memory or
threads left while the guest runs; 255 guest panic.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

VERBS = {
    "run": "boot a guest",
    "warm": "boot a guest to where it waits for a command, and save it",
    "ctl": "operate a running guest",
    "top": "show what a running guest does, second by second",
    "matrix": "run commands over kernels, SynICs, vCPUs and disks, and print one table",
    "disk": "look at disk images, make, copy, check and compact them",
    "explain": "put VMBus traffic into words: recordings, messages in hexadecimal",
    "replay": "play a recording's guest against this hvkvm, and name the first difference",
    "conform": "hold a VMM to what a guest may expect of Hyper-V's interfaces",
    "doctor": "check what this machine's KVM can do, with the remedy for what is missing",
    "features": "list the Hyper-V enlightenments and what this host supports of them",
    "man": "print the manual page of a verb",
    "completion": "print what a shell needs to complete these words",
    "trace": "show the KVM ioctls of another program, decoded",
}

USAGE = """usage: hvkvm VERB [options]

{verbs}

`hvkvm VERB --help` explains a verb's options; `hvkvm --version` says which hvkvm this is."""


def usage() -> str:
    """The text of `hvkvm --help`."""
    width = max(map(len, VERBS))
    return USAGE.format(verbs="\n".join(f"  {verb:{width}}  {text}" for verb, text in VERBS.items()))


def hold_standard_fds() -> None:
    """Put /dev/null where a standard stream was closed: else the VM's own fds would land there."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status; every failure is one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _verb(arguments))


def _verb(arguments: list[str]) -> int:
    from hvkvm.cli.output import complain, show
    from hvkvm.errors import ConfigError

    if not arguments:
        complain(usage())
        return 2
    if arguments[0] in ("-h", "--help", "help"):
        show(usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        from hvkvm import __version__

        show(f"hvkvm {__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        raise ConfigError(f"{verb}: no such verb; choose {', '.join(VERBS)}")
    status: int = import_module(f"hvkvm.cli.{verb}").main(rest)
    return status


def guarded(work: Callable[[], int]) -> int:
    """Do `work` with three standard streams; its exit status, or that of its failure, which is one line."""
    try:
        hold_standard_fds()
        from hvkvm.cli.output import complain, drop_output
        from hvkvm.errors import HvkvmError

        _write_any_text()
        return work()
    except KeyboardInterrupt:  # first: it may come before there are the names of the others
        return 130
    except BrokenPipeError:
        drop_output()
        return 141
    except HvkvmError as error:
        complain(f"hvkvm: {error}")
        return error.exit_status


def _write_any_text() -> None:
    """Have standard output escape what its encoding lacks: a file's name may be no text, a locale ASCII."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")
