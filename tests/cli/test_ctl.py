"""`hvkvm ctl` against a VM that is played by the test: its arguments, answers, exit statuses, and ends."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from control_listener import listen
from running_vm import command_line, ctl, environment

from hvkvm.cli import ctl_client
from hvkvm.cli.ctl import VERBS
from hvkvm.observe import control_path

SECONDS = 100.0


class PlayedVm:
    """Listens like a VM and answers as the test says; `asked` is what came."""

    def __init__(self, runtime: Path, name: str) -> None:
        folder = runtime / "hvkvm"
        folder.mkdir(mode=0o700, exist_ok=True)
        self.path = folder / f"{name}.sock"
        self.asked: list[Any] = []
        self.answers: dict[str, object] = {}
        self.came = threading.Event()
        self._listener = listen(self.path)
        self._listener.setblocking(True)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def answer(self, do: str, result: object) -> None:
        self.answers[do] = {"ok": True, "result": result}

    def fail(self, do: str, kind: str, error: str) -> None:
        self.answers[do] = {"ok": False, "kind": kind, "error": error}

    def _serve(self) -> None:
        while True:
            try:
                connection, _address = self._listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as lines:
                for line in lines:
                    request = json.loads(line)
                    self.asked.append(request)
                    self.came.set()
                    answer = self.answers.get(request["do"])
                    if answer is None:
                        break
                    if answer == "silence":
                        continue
                    data = answer if isinstance(answer, bytes) else json.dumps(answer).encode() + b"\n"
                    connection.sendall(data)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(SECONDS)
        self._listener.close()


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], PlayedVm]]:
    played: list[PlayedVm] = []
    monkeypatch.setattr(control_path, "folders", lambda: [tmp_path / "hvkvm"])

    def make(name: str) -> PlayedVm:
        played.append(PlayedVm(tmp_path, name))
        return played[-1]

    yield make
    for vm in played:
        vm.close()


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`hvkvm ctl` in this process: exit status, standard output, standard error."""
    from hvkvm.cli import main

    def call(*arguments: str) -> tuple[int, str, str]:
        status = main(["ctl", *arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        assert err.count("\n") <= 1
        assert err == "" or err.startswith("hvkvm: ")
        return status, out, err

    return call


def test_a_number_that_no_process_has_is_no_vm(play: Callable[[str], PlayedVm], run: Run) -> None:
    play("played")
    for wanted in ("9" * 5000, "\u0663" * 5000):
        status, _out, err = run("info", "--vm", wanted)
        assert status == 69
        assert len(err) < 1000
        assert "no such VM; running: played\n" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("no verb", "info")),
        (("explode",), ("explode", "no such verb", "shutdown")),
        (("--vm",), ("--vm", "hvkvm ctl --help")),
        (("info", "spare"), ("spare", "hvkvm ctl info --help")),
        (("info", "--wait"), ("--wait", "hvkvm ctl info --help")),
        (("--timeout", "soon", "info"), ("--timeout soon", "--timeout 30")),
        (("info", "--timeout", "0"), ("--timeout 0",)),
        (("info", "--timeout", "nan"), ("--timeout nan",)),
        (("info", "--timeout", "1e9"), ("--timeout 1e9", "up to 86400 (24 h)")),
        (("time",), ("what", "hvkvm ctl time --help")),
        (("time", "fly"), ("fly", "sync")),
        (("keys",), ("what to type",)),
        (("keys", "a", "--press", "b"), ("one of them only",)),
        (("keys", "--enter", "--press", "b"), ("one of them only",)),
        (("kvp",), ("hvkvm ctl kvp --help",)),
        (("nmi", "--cpu", "all"), ("--cpu all", "--cpu 0")),
        (("kvp", "get"), ("takes a KEY",)),
        (("kvp", "get", "a", "b"), ("takes a KEY",)),
        (("kvp", "set", "a"), ("a KEY and a VALUE",)),
        (("kvp", "list", "a"), ("takes nothing more",)),
        (("kvp", "list", "--pool", "deep"), ("deep", "external")),
        (("save", ""), ("FILE: empty; name a path",)),
        (("screenshot", ""), ("FILE.png: empty; name a path",)),
        (("disk", "insert", "cdrom0", ""), ("disk insert: an empty word; takes NAME ISO",)),
        (("disk", "add", ""), ("disk add: an empty word; takes FILE",)),
        (("disk", "stats", ""), ("disk stats: an empty word; takes a NAME",)),
        (("info",), ("no VM is running", "hvkvm run")),
    ],
)
def test_usage_errors(play: Any, run: Run, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    for word in words:
        assert word in err


@pytest.mark.parametrize("given", ["nobody", "4711", "/nonexistent/x.sock"])
def test_a_vm_that_is_not_there(play: Any, run: Run, given: str) -> None:
    status, out, err = run("--vm", given, "info")
    assert (status, out) == (69, "")
    assert given in err


def test_one_vm_needs_no_name_and_two_need_one(play: Callable[[str], PlayedVm], run: Run) -> None:
    one = play("one")
    one.answer("thaw", {"state": "thawed"})
    assert run("thaw") == (0, "the guest's file systems are thawed\n", "")
    two = play("two")
    two.answer("thaw", {"state": "thawed"})
    status, out, err = run("thaw")
    assert (status, out) == (2, "")
    assert err == "hvkvm: 2 VMs are running: one, two; choose one with --vm NAME\n"
    assert run("--vm", "two", "thaw")[0] == 0
    assert run("thaw", "--vm", str(two.path))[0] == 0
    assert run("--vm", str(os.getpid()), "thaw")[0] == 0  # the first of this process
    assert (len(one.asked), len(two.asked)) == (2, 2)


@pytest.mark.parametrize(
    ("kind", "status"), [("guest", 1), ("absent", 1), ("busy", 1), ("internal", 1), ("?", 1), ("usage", 2)]
)
def test_the_reason_and_the_status_of_a_refusal(
    play: Callable[[str], PlayedVm], run: Run, kind: str, status: int
) -> None:
    play("vm").fail("freeze", kind, "for a reason")
    assert run("freeze") == (status, "", "hvkvm: for a reason\n")
    assert run("freeze", "--json") == (status, "", "hvkvm: for a reason\n")


@pytest.mark.parametrize("answer", [None, b"nonsense", b"\xff", b"[1", b"[1]", b"{}", b"[" * 20_000])
def test_a_vm_that_goes_or_talks_nonsense_is_gone(
    play: Callable[[str], PlayedVm], run: Run, answer: bytes | None
) -> None:
    vm = play("vm")
    if answer is not None:
        vm.answers["info"] = answer + b"\n"
    assert run("info")[0] == (1 if answer == b"{}" else 69)


def test_silence_has_an_end(
    play: Callable[[str], PlayedVm], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctl_client, "GRACE_SECONDS", 0.2)
    vm = play("vm")
    vm.answers["heartbeat"] = "silence"
    status, out, err = run("--timeout", "0.1", "heartbeat")
    assert (status, out) == (1, "")
    assert "does not answer within" in err
    assert f"`kill -QUIT {os.getpid()}` has it print who waits for what" in err
    assert vm.came.wait(SECONDS)  # who asked has gone by then, on a busy host
    assert vm.asked[0]["timeout"] == 0.1


STOPPED = """
import os, signal, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_a_vm_whose_process_is_stopped_is_said_to_be(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctl_client, "GRACE_SECONDS", 0.2)
    with subprocess.Popen([sys.executable, "-c", STOPPED, tmp_path / "vm"]) as process:
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        status, _out, err = run("--vm", str(tmp_path / "vm"), "--timeout", "0.1", "info")
        process.kill()
    assert status == 1
    assert f"its process {process.pid} is stopped: `kill -CONT {process.pid}` has it go on" in err


def full(path: Path, queued: list[socket.socket]) -> None:
    """Connect to `path`, of which nobody takes a connection, until no more can wait there."""
    while True:
        queued.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        queued[-1].setblocking(False)
        if queued[-1].connect_ex(str(path)) == errno.EAGAIN:
            return


def test_a_vm_that_takes_no_connection_is_busy(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "hvkvm"
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(control_path, "folders", lambda: [folder])
    monkeypatch.setattr(ctl_client, "CONNECT_SECONDS", 0.1)
    queued: list[socket.socket] = []

    def take() -> None:
        listener.accept()[0].close()

    with listen(folder / "a.sock") as listener, ExitStack() as stack:
        full(folder / "a.sock", queued)
        for one in queued:
            stack.enter_context(one)
        status, out, err = run("info")
        assert (status, out) == (1, "")
        assert "a.sock: the VM is busy: it takes no connection within 0.1 s; try again" in err
        status, out, err = run("list")
        assert (status, err) == (0, "")
        assert "the VM is busy" in out
        monkeypatch.setattr(ctl_client, "CONNECT_SECONDS", SECONDS)
        taking = threading.Timer(0.2, take)
        taking.start()
        with ctl_client.Vm(folder / "a.sock") as vm:
            assert vm.pid == os.getpid()
        taking.join()


def test_one_that_takes_no_connection_does_not_hide_another(
    play: Callable[[str], PlayedVm], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a process's number each VM is asked who it is."""
    monkeypatch.setattr(ctl_client, "CONNECT_SECONDS", 0.1)
    play("b").answer("thaw", {"state": "thawed"})
    queued: list[socket.socket] = []
    with listen(tmp_path / "hvkvm" / "a.sock"), ExitStack() as stack:
        full(tmp_path / "hvkvm" / "a.sock", queued)
        for one in queued:
            stack.enter_context(one)
        assert run("thaw", "--vm", str(os.getpid())) == (0, "the guest's file systems are thawed\n", "")
        status, _out, err = run("thaw", "--vm", "4711")
        assert status == 1
        assert "a.sock: the VM is busy" in err


def test_ctrl_c_is_clean(tmp_path: Path, play: Callable[[str], PlayedVm]) -> None:
    vm = play("vm")
    vm.answers["shutdown"] = "silence"
    process = subprocess.Popen(
        command_line("ctl", "shutdown", "--wait"),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(tmp_path),
    )  # fmt: skip
    assert vm.came.wait(SECONDS)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=SECONDS) == (b"", b"")
    assert process.returncode == 130


