"""The suite's runner: what runs where, and its plugin at work on a small suite of its own."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from steps import suite, suite_plugin

PROJECT = Path(__file__).resolve().parents[2]
GIB = 1 << 30


# --- what runs where ------------------------------------------------------------------------------


def test_the_third_tier_goes_to_labs_where_kvm_has_no_hyperv() -> None:
    assert [(part.place, part.tiers) for part in suite.parts(True, False)] == [
        ("here", ("kvm",)),
        ("lab", ("hyperv",)),
        ("lab", ("hyperv",)),
    ]


def test_firmware_gets_labs_of_a_newer_kernel_and_no_other_part_its_tests() -> None:
    for usable in (True, False):
        *others, firmware = suite.parts(usable, False)
        assert firmware.marks == "firmware"
        assert "--kernel" in shlex.split(
            next(word for word in suite.command(firmware, 1, []) if "//python=" in word)
        )
        for part in others:
            assert (
                part.marks == "not hyperv" or "not firmware" in part.marks or part.marks.startswith("not kvm")
            )


def test_with_hyperv_everything_runs_here() -> None:
    assert {part.place for part in suite.parts(True, True)} == {"here"}


def test_without_kvm_the_second_tier_goes_to_the_lab_too() -> None:
    first, second, _firmware = suite.parts(False, False)
    assert (first.place, first.tiers) == ("here", ())
    assert (second.place, second.tiers) == ("lab", ("kvm", "hyperv"))


@pytest.mark.parametrize(
    ("place", "processors", "memory", "count"),
    [
        ("lab", 1, 64 * GIB, 1),
        ("lab", 2, 64 * GIB, 2),
        ("lab", 4, 7 * GIB, 2),
        ("lab", 4, 1 * GIB, 1),
        ("lab", 64, 640 * GIB, 8),
        ("here", 2, 1 * GIB, 3),
    ],
)
def test_workers_follow_processors_and_labs_memory_too(
    place: str, processors: int, memory: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HVKVM_TEST_WORKERS", raising=False)
    assert suite.workers(place, processors, memory) == count


def test_workers_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVKVM_TEST_WORKERS", "3")
    assert suite.workers("lab", 1, 0) == 3


@pytest.mark.parametrize("options", [[], ["-v"], ["-q", "-vv"]])
def test_tests_are_counted_however_much_is_printed(options: list[str]) -> None:
    status, names, _ = suite.collected("not kvm", [*options, "tests/scripts/test_lab_processor.py"])
    assert status == 0
    assert "tests/scripts/test_lab_processor.py::test_every_thread_counts" in names
    assert suite.collected("hyperv", ["tests/scripts/test_lab_processor.py"])[:2] == (suite.NO_TESTS, [])


def test_tests_are_named_from_the_project_wherever_the_temporary_folder_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a clone below /tmp: pytest would name them from there, and a lab would find none of them."""
    if not os.access(PROJECT.parent, os.W_OK):
        pytest.skip(f"nothing can be put into {PROJECT.parent}")
    monkeypatch.setattr(tempfile, "tempdir", str(PROJECT.parent))
    _status, names, text = suite.collected("hyperv", [f"--ignore-glob={PROJECT}/tests/[!h]*"])
    assert names, text
    assert all(name.startswith("tests/hyperv") for name in names), names


def test_byte_code_is_kept_whatever_the_caller_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert "PYTHONDONTWRITEBYTECODE" not in suite.environment()
    assert "PYTHONPATH" in suite.environment()


def test_a_debugger_has_the_terminal_for_itself() -> None:
    for part in suite.parts(True, False):
        assert "--dist" in suite.command(part, 2, [])
        assert "--dist" not in suite.command(part, 2, ["--pdb"])


