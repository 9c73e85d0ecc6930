"""`hvkvm matrix` with guests of some lines of assembly: results, time limits, signals, and nothing left."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import stat
import subprocess
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running_vm import command_line

from hvkvm import given_file
from hvkvm.cli import guarded, matrix
from hvkvm.testing.matrix import local, process
from hvkvm.testing.micro_image import micro_image

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(300)]

Hvkvm = Callable[..., "subprocess.CompletedProcess[str]"]
SPIN = 'print "spinning\\n"\n1: jmp 1b\n'
MACHINE = '[machine]\nmemory = "16M"\nhv = "none"\nacpi = false\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three guests, and a folder of our own for what hvkvm makes meanwhile."""
    sources = {"good": 'print "hello\\n"\nexit 0\n', "bad": 'print "bad news\\n"\nexit 3\n', "spin": SPIN}
    for name, source in sources.items():
        (tmp_path / name).write_bytes(micro_image(source).read_bytes())
    (tmp_path / "made").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "made"))
    return tmp_path


def file(folder: Path, text: str) -> Path:
    path = folder / "m.toml"
    path.write_text(MACHINE + text)
    return path


def guests_of(folder: Path) -> list[int]:
    """The processes of cases, by the folder that their orders are in."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(folder).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], object], what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--junit", "m.toml"), ("--junit m.toml: FILE names the same file", "name another")),
        (("--json", "good"), ("--json good: --kernel names the same file",)),
        (("--json", "made/x", "--junit", "./made/x"), ("--json made/x: --junit names the same file",)),
    ],
)
def test_results_take_no_place_of_what_they_are_of(
    hvkvm: Hvkvm, folder: Path, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    path = file(folder, '[axes]\nkernel = ["good"]\n')
    before = {name: (folder / name).read_bytes() for name in ("m.toml", "good")}
    result = hvkvm("matrix", path.name, *flags, cwd=folder)
    assert result.returncode == 2, result
    assert all(word in result.stderr for word in words), result
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_one_table_for_all(hvkvm: Hvkvm, folder: Path) -> None:
    path = file(folder, '[axes]\nkernel = ["good", {name = "failing", kernel = "bad"}]\ncpus = [1, 2]\n')
    result = hvkvm("matrix", path, "--junit", folder / "j.xml", "--json", folder / "j.json", "--jobs", "2")
    assert result.returncode == 1, result.stderr
    rows = [line.split()[:4] for line in result.stdout.splitlines()]
    assert rows[0] == ["KERNEL", "CPUS", "COMMAND", "RESULT"]
    assert rows[1:5] == [
        ["good", "1", "boot", "ok"],
        ["good", "2", "boot", "ok"],
        ["failing", "1", "boot", "failed:"],
        ["failing", "2", "boot", "failed:"],
    ]
    assert result.stdout.splitlines()[-1] == "4 cases: 2 ok, 2 failed"
    assert "kernel=failing cpus=1 boot: failed: status 3\n  output:\n  | bad news\n" in result.stderr
    suite = ET.parse(folder / "j.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("4", "2", "0")
    cases = json.loads((folder / "j.json").read_text())["cases"]
    assert [case["status"] for case in cases] == [0, 0, 3, 3]
    assert cases[0]["output"] == "hello\n"
    assert list((folder / "made").iterdir()) == []


@pytest.mark.parametrize(("redirection", "status"), [(">/dev/full", 74), ("| true", 141)])
def test_the_files_are_written_whoever_takes_the_table(folder: Path, redirection: str, status: int) -> None:
    path = file(folder, 'kernel = "good"\n')
    words = command_line("matrix", path, "--quiet", "--junit", folder / "j.xml")
    line = f'"$@" {redirection}; exit ${{PIPESTATUS[0]}}'
    assert subprocess.run(["bash", "-c", line, "bash", *words], timeout=100, check=False).returncode == status
    assert ET.parse(folder / "j.xml").getroot().get("failures") == "0"


def test_what_cannot_be_written_is_told_before_the_first_case(hvkvm: Hvkvm, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    path = file(folder, 'kernel = "spin"\n')
    for where, said in (
        (folder / "pipe", "nobody reads this pipe; start its reader first"),
        ("/dev/full", "No space left on device; name a file that can be written"),
        ("/proc/version", "Input/output error; name a file that can be written"),
        ("/proc/j.xml", "No such file or directory; name a file that can be written"),
    ):
        result = hvkvm("matrix", path, "--json", folder / "j.json", "--junit", where)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.splitlines()[-1] == f"hvkvm: --junit {where}: {said}"
    assert not (folder / "j.json").exists()


def test_results_go_to_a_pipe_that_is_read(folder: Path) -> None:
    """By a reader that waits for them all the time, and ends with them."""
    os.mkfifo(folder / "pipe")
    path = file(folder, 'kernel = "good"\n')
    with subprocess.Popen(["cat", folder / "pipe"], stdout=subprocess.PIPE) as reader:
        words = command_line("matrix", path, "--quiet", "--json", folder / "pipe")
        with subprocess.Popen(words, stdout=subprocess.DEVNULL) as writer:
            out, _err = reader.communicate(timeout=120)
        assert writer.returncode == 0
    assert json.loads(out)["counts"] == {"ok": 1}


def test_older_results_are_replaced_by_new_ones_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not by what a full disk takes of them, and not by those of cases that did not begin."""
    kept, new = folder / "j.xml", folder / "j.json"
    path = file(folder, 'kernel = "good"\n')
    words = [str(path), "--jobs", "1", "--quiet", "--junit", str(kept), "--json", str(new)]
    kept.write_text("before")
    with monkeypatch.context() as patch:
        patch.setattr(local.LocalRun, "turn", lambda _run: os.kill(os.getpid(), signal.SIGTERM) or True)
        assert matrix.main(words) == 143
    assert capsys.readouterr().err == f"hvkvm: no case came to its end; left as before: {kept}\n"
    assert kept.read_text() == "before"
    assert json.loads(new.read_text())["counts"] == {"ended": 1}

    def full(fd: int, data: bytes, _seconds: float) -> None:
        os.write(fd, data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(given_file, "write_in_time", full)
        assert matrix.main(words) == 74
    assert f"hvkvm: cannot write to {kept}: No space left on device\n" in capsys.readouterr().err
    assert kept.read_text() == "before"
    assert sorted(folder.glob(".*")) == []


def test_a_file_of_results_keeps_its_mode_and_the_links_to_it(folder: Path) -> None:
    (folder / "made" / "j.xml").write_text("before")
    (folder / "made" / "j.xml").chmod(0o604)
    (folder / "link").symlink_to("made/j.xml")
    path = file(folder, 'kernel = "good"\n')
    assert matrix.main([str(path), "--jobs", "1", "--quiet", "--junit", str(folder / "link")]) == 0
    assert (folder / "link").is_symlink()
    assert stat.S_IMODE((folder / "made" / "j.xml").stat().st_mode) == 0o604
    assert ET.parse(folder / "link").getroot().get("tests") == "1"


def test_a_case_has_a_time_limit(hvkvm: Hvkvm, folder: Path) -> None:
    path = file(folder, 'kernel = "spin"\n[[command]]\nname = "boot"\nseconds = 1\n')
    result = hvkvm("matrix", path, "--junit", folder / "j.xml")
    assert result.returncode == 1, result.stderr
    assert "timeout: not finished after 1 s" in result.stdout
    assert "vcpu0: running guest" in result.stderr
    assert ET.parse(folder / "j.xml").getroot().get("errors") == "1"


def test_what_is_right_may_be_said(hvkvm: Hvkvm, folder: Path) -> None:
    path = file(folder, 'kernel = "bad"\n[[command]]\nname = "x"\nstatus = 3\nstdout = "bad n"\n')
    result = hvkvm("matrix", path, "--quiet")
    assert (result.returncode, result.stderr) == (0, "")
    path = file(folder, 'kernel = "good"\n[[command]]\nname = "x"\nstdout = "bad n"\n')
    result = hvkvm("matrix", path, "--quiet")
    assert result.returncode == 1
    assert "failed: 'bad n' is not in its output" in result.stdout


def test_errors_are_a_line_and_listing_runs_nothing(hvkvm: Hvkvm, folder: Path) -> None:
    path = file(folder, '[axes]\nkernel = ["good", "spin"]\n')
    result = hvkvm("matrix", path, "--list")
    assert (result.returncode, result.stdout, result.stderr) == (
        0,
        "kernel=good boot\nkernel=spin boot\n",
        "",
    )
    for words, said in (
        ((path, "--jobs", "0"), "--jobs 0: not between 1 and"),
        ((path, "--jobs", "x"), "--jobs x: not a number"),
        ((path, "--json", folder), "--json"),
        ((folder / "no.toml",), "no.toml: No such file or directory; give a readable"),
    ):
        result = hvkvm("matrix", *words)
        assert result.returncode == 2
        assert said in result.stderr
        assert result.stderr.count("\n") == 1


def test_a_host_that_can_run_none_says_so(hvkvm: Hvkvm, folder: Path) -> None:
    path = file(folder, 'kernel = "good"\nkvm_path = "/dev/no-kvm"\n')
    result = hvkvm("matrix", path)
    assert result.returncode == 77, result
    assert "skipped: " in result.stdout


def test_a_case_that_finds_no_file_left_waits_for_another_to_end(hvkvm: Hvkvm, folder: Path) -> None:
    """The process may have 14: two cases side by side, and no third."""

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (14, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    path = file(folder, 'kernel = "good"\n' + "".join(f'[[command]]\nname = "{n}"\n' for n in range(6)))
    result = hvkvm("matrix", path, "--jobs", "6", preexec_fn=few)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "6 cases: 6 ok"
    assert list((folder / "made").iterdir()) == []


@pytest.mark.parametrize(("refused", "lines"), [(1, "2 cases: 1 ok, 1 ended"), (0, "2 cases: 2 ended")])
def test_a_host_that_starts_no_more_has_what_there_is_told(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    refused: int,
    lines: str,
) -> None:
    made = 0

    def start(*arguments: Any) -> process.GuestProcess:
        nonlocal made
        made += 1
        if made > refused:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return process.GuestProcess(*arguments)

    monkeypatch.setattr(local, "GuestProcess", start)
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "made"))
    path = file(folder, '[axes]\nkernel = ["good", "bad"]\n')
    assert matrix.main([str(path), "--jobs", "1", "--quiet", "--junit", str(folder / "j.xml")]) == 1
    said = capsys.readouterr()
    [line] = said.err.splitlines()
    assert line.startswith(
        f"hvkvm: no guest can be started: {folder}/made: No space left on device; make room"
    )
    assert said.out.splitlines()[-1] == lines
    assert ET.parse(folder / "j.xml").getroot().get("errors") == str(2 - refused)
    assert list((folder / "made").iterdir()) == []