def test_what_is_asked_for_each_verb(play: Callable[[str], PlayedVm], run: Run) -> None:
    clock = (
        "host 1970-01-01 00:00:00 UTC\nguest: driver version 4.0; told to set its clock 1 times, 2 samples\n"
    )

    def kvp(what: str, pool: str, **more: str) -> dict[str, object]:
        return {"do": "kvp", "what": what, "pool": pool, **more}

    vm = play("vm")
    vm.answer("shutdown", {"accepted": True})
    vm.answer("keys", {"events": 2})
    vm.answer("time", {"host": 0.0, "driver": True, "version": "4.0", "sent": {"sync": 1, "sample": 2}})
    vm.answer("kvp", {"pairs": [["k", "v"]], "note": ""})
    vm.answer("dump", "who waits\nfor what")
    vm.answer("break", {"listens": True})
    vm.answer("nmi", {"cpus": [0, 1]})
    expected: list[tuple[tuple[str, ...], dict[str, object], str]] = [
        (("shutdown",), {"do": "shutdown", "what": "power-off"}, "the guest accepts: power-off\n"),
        (("reboot",), {"do": "shutdown", "what": "reboot"}, "the guest accepts: reboot\n"),
        (("hibernate",), {"do": "shutdown", "what": "hibernate"}, "the guest accepts: hibernate\n"),
        (("keys", "a b"), {"do": "keys", "text": "a b"}, "2 key events sent\n"),
        (("keys", "--", "-a"), {"do": "keys", "text": "-a"}, "2 key events sent\n"),
        (("keys", "--enter", "ls"), {"do": "keys", "text": "ls\n"}, "2 key events sent\n"),
        (("keys", "--enter"), {"do": "keys", "text": "\n"}, "2 key events sent\n"),
        (("keys", "--press", "esc"), {"do": "keys", "press": "esc"}, "2 key events sent\n"),
        (("keys", "--scancode", "1d,38"), {"do": "keys", "scancode": "1d,38"}, "2 key events sent\n"),
        (("kvp", "set", "k", "v"), kvp("set", "external", key="k", value="v"), "k=v\n"),
        (("kvp", "list"), kvp("list", "auto"), "k=v\n"),
        (("kvp", "delete", "k"), kvp("delete", "external", key="k"), "k=v\n"),
        (("kvp", "get", "k", "--pool", "guest"), kvp("get", "guest", key="k"), "v\n"),
        (("break",), {"do": "break"}, "break sent\n"),
        (("break", "h"), {"do": "break", "keys": "h"}, "break sent\n"),
        (("nmi",), {"do": "nmi"}, "NMI sent to 2 vCPUs\n"),
        (("--cpu", "1", "nmi"), {"do": "nmi", "cpu": 1}, "NMI sent to 2 vCPUs\n"),
        (("kvp", "get", "--pool", "external", "k"), kvp("get", "external", key="k"), "v\n"),
        (("kvp", "set", "--pool", "guest", "k", "v"), kvp("set", "guest", key="k", value="v"), "k=v\n"),
        (("dump",), {"do": "dump"}, "who waits\nfor what\n"),
        (("time", "show"), {"do": "time", "what": "show"}, clock),
    ]  # fmt: skip
    for arguments, request, said in expected:
        assert run(*arguments) == (0, said, ""), arguments
        asked = vm.asked.pop()
        assert asked.pop("timeout") > 0
        assert asked == request


