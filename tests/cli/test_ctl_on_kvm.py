"""`hvkvm run` and `hvkvm ctl` as real processes, with a guest that only computes, on any KVM."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import guest_images
import pytest
import tiny_guests
from running_vm import SECONDS, RunningVm, ctl, running_vm

from hvkvm.block.open_image import open_image
from hvkvm.cli.ctl_client import Vm
from hvkvm.errors import Refused, VmGone

pytestmark = pytest.mark.kvm


def options(*more: object, hv: str = "none") -> tuple[object, ...]:
    return ("--kernel", guest_images.image("agent"), "--memory", "64M", "--hv", hv, "--quiet", *more)


def test_a_run_is_seen_and_ended(tmp_path: Path) -> None:
    with running_vm(tmp_path, *options("--cpus", "2", "--name", "first")) as vm:
        vm.wait_until_listening()
        folder = tmp_path / "hvkvm"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((folder / "first.sock").stat().st_mode) == 0o600
        (listed,) = vm.json("list")
        assert (listed["name"], listed["pid"]) == ("first", vm.process.pid)
        info = vm.json("info")
        assert (info["pid"], info["resets"], info["synic"], info["outcome"]) == (
            vm.process.pid,
            0,
            None,
            None,
        )
        assert (info["config"]["cpus"], info["config"]["memory"]) == (2, 64 << 20)
        assert info["uptime"] > 0
        assert vm.json("info")["uptime"] > info["uptime"]
        text = vm.ctl("info")
        assert "config.cpus" in text
        tree = vm.json("inspect")
        assert [vcpu["name"] for vcpu in tree["vcpus"]] == ["vcpu0", "vcpu1"]
        assert (tree["synic"], tree["vmbus"], tree["devices"]) == (None, None, {})
        assert "vcpu1: " in vm.ctl("inspect")
        dump = vm.ctl("dump")
        assert "vcpu1: " in dump
        assert "rip=0x" in dump
        assert dump.count("interrupts pending ") == 2
        assert dump.count("APIC timer one-shot, vector ") == 2
        for verb in (
            ("heartbeat",),
            ("shutdown",),
            ("time", "show"),
            ("keys", "x"),
            ("kvp", "list"),
            ("freeze",),
        ):
            assert vm.ctl(*verb, status=1) == "hvkvm: this VM has no VMBus; start it with --vmbus on\n"
        assert vm.ctl("quit") == "the run has ended: quit, status 130\n"
        assert vm.finish() == 130
        assert list(folder.iterdir()) == []
    assert ctl(tmp_path, "list").stdout == "no VM is running\n"


def test_a_bus_without_drivers_says_what_the_guest_lacks(tmp_path: Path) -> None:
    with running_vm(tmp_path, *options("--synic", "user", "--vmbus", "on", hv="host-model")) as vm:
        vm.wait_until_listening()
        tree = vm.json("inspect")
        assert tree["vmbus"]["state"] == "disconnected"
        assert {channel["state"] for channel in tree["vmbus"]["channels"]} == {"hidden"}
        assert tree["synic"]["connections"]["message"] == ["0x1", "0x4"]
        assert not any(device.get("driver") for device in tree["devices"].values())
        for verb, module in (("heartbeat", "hv_utils"), ("freeze", "hv_vss_daemon"), ("reboot", "hv_utils")):
            assert module in vm.ctl(verb, status=1)
        assert "hyperv_keyboard" in vm.ctl("keys", "x", status=1)
        assert "no key" in vm.ctl("keys", "\u00e4", status=2)
        assert "no driver" in vm.ctl("time", "show")
        assert "vmbus:" in vm.ctl("dump")
        os.kill(vm.process.pid, signal.SIGQUIT)
        while b"keyboard: driver no" not in vm.errors:
            assert vm.process.poll() is None
            time.sleep(0.05)


def test_names(tmp_path: Path) -> None:
    with running_vm(tmp_path, *options("--name", "a.b-c_1")) as one:
        one.wait_until_listening()
        with running_vm(tmp_path, *options("--name", "a.b-c_1")) as two:
            assert two.finish() == 2
            error = bytes(two.errors).decode()
            assert error.startswith("hvkvm: --name a.b-c_1: ")
            assert error.endswith("choose another name\n")
        with running_vm(tmp_path, *options()) as three:
            name = f"hvkvm-{three.process.pid}"
            while not json.loads(ctl(tmp_path, "--json", "list").stdout)[1:]:
                assert three.process.poll() is None, three.report()
            error = one.ctl("info", status=2)
            assert error == f"hvkvm: 2 VMs are running: a.b-c_1, {name}; choose one with --vm NAME\n"
            for given in (name, three.process.pid, tmp_path / "hvkvm" / f"{name}.sock"):
                assert one.json("--vm", given, "info")["pid"] == three.process.pid
            assert "4000000" in one.ctl("--vm", "4000000", "info", status=69)
            one.ctl("--vm", name, "quit")
            assert three.finish() == 130
        assert one.json("info")["pid"] == one.process.pid


def test_what_a_killed_vm_left_is_removed_and_its_name_is_free(tmp_path: Path) -> None:
    path = tmp_path / "hvkvm" / "x.sock"
    with running_vm(tmp_path, *options("--name", "x")) as vm:
        vm.wait_until_listening()
        vm.process.kill()
        vm.finish()
    assert path.is_socket()
    assert ctl(tmp_path, "--vm", path, "info").returncode == 69
    with running_vm(tmp_path, *options("--name", "x")) as vm:
        while ctl(tmp_path, "info").returncode != 0:
            assert vm.process.poll() is None, vm.report()
        vm.process.kill()
        vm.finish()
    assert ctl(tmp_path, "list").stdout == "no VM is running\n"
    assert not path.exists()


def test_many_clients_at_once(tmp_path: Path) -> None:
    """Each gets its own answers; a dump is one client's at a time, and the others hear that it is."""
    with running_vm(tmp_path, *options("--cpus", "2", "--name", "x")) as vm:
        vm.wait_until_listening()
        path = tmp_path / "hvkvm" / "x.sock"
        barrier = threading.Barrier(12)
        problems: list[str] = []
        dumps: list[str] = []

        def work(number: int) -> None:
            try:
                with Vm(path) as client:
                    barrier.wait()
                    for count in range(40):
                        if (number + count) % 4:
                            assert client.ask("info", 60)["pid"] == vm.process.pid
                        elif number % 2:
                            assert client.ask("inspect", 60)["vmbus"] is None
                        else:
                            try:
                                dumps.append(client.ask("dump", 60))
                            except Refused as error:
                                assert str(error) == "another dump is being made; try again"
            except BaseException as error:
                problems.append(f"{number}: {type(error).__name__}: {error}")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        assert problems == []
        assert dumps
        assert all("vcpu1: " in dump for dump in dumps)
        assert vm.ctl("quit")
        assert vm.finish() == 130


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_who_waits_hears_of_the_end(tmp_path: Path, number: signal.Signals) -> None:
    with running_vm(tmp_path, *options("--name", "x")) as vm:
        vm.wait_until_listening()
        path = tmp_path / "hvkvm" / "x.sock"
        with Vm(path) as client, Vm(path) as other:
            client._socket.sendall(b'{"do":"wait","timeout":60}\n')
            assert other.ask("info", 60)["name"] == "x"  # behind the other's request
            os.kill(vm.process.pid, number)
            if number == signal.SIGTERM:
                end = json.loads(client._line(SECONDS))["result"]
                assert (end["ending"], end["status"], end["detail"]) == ("quit", 143, "SIGTERM")
            else:
                with pytest.raises(ValueError, match="closed"):
                    client._line(SECONDS)
            with pytest.raises(VmGone):
                other.ask("info", 60)
        vm.finish()


