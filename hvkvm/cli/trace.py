"""`hvkvm trace`: every KVM ioctl of another program, decoded, a line or a JSON object each.

The trace goes to standard error, as strace's does, so that the traced command
keeps its standard output; --output names a file instead.
"""

from __future__ import annotations

import os
import sys
from contextlib import closing, nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING

from hvkvm.cli.arguments import Parser, split_command
from hvkvm.cli.output import cannot_write, complain
from hvkvm.errors import ConfigError, OutputError
from hvkvm.given_file import OutputFile, open_to_write

if TYPE_CHECKING:
    from hvkvm.observe.ioctl_trace import Call

EPILOG = """\
examples:
  hvkvm trace -- hvkvm run --kernel vmlinuz -- true
  hvkvm trace --summary -- qemu-system-x86_64 -accel kvm ...
  hvkvm trace --filter KVM_IRQFD,KVM_SET_GSI_ROUTING --pid 4711

Children of the command are followed too. Exit status: the command's own; 0 when an
attached process ends; 130 after Ctrl-C, which leaves an attached process running; 2
usage; 74 instead of 0 when the trace could not be written, which does not end the
command; 77 python-ptrace missing or tracing not permitted. A traced vCPU is slower, and
attaching and detaching make a running KVM_RUN return EINTR once."""


class Report:
    """Prints calls and counts them. Called on the main thread, between two stops of the tracee."""

    def __init__(
        self,
        out: IO[str],
        name: str,
        *,
        json: bool = False,
        lines: bool = True,
        runs: bool = False,
        time: bool = False,
    ) -> None:
        self._out = out
        self._name = name
        self.lost = 0
        """Lines that could not be written."""
        self._lines = lines
        self._runs = runs
        self._time = time
        self._dumps = None
        if json:
            from json import dumps

            self._dumps = dumps
        self.counts: dict[str, list[float]] = {}  # request: calls, errors, seconds

    def call(self, call: Call) -> None:
        """One ioctl has returned."""
        count = self.counts.setdefault(call.request, [0, 0, 0.0])
        count[0] += 1
        count[1] += bool(call.error)
        count[2] += call.seconds
        if not self._lines or (call.request == "KVM_RUN" and not self._runs):
            return
        self._say(self._line(call) if self._dumps is None else self._dumps(record(call)))

    def _say(self, line: str) -> None:
        """Write a line. A full disk must not end what is traced: the next line may find room."""
        try:
            print(line, file=self._out)
        except BrokenPipeError:
            raise
        except OSError as error:
            if not self.lost:
                complain(f"hvkvm: {cannot_write(self._name, error)}; the command goes on, lines are lost")
            self.lost += 1

    def _line(self, call: Call) -> str:
        from hvkvm.observe.kvm_ioctls import text

        result = str(call.result)
        if call.error:
            result = f"{call.error} ({os.strerror(-call.result)})"
        took = f" <{call.seconds * 1e6:.0f} us>" if self._time else ""
        where = f"{call.tid} {call.thread:15} {call.scope}[{call.fd}]"
        return f"{where} {call.request}({text(call.fields)}) = {result}{took}"

    def end(self) -> None:
        """The trace is over: the counts, or how many KVM_RUN were left out."""
        if self._lines:
            hidden = (
                {"KVM_RUN": self.counts["KVM_RUN"]} if "KVM_RUN" in self.counts and not self._runs else {}
            )
        else:
            hidden = self.counts
        rows = sorted(hidden.items(), key=lambda row: (-row[1][0], row[0]))
        if self._dumps is not None:
            for name, (calls, errors, seconds) in rows:
                row = {
                    "request": name,
                    "calls": int(calls),
                    "errors": int(errors),
                    "us": round(seconds * 1e6),
                }
                self._say(self._dumps(row))
        elif self._lines:
            for name, (calls, errors, _seconds) in rows:
                self._say(f"{name}: {int(calls)} calls, {int(errors)} errors; --runs shows each")
        else:
            self._say("   calls  errors   seconds  request")
            for name, (calls, errors, seconds) in rows:
                self._say(f"{int(calls):8} {int(errors):7} {seconds:9.4f}  {name}")