def test_waiting_for_the_end(play: Callable[[str], PlayedVm], run: Run) -> None:
    vm = play("vm")
    vm.answer("shutdown", {"resets": 0, "ending": "powered off", "status": 0, "detail": ""})
    assert run("shutdown", "--wait") == (0, "the run has ended: powered off, status 0\n", "")
    assert vm.asked[-1]["wait"] is True
    vm.answer("shutdown", {"resets": 3})
    assert run("reboot", "--wait") == (0, "the guest was reset (3 resets)\n", "")
    del vm.answers["shutdown"]  # it goes without a word
    assert run("shutdown", "--wait") == (0, "the run has ended\n", "")
    assert json.loads(run("--json", "shutdown", "--wait")[1]) == {"ending": "ended"}


def test_a_heart_that_does_not_beat_is_status_1(play: Callable[[str], PlayedVm], run: Run) -> None:
    vm = play("vm")
    vm.answer("heartbeat", {"alive": True, "beats": 5, "missed": 0})
    assert run("heartbeat") == (0, "alive, 5 heartbeats\n", "")
    vm.answer("heartbeat", {"alive": False, "beats": 5, "missed": 3})
    status, out, _err = run("heartbeat")
    assert (status, out.startswith("no heartbeat")) == (1, True)


def test_a_key_is_looked_for_in_all_pools(play: Callable[[str], PlayedVm], run: Run) -> None:
    vm = play("vm")
    vm.fail("kvp", "missing", "no such key")
    assert run("kvp", "get", "k") == (1, "", "hvkvm: k: no such key in any pool\n")
    assert [request["pool"] for request in vm.asked] == ["external", "guest", "auto"]


