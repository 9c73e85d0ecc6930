"""`hvkvm trace` on real processes: lines, threads, statuses, attaching and letting go."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("ptrace", reason="python-ptrace is not installed: pip install 'hvkvm[trace]'")

VMM = [sys.executable, str(Path(__file__).with_name("traced_vmm.py"))]
TRACE = [sys.executable, "-m", "hvkvm", "trace"]
# What traced_vmm.py asks for; @ stands for a number that differs.
LINES = (
    "system[@] KVM_GET_API_VERSION() = 12",
    "system[@] KVM_CHECK_EXTENSION(cap=KVM_CAP_IRQFD) = 1",
    "KVM_SET_GSI_ROUTING(nr=41, irqchip=40, entries=[{gsi=24, type=MSI, address=0xfee00000, data=0x4021}]) =",
    "vm[@] KVM_SET_GSI_ROUTING(nr=1, irqchip=0, entries=[{gsi=30, type=HV_SINT, vcpu=0, sint=2}]) = ",
    "vm[@] KVM_IRQFD(fd=@, gsi=24, flags=RESAMPLE, resamplefd=@) = 0",
    "vm[@] KVM_IRQFD(fd=@, gsi=24, flags=DEASSIGN) = 0",
    "vm[@] KVM_IOEVENTFD(addr=0x510, len=2, fd=@, flags=DATAMATCH|PIO, datamatch=0x3) = 0",
    "vm[@] KVM_HYPERV_EVENTFD(conn_id=0x5, fd=0, flags=0) = E",
    "vcpu3[@] KVM_ENABLE_CAP(cap=KVM_CAP_HYPERV_SYNIC2) = ",
    "KVM_SET_MSRS(nmsrs=2, msrs=[{HV_X64_MSR_GUEST_OS_ID=0x1234}, {HV_X64_MSR_STIMER0_CONFIG=0x0}]) = ",
    "vm[@] KVM_SET_USER_MEMORY_REGION(slot=0, flags=0, gpa=0x0, size=0x10000, hva=0x@) = 0",
    "vcpu0[@] KVM_RUN(exit=KVM_EXIT_IO, is_write=1, port=0x80, size=1, count=1, data=2a) = 0",
    "vcpu0[@] KVM_RUN(exit=KVM_EXIT_HLT) = 0",
)


def trace(*arguments: str, **how) -> subprocess.CompletedProcess[str]:
    how.setdefault("timeout", 100)
    return subprocess.run(
        [*TRACE, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, **how
    )


@pytest.fixture(scope="module", autouse=True)
def _ptrace_is_allowed():
    """yama, seccomp and containers can forbid it."""
    tried = trace("--", "true")
    if tried.returncode == 77:
        pytest.skip(f"ptrace is forbidden here: {tried.stderr.strip()}")


@contextmanager
def running_vmm(pause: str = "0.005") -> Iterator[subprocess.Popen[str]]:
    """The test VMM in its loop; ended by the end of its input."""
    vmm = subprocess.Popen([*VMM, "loop", pause], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert vmm.stdout.readline() == "up\n"
        yield vmm
    finally:
        vmm.stdin.close()
        try:
            vmm.wait(100)
        except subprocess.TimeoutExpired:
            vmm.kill()
            vmm.wait()
        vmm.stdout.close()


def exits_of(vmm: subprocess.Popen[str]) -> int:
    vmm.stdin.write("how many?\n")
    vmm.stdin.flush()
    return int(vmm.stdout.readline())


def tracer_of(pid: int) -> int:
    return int(re.search(r"TracerPid:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


@pytest.mark.kvm
def test_a_command_is_traced_from_its_first_ioctl_to_its_status(tmp_path):
    out = tmp_path / "trace"
    result = trace("--runs", "--output", str(out), "--", *VMM, "run")
    assert (result.returncode, result.stdout, result.stderr) == (7, "", "")
    text = out.read_text()
    for line in LINES:
        pattern = re.escape(line).replace("@", r"\w+")
        assert re.search(pattern, text), (pattern, text)


@pytest.mark.kvm
def test_json_gives_one_object_a_line_and_tells_threads_apart():
    result = trace("--json", "--runs", "--", *VMM, "run")
    assert result.returncode == 7
    calls = [json.loads(line) for line in result.stderr.splitlines()]
    runs = [call for call in calls if call["request"] == "KVM_RUN"]
    assert [run["fields"]["exit"] for run in runs] == ["KVM_EXIT_IO", "KVM_EXIT_IO", "KVM_EXIT_HLT"]
    assert len({call["pid"] for call in calls}) == 1
    assert {run["tid"] for run in runs}.isdisjoint(call["tid"] for call in calls if call not in runs)
    created = next(call for call in calls if call["request"] == "KVM_CREATE_VM")
    irqfd = next(call for call in calls if call["request"] == "KVM_IRQFD")
    assert (irqfd["fd"], irqfd["scope"], irqfd["error"]) == (created["result"], "vm", None)
    assert all(call["us"] > 0 for call in calls)


@pytest.mark.kvm
def test_runs_are_counted_unless_asked_for():
    result = trace("--", *VMM, "run")
    lines = result.stderr.splitlines()
    assert lines[-1] == "KVM_RUN: 3 calls, 0 errors; --runs shows each"
    assert not any("KVM_RUN(" in line for line in lines)


@pytest.mark.kvm
def test_a_filter_shows_what_it_names_and_only_that():
    result = trace("--filter", "irqfd,KVM_RUN", "--", *VMM, "run")
    requests = [re.search(r"(KVM_\w+)\(", line)[1] for line in result.stderr.splitlines()]
    assert requests == ["KVM_IRQFD"] * 2 + ["KVM_RUN"] * 3


@pytest.mark.kvm
@pytest.mark.parametrize("json_", [False, True])
def test_a_summary_counts_by_request(json_):
    result = trace("--summary", *(["--json"] if json_ else []), "--", *VMM, "run")
    assert result.returncode == 7
    if json_:
        rows = {row["request"]: row["calls"] for row in map(json.loads, result.stderr.splitlines())}
    else:
        head, *lines = (line.split() for line in result.stderr.splitlines())
        assert head == ["calls", "errors", "seconds", "request"]
        rows = {line[3]: int(line[0]) for line in lines}
    assert (rows["KVM_RUN"], rows["KVM_CREATE_VM"], rows["KVM_IRQFD"]) == (3, 2, 2)


@pytest.mark.kvm
def test_children_of_a_shell_are_followed():
    result = trace("--", "sh", "-c", '"$@"; exit 3', "sh", *VMM, "run")
    assert result.returncode == 3
    assert "KVM_IRQFD(" in result.stderr


@pytest.mark.kvm
@pytest.mark.parametrize(("number", "pause"), [(signal.SIGINT, "0.005"), (signal.SIGTERM, "0")])
def test_attach_shows_the_exits_of_a_running_vcpu_and_a_signal_lets_it_go(number, pause):
    with running_vmm(pause) as vmm:
        for _ in range(3):  # attaching and letting go leave no trace, so they can be done again
            tracer = subprocess.Popen(
                [*TRACE, "--runs", "--pid", str(vmm.pid)], stderr=subprocess.PIPE, text=True
            )
            lines = [tracer.stderr.readline() for _ in range(5)]
            assert all("vcpu0[" in line for line in lines), lines
            assert any("KVM_EXIT_IO, is_write=1, port=0x80" in line for line in lines), lines
            assert tracer_of(vmm.pid) == tracer.pid
            tracer.send_signal(number)
            tracer.communicate(timeout=100)
            assert tracer.returncode == 128 + number
            assert tracer_of(vmm.pid) == 0
            seen = exits_of(vmm)
            while exits_of(vmm) == seen:  # it runs on: a stuck one ends by the test's time limit
                pass
    assert vmm.returncode == 0


@pytest.mark.kvm
def test_attach_ends_with_the_process():
    with running_vmm() as vmm:
        tracer = subprocess.Popen(
            [*TRACE, "--json", "--runs", "--pid", str(vmm.pid)], stderr=subprocess.PIPE, text=True
        )
        tracer.stderr.readline()
    tracer.communicate(timeout=100)
    assert (tracer.returncode, vmm.returncode) == (0, 0)


@pytest.mark.kvm
def test_a_broken_pipe_lets_the_process_go():
    with running_vmm() as vmm:
        tracer = subprocess.Popen(
            [*TRACE, "--runs", "--pid", str(vmm.pid)], stderr=subprocess.PIPE, text=True
        )
        tracer.stderr.readline()
        tracer.stderr.close()
        assert tracer.wait(100) != 0
        assert tracer_of(vmm.pid) == 0
        exits_of(vmm)
    assert vmm.returncode == 0


@pytest.mark.kvm
def test_a_process_that_is_traced_already_is_named():
    with running_vmm() as vmm:
        tracer = subprocess.Popen(
            [*TRACE, "--runs", "--pid", str(vmm.pid)], stderr=subprocess.PIPE, text=True
        )
        tracer.stderr.readline()
        again = trace("--pid", str(vmm.pid))
        assert again.returncode == 2
        assert f"process {tracer.pid} traces it already" in again.stderr
        tracer.send_signal(signal.SIGINT)
        tracer.communicate(timeout=100)


def test_the_status_of_the_command_is_passed_on():
    assert trace("--", "sh", "-c", "exit 42").returncode == 42
    assert trace("--", "sh", "-c", "kill -TERM $$").returncode == 128 + signal.SIGTERM
    assert trace("--", "sh", "-c", "echo out").stdout == "out\n"


def test_signals_and_stops_reach_the_command():
    script = 'trap "exit 9" USR1; kill -USR1 $$; exit 1'
    assert trace("--", "sh", "-c", script).returncode == 9
    script = (
        "sh -c 'kill -STOP $$; exit 6' & p=$!\n"
        "(while kill -CONT $p; do sleep 0.02; done) 2>/dev/null &\n"
        "wait $p"
    )
    assert trace("--", "sh", "-c", script).returncode == 6


def test_a_signal_to_the_tracer_goes_to_its_command():
    tracer = subprocess.Popen(
        [*TRACE, "--", "sh", "-c", 'trap "exit 11" TERM; echo up; while :; do sleep 0.05; done'],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert tracer.stdout.readline() == "up\n"
    tracer.send_signal(signal.SIGTERM)
    tracer.communicate(timeout=100)
    assert tracer.returncode == 11


def test_a_trace_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        tracer = subprocess.Popen(
            [
                *TRACE,
                "--",
                "sh",
                "-c",
                'trap "exit 11" TERM; echo up; for n in $(seq 400); do sleep 0.05; done',
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGHUP, before)
    assert tracer.stdout.readline() == "up\n"
    tracer.send_signal(signal.SIGHUP)
    tracer.send_signal(signal.SIGTERM)  # a second signal would let the command go
    tracer.communicate(timeout=100)
    assert tracer.returncode == 11


def test_threads_that_come_and_go_and_an_exec_from_a_thread():
    program = (
        "import threading, os\n"
        "for _ in range(30):\n"
        "    t = threading.Thread(target=os.getppid); t.start(); t.join()\n"
        "threading.Thread(target=lambda: os.execv('/bin/sh', ['sh', '-c', 'exit 8'])).start()\n"
        "threading.Event().wait()\n"
    )
    assert trace("--", sys.executable, "-c", program).returncode == 8


def test_a_process_whose_argument_memory_is_gone():
    """An ioctl with KVM's magic, a wild address, on whatever fd: shown or not, never a crash."""
    program = (
        "import ctypes, os\n"
        "c = ctypes.CDLL(None).ioctl\n"
        "c.argtypes = ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p\n"
        "fd = os.open('/dev/null', 0)\n"
        "for number in (0x4020AE76, 0x4008AE6A, 0xC008AE88, 0xAE80, 0xAEFF):\n"
        "    for where in (0, 8, 2**47, 2**64 - 8):\n"
        "        c(fd, number, where); c(999, number, where); c(-1, number, where)\n"
    )
    result = trace("--runs", "--", sys.executable, "-c", program)
    assert result.returncode == 0
    assert "Traceback" not in result.stderr
    assert "?[999] KVM_IRQFD(arg=0xfffffffffffffff8, unreadable=1) = EBADF" in result.stderr
    assert "?[-1] KVM_GET_MSRS(arg=0x8, unreadable=1) = EBADF" in result.stderr
    assert len(result.stderr.splitlines()) == 40  # those on /dev/null are no KVM ioctls


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("no command", "--pid N")),
        (("--",), ("no command",)),
        (("--", "no-such-command-here"), ("no-such-command-here", "no such command", "PATH")),
        (("--", "/etc/passwd"), ("/etc/passwd", "cannot be executed")),
        (("--pid", "999999999"), ("--pid 999999999", "no such process")),
        (("--pid", "0"), ("--pid 0", "no such process")),
        (("--pid", "many"), ("--pid many", "not a process number")),
        (("--pid", "1" * 30), ("not a process number",)),
        (("--pid", "SELF", "--", "true"), ("--pid and a command",)),
        (("--filter", "KVM_IRQFDS", "--", "true"), ("--filter KVM_IRQFDS", "did you mean KVM_IRQFD?")),
        (("--filter", ",", "--", "true"), ("--filter", "no request")),
        (("--output", "/nonexistent/x", "--", "true"), ("--output /nonexistent/x", "No such file")),
        (("--rums", "--", "true"), ("--rums", "hvkvm trace --help")),
    ],
)
def test_usage_errors(arguments, words):
    result = trace(*(str(os.getpid()) if word == "SELF" else word for word in arguments))
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result
    assert all(word in result.stderr for word in words), result.stderr