@pytest.mark.parametrize("asked", ["wait", "quit", "save"])
def test_who_hears_of_the_end_finds_nothing_in_use(tmp_path: Path, asked: str) -> None:
    """The next VM may have its name, its disk and its sockets; the recording and the picture are whole."""
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    given = ("--vmbus", "on", "--disk", tmp_path / "disk.raw", "--net", f"listen={tmp_path}/wire")
    drawn = ("--timeline", tmp_path / "picture.svg", "--record", tmp_path / "recording")
    words = options("--name", "x", "--synic", "user", *given, *drawn, hv="host-model")
    request = {"do": asked, "timeout": 60}
    if asked == "save":
        request |= {"file": f"{tmp_path}/saved", "end": True}
    with running_vm(tmp_path, *words) as vm:
        vm.wait_until_listening()
        with Vm(tmp_path / "hvkvm" / "x.sock") as client, Vm(tmp_path / "hvkvm" / "x.sock") as other:
            client._socket.sendall(json.dumps(request).encode() + b"\n")
            if asked == "wait":
                assert other.ask("info", 60)["name"] == "x"
                os.kill(vm.process.pid, signal.SIGTERM)
            assert json.loads(client._line(SECONDS))["ok"]
            open_image(str(tmp_path / "disk.raw")).close()
            assert not (tmp_path / "wire").exists()
            assert (tmp_path / "picture.svg").read_text().endswith("</svg>\n")
            assert (tmp_path / "recording").stat().st_size
            assert not (tmp_path / "hvkvm" / "x.sock").exists()
        vm.finish()