def test_a_list_that_was_cut_off_says_so_beside_its_pairs(play: Callable[[str], PlayedVm], run: Run) -> None:
    """By its JSON alone nobody could tell, and among the lines it would pass for a pair."""
    vm = play("vm")
    vm.answer("kvp", {"pairs": [["k", "v"]], "note": "1 pairs, and there may be more"})
    said = "hvkvm: 1 pairs, and there may be more\n"
    assert run("kvp", "list") == (0, "k=v\n", said)
    status, out, err = run("kvp", "list", "--json")
    assert (status, json.loads(out), err) == (0, {"k": "v"}, said)


def test_texts_of_the_guest_cannot_command_the_terminal(play: Callable[[str], PlayedVm], run: Run) -> None:
    vm = play("vm")
    vm.answer("kvp", {"pairs": [["a\x1b[2J", "b\r\n\x9b\u202e"]], "note": ""})
    assert run("kvp", "list")[1] == "a\\x1b[2J=b\\r\\n\\x9b\\u202e\n"
    assert run("kvp", "get", "x", "--pool", "auto")[1] == "b\\r\\n\\x9b\\u202e\n"
    inside = {"vcpus": [{"name": "\x1b]0;", "state": "\x07", "exits": {}}], "synic": None, "vmbus": None}
    vm.answer("inspect", inside)
    assert run("inspect")[1] == "\\x1b]0;: \\x07; exits: none\n"


