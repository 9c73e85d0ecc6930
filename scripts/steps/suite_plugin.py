"""The pytest plugin of one part of the suite: long tests first, failures at once, no silent wait.

Why: a part runs in several workers (pytest-xdist), some of them in nested labs, and
whoever reads along must see which test runs, which failed, and what a lab that stood
still was at. Loaded by `steps.suite` with `-p`, in the controller and in every worker.

In the controller everything but `_Ticker.run` is on the main thread.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import signal
import threading
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

PROGRESS_SECONDS = 60.0
STATUS_DEADLINE = 124
# Shorter tests than this stay in the order of their files, which shares what a module sets up once.
LONG_SECONDS = 2.0
# Where a lab's command says that it has nothing to do; and the process that is the lab's command.
RESTING = Path("/run/lab/resting")
COMMAND_PID = Path("/run/lab/pid")
# The stream that is not captured: what a worker that stands still is asked for must be seen at once.
_STDERR = os.dup(2)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("suite", "one part of the suite")
    group.addoption("--part", default="tests", metavar="NAME", help="what progress lines call it")
    group.addoption("--part-deadline", type=float, default=0.0, metavar="S", help="0: none")
    group.addoption("--part-durations", metavar="FILE", help="where each test's seconds are kept")
    group.addoption("--part-list", metavar="FILE", help="write the collected tests there, by name")
    group.addoption("--part-again", action="store_true", help="run a test again whose worker died, once")


def pytest_collection_finish(session: pytest.Session) -> None:
    file = session.config.getoption("--part-list")
    if file:
        Path(file).write_text("".join(f"{item.nodeid}\n" for item in session.items))


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Worker(config.workerinput.get("durations", {})), "suite-worker")
        _tell_when_asked()
    elif config.getoption("dist", "no") != "no":
        config.pluginmanager.register(Controller(config), "suite-controller")


# --- a worker -------------------------------------------------------------------------------------


def expected(item: pytest.Item, known: dict[str, float], files: dict[str, float]) -> float:
    """Seconds that a test is likely to take: as last time, as its file's others, or by its time limit."""
    if item.nodeid in known:
        return known[item.nodeid]
    file = item.nodeid.partition("::")[0]
    if file in files:
        return files[file]
    limit = item.get_closest_marker("timeout")
    return float(limit.args[0]) / 20 if limit and limit.args else 0.0


def by_file(known: dict[str, float]) -> dict[str, float]:
    """The mean seconds of each file's tests."""
    found: dict[str, list[float]] = {}
    for test, seconds in known.items():
        found.setdefault(test.partition("::")[0], []).append(seconds)
    return {file: sum(each) / len(each) for file, each in found.items()}


class Worker:
    """Puts long tests first: a long one at the end of the list that all draw from leaves the others idle.

    Every worker must come to the same order, so the durations are the controller's.

    In a lab it says when no test runs: it then waits for the other workers, and nobody must take it for one
    that hangs. pytest-xdist keeps a worker's last test back until the others are done, too.
    """

    def __init__(self, known: dict[str, float]) -> None:
        self.known = known
        try:
            self.in_lab = COMMAND_PID.read_text().strip() == str(os.getpid())
        except OSError:
            self.in_lab = False

    def pytest_collection_finish(self) -> None:
        self._rest()

    def pytest_runtest_logstart(self) -> None:
        if self.in_lab:
            RESTING.unlink(missing_ok=True)

    def pytest_runtest_logfinish(self) -> None:
        self._rest()

    def _rest(self) -> None:
        if self.in_lab:
            RESTING.touch()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        files = by_file(self.known)
        seconds = {item.nodeid: expected(item, self.known, files) for item in items}
        items.sort(key=lambda item: -seconds[item.nodeid] if seconds[item.nodeid] >= LONG_SECONDS else 0.0)


def _tell_when_asked() -> None:
    """SIGUSR2: say where every thread is, and what every machine of ours waits for."""

    def describe_machines(*_: object) -> None:
        from hvkvm.machine.dump import describe
        from hvkvm.machine.lifecycle import Phase
        from hvkvm.machine.parts import Parts

        for thing in gc.get_objects():
            if isinstance(thing, Parts) and thing.lifecycle.phase is not Phase.ENDED:
                try:
                    text = describe(thing)
                except Exception as error:  # it would end in whatever test runs
                    text = f"{thing.name} cannot be described: {error!r}"
                os.write(_STDERR, f"{text}\n".encode())

    signal.signal(signal.SIGUSR2, describe_machines)
    # Written without the interpreter's help, so that a main thread that is stuck shows too.
    faulthandler.register(signal.SIGUSR2, file=_STDERR, all_threads=True, chain=True)


# --- the controller -------------------------------------------------------------------------------