def record(call: Call) -> dict[str, object]:
    """A call as --json prints it: numbers are numbers, `us` is microseconds."""
    return {
        "pid": call.pid,
        "tid": call.tid,
        "thread": call.thread,
        "scope": call.scope.kind,
        "vcpu": call.scope.number,
        "fd": call.fd,
        "request": call.request,
        "fields": call.fields,
        "result": call.result,
        "error": call.error or None,
        "us": round(call.seconds * 1e6, 1),
    }


def wanted_requests(given: str) -> frozenset[str]:
    """The request names in --filter; ConfigError for one that does not exist."""
    from hvkvm.observe.kvm_names import REQUEST_NAMES

    known = set(REQUEST_NAMES.values())
    names = set()
    for word in filter(None, (word.strip().upper() for word in given.split(","))):
        name = word if word.startswith("KVM_") else f"KVM_{word}"
        if name not in known:
            from difflib import get_close_matches

            near = get_close_matches(name, known, 1) or ["a name from <linux/kvm.h>, KVM_IRQFD say"]
            raise ConfigError(f"--filter {word}: no such request; did you mean {near[0]}?")
        names.add(name)
    if not names:
        raise ConfigError("--filter: names no request; give KVM_IRQFD, say")
    return frozenset(names)


def parser() -> Parser:
    """The options."""
    p = Parser("hvkvm trace", "Show every KVM ioctl that another program makes, decoded.", EPILOG)
    p.usage = "hvkvm trace [options] -- COMMAND...\n       hvkvm trace [options] --pid N"
    p.add_argument("--pid", metavar="N", help="attach to this running process")
    p.add_argument("--filter", metavar="NAME[,NAME]", help="only these requests")
    p.add_argument("--runs", action="store_true", help="show each KVM_RUN with its exit (else: counted)")
    p.add_argument("--time", action="store_true", help="show how long each call took")
    p.add_argument("--summary", action="store_true", help="only count: calls, errors, time by request")
    p.add_argument("--json", action="store_true", help="one JSON object a line")
    p.add_argument("--output", metavar="FILE", help="write the trace there, not to standard error")
    return p


def main(arguments: list[str]) -> int:
    """Run the verb; returns the exit status."""
    ours, command = split_command(arguments)
    options = parser().parse_args(ours)
    if options.pid is not None and "--" in arguments:
        raise ConfigError("--pid and a command: one or the other; leave one out")
    if options.pid is None and not command:
        raise ConfigError("no command to trace; put it behind --, or attach with --pid N")
    pid = 0
    if options.pid is not None:
        if not (options.pid.isascii() and options.pid.isdecimal()) or len(options.pid) > 9:
            raise ConfigError(f"--pid {options.pid}: not a process number; look it up with ps")
        pid = int(options.pid)
    wanted = wanted_requests(options.filter) if options.filter is not None else None
    runs = options.runs or (wanted is not None and "KVM_RUN" in wanted)
    from hvkvm.observe.ioctl_trace import Tracer

    file = None if options.output is None else open_to_write(Path(options.output), "--output ")
    with closing(file) if file is not None else nullcontext():
        out = _stream(file)
        name = "standard error" if file is None else f"--output {options.output}"
        lines = not options.summary
        report = Report(out, name, json=options.json, lines=lines, runs=runs, time=options.time)
        tracer = Tracer(report.call, runs=runs and lines, wanted=wanted)
        if command:
            tracer.spawn(command)
        else:
            tracer.attach(pid)
        if file is not None:
            file.begin()  # not before: a command that is not there takes no trace from anybody
        status = tracer.follow()
        report.end()
        if report.lost:
            complain(f"hvkvm: {report.lost} lines of the trace are lost")
        return OutputError.exit_status if status == 0 and report.lost else status


def _stream(file: OutputFile | None) -> IO[str]:
    """Where the trace goes. Unbuffered: what could not be written is lost there and then."""
    if file is None and sys.stderr is not None:
        return sys.stderr
    from io import FileIO, TextIOWrapper

    # Closed by the caller; print would fall back to standard output.
    raw = FileIO(os.devnull, "w") if file is None else FileIO(file.fd, "w", closefd=False)
    if file is not None:
        os.set_blocking(file.fd, True)
    return TextIOWrapper(raw, "utf-8", "backslashreplace", write_through=True)