def test_the_list_of_vms(play: Callable[[str], PlayedVm], run: Run) -> None:
    assert run("list") == (0, "no VM is running\n", "")
    assert json.loads(run("list", "--json")[1]) == []
    info = {
        "uptime": 3725.5,
        "resets": 1,
        "synic": "kernel",
        "vmbus_version": "5.3",
        "config": {"kernel": "/k"},
    }
    play("a").answer("info", info)
    play("b").fail("info", "internal", "it is ill")
    assert run("list")[1].splitlines() == [
        "NAME  PID    UP       RESETS  KERNEL".replace("PID  ", "PID".ljust(max(3, len(str(os.getpid()))))),
        f"a     {os.getpid()}  1:02:05  1       /k",
        f"b     {os.getpid()}  ?        ?       it is ill",
    ]
    first, second = json.loads(run("list", "--json")[1])
    assert (first["name"], first["pid"], first["kernel"]) == ("a", os.getpid(), "/k")
    assert second["error"] == "it is ill"


def test_a_vm_that_started_in_firmware_is_listed_by_that(play: Callable[[str], PlayedVm], run: Run) -> None:
    info = {"uptime": 1.0, "resets": 0, "synic": None, "vmbus_version": None}
    play("a").answer("info", {**info, "config": {"kernel": None, "firmware": "auto"}})
    play("b").answer("info", {**info, "config": {"kernel": None, "firmware": "/f.fd"}})
    first, second = run("list")[1].splitlines()[1:]
    assert first.endswith("  firmware auto")
    assert second.endswith("  firmware /f.fd")
    listed = json.loads(run("list", "--json")[1])
    assert [(vm["kernel"], vm["firmware"]) for vm in listed] == [(None, "auto"), (None, "/f.fd")]


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_says_how_long_a_verb_waits(
    verb: str, tmp_path: Path, play: Callable[[str], PlayedVm], run: Run
) -> None:
    words = {
        "time": ("show",),
        "keys": ("x",),
        "save": ("f",),
        "screenshot": ("f",),
        "net": ("list",),
        "kvp": ("list",),
        "disk": ("list",),
    }
    vm = play("one")
    run(verb, *words.get(verb, ()))  # it hangs up at what it is asked
    run(verb, *words.get(verb, ()), "--timeout", "3.5")
    usual, given = vm.asked
    assert given["timeout"] == 3.5
    text = " ".join(ctl(tmp_path, verb, "--help").stdout.split())
    waits = "; with --wait 300" if "--wait" in text else ""
    assert f"--timeout S how long to wait for the answer ({usual['timeout']:g}{waits})" in text
    if waits:
        run(verb, "--wait")
        assert vm.asked[-1]["timeout"] == 300


def test_every_verb_explains_itself(tmp_path: Path) -> None:
    for verb in ("", *VERBS):
        result = ctl(tmp_path, *([verb] if verb else []), "--help")
        assert (result.returncode, result.stderr) == (0, "")
        assert "--vm" in result.stdout
    result = ctl(tmp_path, "--help")
    assert "exit status:" in result.stdout
    assert "69 no such VM" in result.stdout