def test_a_vm_that_stands_still_is_not_waited_for_without_end(tmp_path: Path) -> None:
    with running_vm(tmp_path, *options()) as vm:
        vm.wait_until_listening()
        os.kill(vm.process.pid, signal.SIGSTOP)
        try:
            assert "does not answer" in vm.ctl("--timeout", "0.1", "info", status=1)
        finally:
            os.kill(vm.process.pid, signal.SIGCONT)
        assert vm.json("info")["pid"] == vm.process.pid


NO_IDT = tiny_guests.HANG
"""cli; hlt: only an NMI wakes it, and as it has no handler that is its end."""


def test_an_nmi_reaches_the_vcpu_it_is_for(tmp_path: Path, guest: Callable[[bytes], Path]) -> None:
    kernel = guest(tiny_guests.out_string(b"up\n") + NO_IDT)
    with running_vm(tmp_path, *tiny_guests.run_arguments(kernel)[1:], "--cpus", "2") as vm:
        vm.wait_for("up\n")
        assert vm.ctl("nmi", "--cpu", "2", status=2) == 'hvkvm: "cpu" is the number of a vCPU, 0 to 1\n'
        assert vm.ctl("nmi", "--cpu", "1") == "NMI sent to vCPU 1\n"  # that one has not started
        assert "halted" in vm.ctl("dump")
        assert vm.ctl("nmi") == "NMI sent to 2 vCPUs\n"
        assert vm.finish() == 254
        assert b"triple fault: vcpu0" in vm.errors


def test_a_break_and_keys_come_to_the_guest(tmp_path: Path, guest: Callable[[bytes], Path]) -> None:
    # Prints the status and the byte of all that it receives, as two letters from "@" on.
    loop = bytes.fromhex("66bafd03 ec 88c4 a801 74f5 66baf803 ec 86c4 2411 0440 ee 88e0 240f 0440 ee ebe0")
    with running_vm(
        tmp_path, *tiny_guests.run_arguments(guest(tiny_guests.out_string(b"up\n") + loop))[1:]
    ) as vm:
        vm.wait_for("up\n")
        told = "break sent, but nothing in the guest reads its console yet\n"
        assert vm.ctl("break") == told
        assert vm.ctl("break", "ab") == told
        # BI and DR with a NUL, twice; then DR alone with a and b.
        while len(vm.text) < len("up\nQ@Q@AAAB"):
            assert vm.process.poll() is None, vm.report()
            time.sleep(0.05)
        assert vm.text == "up\nQ@Q@AAAB"
        vm.ctl("quit")


def test_control_off(tmp_path: Path) -> None:
    with running_vm(tmp_path, *options("--control", "off", "--timeout", "1")) as vm:
        assert vm.finish() == 124
    assert list(tmp_path.iterdir()) == []


def test_control_at_a_path(tmp_path: Path) -> None:
    path = tmp_path / "here"
    with running_vm(tmp_path, *options("--control", path)) as vm:
        while not path.is_socket() or ctl(tmp_path, "--vm", path, "info").returncode:
            assert vm.process.poll() is None, vm.report()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert vm.ctl("list") == "no VM is running\n"
        vm.ctl("--vm", path, "quit")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["no/such/folder", "file", "x" * 200])