class Controller:
    """Prints whole lines only, so that what labs say between them stays readable."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.name: str = config.getoption("--part")
        self.rerun: bool = config.getoption("--part-again")
        self.deadline: float = config.getoption("--part-deadline")
        file = config.getoption("--part-durations")
        self.file = Path(file) if file else None
        self.known = _read(self.file)
        self.taken: dict[str, float] = {}
        self.running: dict[str, float] = {}
        self.failed: list[str] = []
        self.again: list[str] = []
        self.done = self.total = 0
        self.started = monotonic()
        from xdist.workermanage import NodeManager  # type: ignore[import-untyped]

        # A worker in a lab takes longer to leave, and one that is killed leaves its lab's folder behind.
        NodeManager.EXIT_TIMEOUT = 60

    @property
    def terminal(self) -> pytest.TerminalReporter:
        """Where pytest prints."""
        found: pytest.TerminalReporter = self.config.pluginmanager.getplugin("terminalreporter")
        return found

    def progress(self) -> str:
        """One line: how far it is, what failed, what runs and for how long."""
        now = monotonic()
        runs = [f"{test} ({now - since:.0f} s)" for test, since in list(self.running.items())]
        state = f"{self.done} of {self.total or '?'} tests in {now - self.started:.0f} s"
        return f"-- {self.name}: {state}, {len(self.failed)} failed; running: {', '.join(runs) or 'none'}"

    # --- pytest's and xdist's hooks ---

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self) -> Any:
        ticker = _Ticker(self)
        ticker.start()
        try:
            return (yield)
        finally:
            ticker.stop()

    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["durations"] = self.known

    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.total = len(ids)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running[nodeid] = monotonic()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.running.pop(nodeid, None)
        self.done += 1

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.taken[report.nodeid] = self.taken.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed.append(report.nodeid)
            self._show(report, f"FAILED {report.nodeid} ({report.when}, {report.duration:.1f} s)")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._show(report, f"ERROR collecting {report.nodeid}")

    def _show(self, report: pytest.TestReport | pytest.CollectReport, headline: str) -> None:
        out = self.terminal
        out.write_sep("_", headline)
        report.toterminal(out._tw)
        for title, text in report.sections:
            out.write_sep("-", title)
            out.write_line(text.rstrip())
        out.flush()

    def pytest_handlecrashitem(self, crashitem: str, report: pytest.TestReport, sched: Any) -> None:
        """The worker died in this test: a lab's own fault once, the test's the second time."""
        since = self.running.pop(crashitem, None)
        at = f" after {monotonic() - since:.0f} s" if since is not None else ""
        if not self.rerun or crashitem in self.again:
            return
        self.again.append(crashitem)
        report.outcome = "again"  # type: ignore[assignment]
        self.taken.pop(crashitem, None)
        sched.mark_test_pending(crashitem)
        self.terminal.write_line(
            f"-- {self.name}: the lab ended in {crashitem}{at}; this test is run again, once"
        )

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport | pytest.CollectReport) -> Any:
        # No letters: half a line of them would stand before what labs print.
        if report.outcome == "again":  # type: ignore[comparison-overlap]
            return "run again", "", ("AGAIN", {"yellow": True})
        if isinstance(report, pytest.TestReport) and report.passed and report.when == "call":
            return ("xpassed", "", "XPASS") if hasattr(report, "wasxfail") else ("passed", "", "PASSED")
        if report.skipped and not hasattr(report, "wasxfail"):
            return "skipped", "", "SKIPPED"
        if isinstance(report, pytest.TestReport) and report.failed:
            around = report.when in ("setup", "teardown")  # a worker that died has none of the three
            return ("error", "", "ERROR") if around else ("failed", "", "FAILED")
        return None

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(self) -> Any:
        self.config.option.tbstyle = "no"  # each was shown when it happened
        return (yield)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        if self.file is not None and self.taken:
            from hvkvm.boot import cache

            rounded = {test: round(seconds, 2) for test, seconds in (self.known | self.taken).items()}
            cache.publish(self.file, [json.dumps(rounded).encode()])


def _read(file: Path | None) -> dict[str, float]:
    try:
        found = json.loads(file.read_text()) if file else {}
        return {str(test): float(seconds) for test, seconds in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


class _Ticker(threading.Thread):
    """Prints progress while nothing else may happen, and ends a part that passes its deadline."""

    def __init__(self, controller: Controller) -> None:
        super().__init__(name="suite-progress", daemon=True)
        self.controller = controller
        self.ended = threading.Event()

    def run(self) -> None:
        controller = self.controller
        end = controller.started + controller.deadline if controller.deadline else None
        due = monotonic() + PROGRESS_SECONDS
        while not self.ended.wait(0.5):
            now = monotonic()
            if now >= due:
                due = now + PROGRESS_SECONDS
                print(controller.progress(), flush=True)
            if end is not None and now >= end:
                print(
                    f"-- {controller.name}: the deadline of {controller.deadline:g} s has passed", flush=True
                )
                print(controller.progress(), flush=True)
                print(f"-- failed before: {', '.join(controller.failed) or 'none'}", flush=True)
                os.kill(os.getpid(), signal.SIGALRM)
                return

    def start(self) -> None:
        signal.signal(signal.SIGALRM, self._end)
        super().start()

    def stop(self) -> None:
        self.ended.set()
        self.join()

    def _end(self, *_: object) -> None:
        pytest.exit(f"the deadline of {self.controller.deadline:g} s has passed", returncode=STATUS_DEADLINE)