@pytest.mark.parametrize("traced", [("--", "no-such-command-here"), ("--pid", "999999999")])
def test_the_file_keeps_what_it_held_until_there_is_something_to_trace(tmp_path, traced):
    out = tmp_path / "trace"
    out.write_text("of yesterday")
    assert trace("--output", str(out), *traced).returncode == 2
    assert out.read_text() == "of yesterday"
    assert trace("--output", str(out), "--summary", "--", "true").returncode == 0
    assert "yesterday" not in out.read_text()


def test_a_pipe_that_nobody_reads_is_told_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    result = trace("--output", str(tmp_path / "pipe"), "--", "true", timeout=100)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "nobody reads this pipe; start its reader first" in result.stderr


def test_a_command_that_no_kernel_runs_is_named_whatever_its_name_is(tmp_path):
    program = os.fsencode(tmp_path) + b"/no\xff"
    fd = os.open(program, os.O_WRONLY | os.O_CREAT, 0o755)
    os.write(fd, b"neither a program nor a script")
    os.close(fd)
    result = subprocess.run([*TRACE, "--", program], capture_output=True, check=False, timeout=100)
    assert (result.returncode, result.stderr) == (126, b"hvkvm: " + program + b": Exec format error\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to have a process that another user may not trace")
def test_no_permission_is_one_line_with_a_remedy():
    program = (
        "import os, sys\n"
        "import hvkvm.cli.trace, hvkvm.errors, hvkvm.observe.ioctl_trace\n"  # while they can be read
        "os.setresuid(65534, 65534, 65534)\n"
        "sys.exit(hvkvm.cli.main(['trace', '--pid', sys.argv[1]]))\n"
    )
    other = subprocess.Popen(["sleep", "60"])
    try:
        result = subprocess.run(
            [sys.executable, "-c", program, str(other.pid)], capture_output=True, text=True, check=False
        )
    finally:
        other.kill()
        other.wait()
    assert (result.returncode, result.stderr.count("\n")) == (77, 1), result
    assert "not permitted to trace it" in result.stderr
    assert "be root" in result.stderr


def test_without_python_ptrace_it_says_what_to_install():
    program = (
        "import sys; sys.modules['ptrace'] = None\n"
        "from hvkvm.cli import main\n"
        "sys.exit(main(['trace', '--', 'true']))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 77
    assert result.stderr == "hvkvm: python-ptrace is not installed; run: pip install 'hvkvm[trace]'\n"


def test_a_sleeping_thread_does_not_hold_up_a_detach():
    """The tracer waits for each thread to stop: one asleep in the kernel has to be woken for it."""
    sleeper = subprocess.Popen(
        [sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert sleeper.stdout.readline() == "up\n"
    tracer = subprocess.Popen([*TRACE, "--pid", str(sleeper.pid)], stderr=subprocess.PIPE, text=True)
    attached = threading.Event()
    while not attached.is_set():
        if tracer_of(sleeper.pid) == tracer.pid:
            attached.set()
    tracer.send_signal(signal.SIGINT)
    tracer.communicate(timeout=100)
    assert tracer_of(sleeper.pid) == 0
    sleeper.communicate(timeout=100)
    assert sleeper.returncode == 0