def test_a_path_that_cannot_be_had_is_an_error(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("mine")
    with running_vm(tmp_path, *options("--control", tmp_path / where)) as vm:
        assert vm.finish() == 2
        error = bytes(vm.errors).decode()
        assert error.startswith(f"hvkvm: --control {tmp_path / where}: ")
        assert error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_had_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hvkvm.events import Event, Observer
    from hvkvm.machine.config import MachineConfig
    from hvkvm.machine.machine import Machine
    from hvkvm.observe import control_path

    class Notes(Observer):
        def __init__(self) -> None:
            self.events: list[Event] = []

        def event(self, event: Event) -> None:
            self.events.append(event)

    notes = Notes()
    monkeypatch.setattr(control_path, "folders", lambda: [tmp_path / "no" / "such"])
    config = MachineConfig(kernel=guest_images.image("agent"), hv="none", control="auto", timeout=0.2)
    with Machine(config, observer=notes) as machine:
        assert machine.control is None
        assert machine.run().status == 124
    (event,) = notes.events
    assert "no control socket" in str(event)


def test_a_reset_ends_a_wait_for_it(tmp_path: Path) -> None:
    from hvkvm.machine.config import MachineConfig
    from hvkvm.machine.machine import Machine

    path = tmp_path / "c"
    config = MachineConfig(kernel=guest_images.image("agent"), hv="none", control=str(path))
    with Machine(config) as machine:
        machine.start()
        with Vm(path) as client:
            assert client.ask("info", 60)["resets"] == 0
            client._socket.sendall(b'{"do":"wait","resets":0,"timeout":60}\n{"do":"info"}\n')
            machine.request_reset("by the test")
            assert json.loads(client._line(SECONDS)) == {"ok": True, "result": {"resets": 1}}
            assert json.loads(client._line(SECONDS))["result"]["resets"] == 1
            client._socket.sendall(b'{"do":"wait","timeout":0.2}\n')
            late = json.loads(client._line(SECONDS))
            assert (late["kind"], late["error"]) == ("guest", "it has not happened within 0.2 s")


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"do": "explode"}, "no such request"),
        ({"do": "x" * 1000}, "no such request"),
        ({"do": "wait", "timeout": -1}, '"timeout" is a number'),
        ({"do": "wait", "timeout": True}, '"timeout" is a number'),
        ({"do": "wait", "timeout": "1"}, '"timeout" is a number'),
        ({"do": "wait", "timeout": 1e300}, '"timeout" is a number'),
        ({"do": "wait", "resets": "1"}, '"resets" is a number'),
        ({"do": "shutdown"}, '"what" is missing'),
        ({"do": "shutdown", "what": 7}, '"what" is missing'),
        ({"do": "shutdown", "what": "fly"}, "choose power-off"),
        ({"do": "time", "what": "fly"}, "choose sync"),
        ({"do": "keys"}, 'one of "text"'),
        ({"do": "break", "keys": "\u00e4"}, "ASCII"),
        ({"do": "break", "keys": "x" * 65}, "up to 64"),
        ({"do": "break", "keys": 1}, '"keys" is missing'),
        ({"do": "nmi", "cpu": 1}, "0 to 0"),
        ({"do": "nmi", "cpu": -1}, "0 to 0"),
        ({"do": "nmi", "cpu": "0"}, "0 to 0"),
        ({"do": "nmi", "cpu": True}, "0 to 0"),
        ({"do": "keys", "text": "a", "press": "b"}, 'one of "text"'),
        ({"do": "keys", "text": "\x00"}, "no key"),
        ({"do": "keys", "press": "ctrl-x-"}, "no such key"),
        ({"do": "keys", "scancode": "e1"}, "not a make code"),
        ({"do": "kvp", "what": "get", "pool": "deep"}, "choose external"),
        ({"do": "kvp", "what": "get", "pool": "auto"}, '"key" is missing'),
        ({"do": "kvp", "what": "set", "pool": "auto", "key": "a"}, '"value" is missing'),
    ],
)
def test_requests_that_make_no_sense(
    control: tuple[RunningVm, socket.socket], request_: dict[str, object], words: str
) -> None:
    _vm, client = control
    client.sendall(json.dumps(request_).encode() + b"\n")
    reply = json.loads(client.recv(1 << 16))
    assert (reply["ok"], reply["kind"]) == (False, "usage")
    assert words in reply["error"]
    assert len(reply["error"]) < 300


def test_one_dump_may_follow_the_other(control: tuple[RunningVm, socket.socket]) -> None:
    """The thread that made one lives a moment longer than its answer takes: the next one was "busy"."""
    _vm, client = control
    for _ in range(10):
        client.sendall(b'{"do":"dump"}\n')
        reply = b""
        while not reply.endswith(b"\n"):
            reply += client.recv(1 << 16)
        assert json.loads(reply)["ok"], reply


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningVm, socket.socket]]:
    """A run with a bus, and a connection to it."""
    folder = tmp_path_factory.mktemp("control")
    with running_vm(
        folder, *options("--synic", "user", "--vmbus", "on", "--name", "x", hv="host-model")
    ) as vm:
        vm.wait_until_listening()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(SECONDS)
            client.connect(str(folder / "hvkvm" / "x.sock"))
            yield vm, client
