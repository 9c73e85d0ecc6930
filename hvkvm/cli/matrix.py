"""`hvkvm matrix`: runs a file's commands over its kernels, SynICs, vCPUs and disks, and prints one table.

The main thread parses, and turns the run until all has ended or a signal comes.
"""

from __future__ import annotations

import signal
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

from hvkvm import given_file
from hvkvm.cli.arguments import Parser, path_word
from hvkvm.cli.matrix_files import ResultFile
from hvkvm.cli.output import cannot_write, complain, show
from hvkvm.cli.signals import hang_up_is_ignored
from hvkvm.errors import CapabilityMissing, ConfigError, HostExhausted, HvkvmError, OutputError

if TYPE_CHECKING:
    from hvkvm.testing.matrix.cases import Case, Result

EPILOG = """FILE has three tables; docs/matrix.md says more:

  [machine]                  # keys of a --config file, of every guest
  memory = "256M"
  [axes]                     # every value with every other
  kernel = ["vmlinuz-6.1", "vmlinuz-6.12"]
  synic = ["kernel", "user"]
  cpus = [1, 2]
  [[command]]                # each in each of these guests
  run = ["uname", "-r"]
  seconds = 60

exit status:
  0 every case is ok, or skipped; 1 a case is not; 2 usage, or an error in FILE; 74 a
  result could not be written; 77 this host can run none of them;
  130 interrupted (129 by SIGHUP, 143 by SIGTERM)

examples:
  hvkvm matrix matrix.toml --list
  hvkvm matrix matrix.toml --junit matrix.xml
  hvkvm matrix matrix.toml --jobs 4 --json matrix.json
  hvkvm matrix matrix.toml --dask tcp://127.0.0.1:8786
"""
MAX_JOBS = 1024
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def parser() -> Parser:
    """The options."""
    p = Parser(
        "hvkvm matrix", "Run a file's commands over kernels, SynICs, vCPUs and disks: one table.", EPILOG
    )
    p.add_argument("file", metavar="FILE", type=path_word, help="the matrix, in TOML")
    p.add_argument("--jobs", metavar="N", help="guests side by side (as memory and processors bear)")
    p.add_argument("--list", action="store_true", help="print the cases, and run none")
    p.add_argument("--junit", metavar="FILE", type=path_word, help="write the results as JUnit's XML")
    p.add_argument("--json", metavar="FILE", type=path_word, help="write the results as JSON")
    p.add_argument("--quiet", action="store_true", help="say nothing of a case before the table")
    p.add_argument(
        "--dask", metavar="ADDRESS", help="run the cases on the workers of this Dask scheduler: hvkvm[dask]"
    )
    return p


def parse(arguments: list[str]) -> Any:
    """The checked options. ConfigError."""
    options = parser().parse_args(arguments)
    if options.jobs is not None:
        try:
            options.jobs = int(options.jobs)
        except ValueError:
            raise ConfigError(f"--jobs {options.jobs}: not a number; write --jobs 4") from None
        if not 1 <= options.jobs <= MAX_JOBS:
            raise ConfigError(f"--jobs {options.jobs}: not between 1 and {MAX_JOBS}; choose one of them")
        if options.dask:
            raise ConfigError("--jobs: Dask's workers say how many run on each; leave one of the two out")
    for flag, path in (("--junit", options.junit), ("--json", options.json)):
        if path is not None and (why := given_file.why_no_place(path)):
            raise ConfigError(f"{flag} {path}: no file can be there: {why}")
    return options


def _refuse_lost(cases: list[Case], options: Any) -> None:
    """Raise ConfigError where a result would take the place of what the matrix is made from."""
    from hvkvm.machine.own_files import read, refuse, written

    others = [("FILE", options.file)]
    for case in cases:
        others += [*read(case.config), *written(case.config)]
    for flag, path in (("--junit", options.junit), ("--json", options.json)):
        if path is not None:
            refuse(flag, path, others)
            others.append((flag, path))


def main(arguments: list[str]) -> int:
    """Run the verb; returns the exit status."""
    options = parse(arguments)
    from hvkvm.testing.matrix.file import read

    cases = read(options.file, alone=options.jobs == 1)
    if options.list:
        for case in cases:
            show(case.title)
        return 0
    if options.junit is not None or options.json is not None:
        _refuse_lost(cases, options)
    with ExitStack() as stack:
        return _Matrix(cases, options, _result_files(options, stack)).run()