def test_what_fails_of_the_host_in_the_middle_is_a_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def turn(_run: local.LocalRun) -> bool:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(local.LocalRun, "turn", turn)
    assert matrix.main([str(file(folder, 'kernel = "good"\n'))]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("hvkvm: it cannot go on: Too many open files; ")
    assert said.err.count("\n") == 1
    assert said.out.splitlines()[-1] == "1 cases: 1 ended"


def test_a_host_without_a_folder_for_it_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "none"))
    path = file(folder, 'kernel = "good"\n')
    assert guarded(lambda: matrix.main([str(path)])) == 69
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("hvkvm: no guest can be started: [Errno 2] No such file or directory: ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_and_leaves_nothing(folder: Path, number: signal.Signals) -> None:
    path = file(folder, '[axes]\nkernel = ["good", "spin"]\ncpus = [1, 2]\n')
    command = command_line("matrix", path, "--jobs", "3")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        wait_for(lambda: len(guests_of(folder / "made")) >= 2, "two guests that run")
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, (out, err)
    assert "ended" in out.splitlines()[-1]
    assert guests_of(folder / "made") == []
    assert list((folder / "made").iterdir()) == []


def test_a_matrix_under_nohup_outlives_its_terminal(folder: Path) -> None:
    path = file(folder, 'kernel = "spin"\n')
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = subprocess.Popen(
            command_line("matrix", path), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    finally:
        signal.signal(signal.SIGHUP, before)
    with process:
        wait_for(lambda: guests_of(folder / "made"), "a guest that runs")
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 143, (out, err)


def test_guests_end_when_the_matrix_is_killed(folder: Path) -> None:
    path = file(folder, 'kernel = "spin"\n')
    with subprocess.Popen(command_line("matrix", path), stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: guests_of(folder / "made"), "a guest that runs")
        process.kill()
    wait_for(lambda: not guests_of(folder / "made"), "the guest's end")