@pytest.mark.parametrize(
    ("statuses", "arguments", "status", "last"),
    [
        ((0, 0), [], 0, "== passed: one, two"),
        ((0, 1), [], 1, "== FAILED: two"),
        ((5, 0), ["-k", "x"], 0, "== passed: two"),
        ((5, 5), ["-k", "x"], 1, "== FAILED: one, two"),
        ((0, 5), [], 1, "== FAILED: two"),
        ((124, 0), [], 1, "== FAILED: one"),
    ],
    ids=["all", "a failure", "none chosen in one", "none chosen at all", "an empty tier", "a deadline"],
)
def test_the_last_line_and_the_status_say_how_it_went(
    statuses: tuple[int, int],
    arguments: list[str],
    status: int,
    last: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pair = [suite.Part(name, name, (), "here") for name in ("one", "two")]
    left = list(statuses)
    monkeypatch.delenv("HVKVM_TEST_PART", raising=False)
    monkeypatch.setattr(suite, "parts", lambda usable, hyperv: pair)
    monkeypatch.setattr(suite, "run", lambda part, arguments, ahead: left.pop(0))
    assert suite.main(arguments) == status
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_one_part_is_chosen_by_the_beginning_of_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HVKVM_TEST_PART", "firm")
    monkeypatch.setattr(suite, "run", lambda part, arguments, ahead: 0)
    assert suite.main([]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "== passed: firmware (UEFI guests)"


def test_firmware_runs_beside_the_first_part_and_counts(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HVKVM_TEST_PART", raising=False)
    monkeypatch.delenv("HVKVM_TEST_WORKERS", raising=False)
    # The process beside fails at its start: no such part there.
    found = [suite.Part("one", "one", (), "here"), suite.Part("no such", "no such", (), "lab")]
    monkeypatch.setattr(suite, "parts", lambda usable, hyperv: list(found))
    monkeypatch.setattr(suite, "run", lambda part, arguments, ahead: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert suite.main([]) == 1
    out = capfd.readouterr().out
    assert "no such| == FAILED: " in out
    assert out.splitlines()[-2:] == ["== passed: one", "== FAILED: no such"]


@pytest.mark.parametrize(
    ("arguments", "variable", "processors", "place"),
    [
        (["-k", "x"], "", 2, "lab"),
        ([], "HVKVM_TEST_WORKERS", 2, "lab"),
        ([], "", 1, "lab"),
        ([], "", 2, "here"),
    ],
)
def test_parts_run_one_after_the_other(
    arguments: list[str], variable: str, processors: int, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HVKVM_TEST_PART", "HVKVM_TEST_WORKERS"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "1")
    found = [suite.Part("one", "one", (), "here"), suite.Part("two", "two", (), place)]
    assert suite.beside(found, arguments, processors) is None
    assert len(found) == 2


# --- the plugin -----------------------------------------------------------------------------------

Session = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def session(tmp_path: Path) -> Session:
    """`session(tests, *options, workers=2)`: a pytest session of its own over the module text `tests`."""

    def run(tests: str, *options: str, workers: int = 2) -> subprocess.CompletedProcess[str]:
        (tmp_path / "test_it.py").write_text(f"import os, pathlib, time\n{tests}")
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTEST_", "HVKVM_REQUIRE", "PY_COLORS", "FORCE_COLOR"))
        }
        environment["PYTHONPATH"] = str(PROJECT / "scripts")
        line = [
            sys.executable,
            "-m",
            "pytest",
            "-c",
            "/dev/null",
            "--rootdir",
            ".",
            "-p",
            "steps.suite_plugin",
        ]
        line += ["-p", "no:cacheprovider", "-p", "no:hypothesispytest", "--part", "small", *options]
        line += [
            "--tx",
            f"{workers}*popen//python={sys.executable}",
            "--dist",
            "load",
            "--maxschedchunk",
            "1",
        ]
        told = tmp_path / "told"  # where a test may look for what was shown by then
        with told.open("w") as out:
            done = subprocess.run(
                [*line, "test_it.py"],
                cwd=tmp_path, env=environment, stdout=out, stderr=subprocess.PIPE, text=True, check=False,
            )  # fmt: skip
        done.stdout = told.read_text()
        return done

    return run


def test_failure_is_shown_whole_when_it_happens(session: Session) -> None:
    """Before the test that is still running ends."""
    done = session(
        "def test_waits():\n"
        "    end = time.monotonic() + 60\n"
        "    while 'FAILED test_it.py::test_fails (call' not in pathlib.Path('told').read_text():\n"
        "        assert time.monotonic() < end; time.sleep(0.01)\n"
        "    print('end of the other'); assert False\n"
        "def test_fails():\n"
        "    print('captured words'); assert 1 == 2\n"
    )
    assert done.returncode == 1
    text = done.stdout
    assert text.index("FAILED test_it.py::test_fails (call") < text.index(
        "FAILED test_it.py::test_waits (call"
    )
    assert "assert 1 == 2" in text
    assert text.count("captured words") == 2  # once in the source of the test, once as its output
    assert "2 failed in" in text.splitlines()[-1]


def test_long_tests_come_first_and_short_ones_in_their_order(session: Session, tmp_path: Path) -> None:
    tests = "".join(
        f"def test_{n}():\n    with open('order', 'a') as out: print({n}, file=out)\n" for n in range(5)
    )
    kept = tmp_path / "cache/kept.json"
    kept.parent.mkdir()
    kept.write_text(
        json.dumps({"test_it.py::test_3": 9.0, "test_it.py::test_1": 4.0, "test_it.py::test_0": 0.5})
    )
    # The two that are not known count as long as the mean of their file's others: 4.5.
    done = session(tests, "--part-durations", str(kept), workers=1)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "order").read_text().split() == ["3", "2", "4", "1", "0"]
    assert set(json.loads(kept.read_text())) == {f"test_it.py::test_{n}" for n in range(5)}


DIES_ONCE = (
    "def test_dies():\n"
    "    mark = pathlib.Path('mark')\n"
    "    if not mark.exists():\n"
    "        mark.touch(); os._exit(9)\n"
)
OTHERS = "".join(f"def test_other_{n}():\n    pass\n" for n in range(6))


def test_only_the_test_in_which_a_lab_ended_is_run_again_and_it_is_said(session: Session) -> None:
    done = session(DIES_ONCE + OTHERS, "--part-again")
    assert done.returncode == 0, done.stdout
    assert "the lab ended in test_it.py::test_dies" in done.stdout
    assert "run again, once" in done.stdout
    assert "7 passed, 1 run again in" in done.stdout


@pytest.mark.parametrize("workers", [1, 2])
def test_the_last_test_of_all_is_run_again_too(session: Session, workers: int) -> None:
    done = session(DIES_ONCE, "--part-again", workers=workers)
    assert done.returncode == 0, done.stdout
    assert "1 passed, 1 run again in" in done.stdout


def test_the_second_time_it_is_the_test_that_fails(session: Session) -> None:
    done = session("def test_dies():\n    os._exit(9)\n" + OTHERS, "--part-again")
    assert done.returncode == 1
    assert "FAILED test_it.py::test_dies" in done.stdout
    assert "1 failed, 6 passed, 1 run again in" in done.stdout


def test_outside_of_labs_a_worker_that_dies_is_a_failure_at_once(session: Session) -> None:
    done = session(DIES_ONCE + OTHERS)
    assert done.returncode == 1
    assert "1 failed, 6 passed in" in done.stdout


@pytest.mark.timeout(900)
def test_a_deadline_names_what_runs_and_what_failed_before(session: Session) -> None:
    tests = "def test_fails():\n    assert 0\ndef test_stands():\n    time.sleep(1000)\n"
    for seconds in (8, 32, 128, 512):  # it counts from before the workers start, which takes a busy host long
        done = session(tests, "--part-deadline", str(seconds))
        assert done.returncode == 124, done.stdout
        assert f"small: the deadline of {seconds} s has passed" in done.stdout
        if "1 failed; running: test_it.py::test_stands (" in done.stdout:
            break
    assert "running: test_it.py::test_stands (" in done.stdout
    assert "failed before: test_it.py::test_fails" in done.stdout


@pytest.mark.kvm
def test_tiers_are_counted_over_all_workers(session: Session) -> None:
    done = session("import pytest\n@pytest.mark.kvm\ndef test_any():\n    pass\n" + OTHERS)
    assert "hvkvm tiers: anywhere 6 ran 0 skipped, kvm 1 ran 0 skipped" in done.stdout


def test_a_worker_that_is_asked_tells_what_it_waits_for_and_goes_on(session: Session) -> None:
    """As `scripts/lab` asks in a lab that stands still."""
    done = session("def test_waits():\n    import signal\n    os.kill(os.getpid(), signal.SIGUSR2)\n")
    assert done.returncode == 0, done.stdout
    assert 'test_it.py", line 4 in test_waits' in done.stderr


def test_a_worker_in_a_lab_says_when_it_has_nothing_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid, resting = tmp_path / "pid", tmp_path / "resting"
    monkeypatch.setattr(suite_plugin, "COMMAND_PID", pid)
    monkeypatch.setattr(suite_plugin, "RESTING", resting)
    suite_plugin.Worker({}).pytest_collection_finish()
    assert not resting.exists()  # in no lab
    pid.write_text(f"{os.getpid()}\n")
    worker = suite_plugin.Worker({})
    worker.pytest_collection_finish()
    assert resting.exists()
    worker.pytest_runtest_logstart()
    assert not resting.exists()
    worker.pytest_runtest_logfinish()
    assert resting.exists()


SESSION = """
import sys, time
from pathlib import Path
try:
    print("runs", flush=True)
    time.sleep(1000)
except KeyboardInterrupt:
    Path(sys.argv[1]).write_text("tidied up")
"""
ATTENDED = """
import signal, sys
from steps import suite
signal.signal(signal.SIGTERM, suite._terminate)
try:
    suite.attend([sys.executable, *sys.argv[1:]], suite.environment())
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_sigterm_ends_the_session_too(tmp_path: Path) -> None:
    """It went on, in its labs, as long as the tests took."""
    words = [sys.executable, "-c", ATTENDED, "-c", SESSION, str(tmp_path / "done")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=suite.environment()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"runs\n"
        process.terminate()
        assert process.stdout.read() == b"", "whoever holds its output has ended"
    assert (process.returncode, (tmp_path / "done").read_text()) == (130, "tidied up")