def _result_files(options: Any, stack: ExitStack) -> dict[str, ResultFile]:
    """By their flags. ConfigError, before any case runs, for one that cannot be written."""
    found = {}
    for flag, path in (("--junit", options.junit), ("--json", options.json)):
        if path is not None:
            found[flag] = stack.enter_context(closing(ResultFile(flag, path)))
    return found


class _Matrix:
    """A run of all cases, and what is said of them."""

    def __init__(self, cases: list[Case], options: Any, files: dict[str, ResultFile]) -> None:
        self._cases = cases
        self._options = options
        self._files = files
        self._results: dict[int, Result] = {}
        self._signal = 0
        self._failed = False

    def run(self) -> int:
        """Run them; the exit status."""
        before = {
            number: signal.signal(number, self._noted)
            for number in ENDING_SIGNALS
            if not hang_up_is_ignored(number)
        }
        try:
            self._run_cases()
        except (HvkvmError, OSError) as error:
            what = _in_words(error)
            if not self._results:
                raise what from error
            complain(f"hvkvm: {what}")
            self._failed = True
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return self._conclude()

    def _noted(self, number: int, _frame: object) -> None:
        self._signal = self._signal or number

    def _run_cases(self) -> None:
        from hvkvm.testing.matrix.local import LocalRun

        if self._options.dask:
            from hvkvm.testing.matrix.remote import RemoteRun

            with RemoteRun(self._cases, self._told, self._options.dask, complain) as run:
                while not self._signal and run.turn():
                    pass
            return
        with LocalRun(self._cases, self._told, self._options.jobs) as local:
            while not self._signal and local.turn():
                pass

    def _told(self, case: Case, result: Result) -> None:
        from hvkvm.testing.matrix.cases import ENDED, OK, SKIPPED
        from hvkvm.testing.matrix.report import shown

        self._results[case.number] = result
        if self._options.quiet or result.verdict == ENDED:
            return
        if result.verdict in (OK, SKIPPED):
            why = f": {result.why}" if result.why else f", {result.seconds:.1f} s"
            text = f"{case.title}: {result.verdict}{why}"
        else:
            text = "\n".join(shown(case, result))
        complain(f"{len(self._results)}/{len(self._cases)} {text}")

    def _conclude(self) -> int:
        from hvkvm.testing.matrix import report
        from hvkvm.testing.matrix.cases import OK, SKIPPED

        status = self._write_files()  # first: the table's reader may be gone
        try:
            for line in report.table(self._results, self._cases):
                show(line)
        except OutputError as error:
            complain(f"hvkvm: {error}")
            status = OutputError.exit_status
        verdicts = {result.verdict for result in self._results.values()}
        if self._signal:
            return 128 + self._signal
        if verdicts - {OK, SKIPPED} or self._failed:
            return 1
        return status or (CapabilityMissing.exit_status if verdicts == {SKIPPED} else 0)

    def _write_files(self) -> int:
        """Write the results to files, but not over older ones where none is new; the status that gives."""
        from hvkvm.testing.matrix.cases import ENDED

        status = 0
        files = self._files
        if all(result.verdict == ENDED for result in self._results.values()):
            kept = [str(file.path) for file in files.values() if file.has_results]
            if kept:
                complain(f"hvkvm: no case came to its end; left as before: {', '.join(kept)}")
            files = {flag: file for flag, file in files.items() if not file.has_results}
        for flag, file in files.items():
            try:
                file.write(self._text(flag).encode("utf-8", "backslashreplace"))
            except OSError as error:
                complain(f"hvkvm: {cannot_write(str(file.path), error)}")
                status = OutputError.exit_status
        return status

    def _text(self, flag: str) -> str:
        from hvkvm.testing.matrix import report

        if flag == "--junit":
            return report.junit(self._results, self._cases, str(self._options.file))
        import json

        return json.dumps(report.as_json(self._results, self._cases), indent=1)


def _in_words(error: HvkvmError | OSError) -> HvkvmError:
    """Whatever ends a matrix before its cases have run, as one line."""
    from hvkvm.testing.matrix.local import lacking

    return error if isinstance(error, HvkvmError) else HostExhausted(f"it cannot go on: {lacking(error)}")
