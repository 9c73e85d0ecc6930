"""`hvkvm run --net` and `hvkvm ctl net` as real processes, with a guest that has no driver."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import guest_images
import pytest
from guest_machine import Guest
from running_vm import RunningVm, command_line, running_vm

from hvkvm.cli.ctl_client import Vm
from hvkvm.machine import own_files
from hvkvm.machine.saving import FOLDER_GONE
from tests.net.conftest import free_port, needs_taps
from tests.net.test_endings import wait_for_end

pytestmark = pytest.mark.kvm

NO_PASST = pytest.mark.skipif(shutil.which("passt") is None, reason="no passt; make setup installs it")


def options(*more: object) -> tuple[object, ...]:
    kernel = guest_images.image("agent")
    return ("--kernel", kernel, "--memory", "64M", "--synic", "user", "--vmbus", "on", "--quiet", *more)


def refused(*more: object) -> str:
    done = subprocess.run(
        command_line("run", *options(*more)), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2, done
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def nics(vm: RunningVm) -> dict[str, dict[str, object]]:
    return {nic["name"]: nic for nic in vm.json("net", "list")}


def test_nics_are_listed_added_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wire = tmp_path / "wire"
    capture = tmp_path / "wire.pcapng"
    words = f"listen={wire},pcap={capture},mac=02:00:00:00:00:07"
    with running_vm(tmp_path, *options("--name", "one", "--net", words)) as vm:
        vm.wait_until_listening()
        assert nics(vm)["net0"] == {
            "name": "net0", "mac": "02:00:00:00:00:07", "driver": False, "kind": "socket", "up": False,
            "mtu": 65521, "peer": "none", "pcap": str(capture),
        }  # fmt: skip
        table = vm.ctl("net", "list").splitlines()
        assert table[0].split() == ["NAME", "MAC", "LINK", "DRIVER", "MTU", "WIRE"]
        assert table[1].split() == ["net0", "02:00:00:00:00:07", "down", "no", "65521", "socket"]

        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(wire))
            peer.sendall((60).to_bytes(4, "big") + bytes(60))
            while not nics(vm)["net0"]["up"]:
                pass
            assert vm.ctl("net", "link", "net0", "down") == "net0 is down\n"
            assert not nics(vm)["net0"]["up"]
            assert vm.ctl("net", "link", "net0", "up") == "net0 is up\n"
        assert "net0 wire received_dropped " in vm.ctl("net", "stats")
        assert vm.json("net", "stats")[0]["wire"]["kind"] == "socket"
        assert "network:" in vm.ctl("inspect")
        assert "listen=" in vm.ctl("info")

        monkeypatch.chdir(tmp_path)
        second = tmp_path / "second"
        assert vm.ctl("net", "add", "listen=second").startswith("net1 added, MAC 02:")
        assert second.exists()
        assert set(nics(vm)) == {"net0", "net1"}
        # The MAC is the VM's name's, and another NIC has another.
        assert nics(vm)["net1"]["mac"] != nics(vm)["net0"]["mac"]
        assert vm.ctl("net", "remove", "net0") == "net0 removed\n"
        assert not wire.exists()
        assert set(nics(vm)) == {"net1"}
        assert "no such NIC; there are net1" in vm.ctl("net", "remove", "net0", status=2)
        assert "exists and is no socket" in vm.ctl("net", "add", f"listen={capture}", status=1)
        assert "an fd is of the process" in vm.ctl("net", "add", "fd=3", status=2)
        assert "takes NAME up or NAME down" in vm.ctl("net", "link", "net1", status=2)
        vm.ctl("quit")
        vm.finish()
    assert not second.exists()


@pytest.mark.parametrize("gone", [False, True])
def test_the_loop_does_not_look_at_a_captures_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    """It, or one of the VM's own files, may be on a disk that stands still; and its folder may be gone."""
    looking, go_on = threading.Event(), threading.Event()

    def why_kept(*_arguments: object) -> str:
        looking.set()
        assert go_on.wait(100)
        if gone:
            raise FileNotFoundError
        return "x: kept"

    monkeypatch.setattr(own_files, "why_kept", why_kept)
    guest = Guest(synic="user", vmbus="on", control=str(tmp_path / "control"))
    try:
        guest.start()
        with Vm(tmp_path / "control") as client:
            words = f"listen={tmp_path}/wire,pcap={tmp_path}/x"
            request = {"do": "net", "what": "add", "spec": words, "timeout": 60}
            client._socket.sendall(json.dumps(request).encode() + b"\n")
            assert looking.wait(100)
            guest.io_barrier()
            go_on.set()
            reply = json.loads(client._line(100))
    finally:
        go_on.set()
        guest.close()
    assert (reply["kind"], reply["error"]) == (
        ("guest", FOLDER_GONE) if gone else ("usage", "--net pcap=x: kept")
    )


def test_a_capture_is_of_one_run(tmp_path: Path) -> None:
    """Who goes on from a saved VM would empty what the run has captured that saved it, and may still run."""
    capture, other, file = tmp_path / "wire.pcapng", tmp_path / "other.pcapng", tmp_path / "vm.state"
    words = f"socket={tmp_path / 'nobody'},pcap={capture}"
    with running_vm(tmp_path, *options("--name", "one", "--net", words)) as vm:
        vm.wait_until_listening()
        vm.ctl("save", file, "--end")
        assert vm.finish() == 0
    with capture.open("ab") as more:
        more.write(b"frames")
    before = capture.read_bytes()
    with running_vm(tmp_path, "--restore", file, "--quiet") as vm:
        vm.wait_until_listening()
        assert "pcap" not in nics(vm)["net0"]
        vm.ctl("quit")
        vm.finish()
    again = f"socket={tmp_path / 'nobody'},pcap={other}"
    with running_vm(tmp_path, "--restore", file, "--quiet", "--net", again) as vm:
        vm.wait_until_listening()
        assert nics(vm)["net0"]["pcap"] == str(other)
        vm.ctl("quit")
        vm.finish()
    assert capture.read_bytes() == before


@NO_PASST
def test_ssh_says_which_command_reaches_the_guest(tmp_path: Path) -> None:
    with running_vm(tmp_path, *options("--net", "user", "--ssh")) as vm:
        vm.wait_until_listening()
        said = vm.wait_for("root@127.0.0.1", errors=True)
        port = int(said.split("ssh -p ")[1].split()[0])
        with socket.create_connection(("127.0.0.1", port), timeout=30):
            vm.ctl("quit")
            vm.finish()
    free = free_port(socket.SOCK_STREAM)  # another run of these tests may be under way
    with running_vm(tmp_path, *options("--net", f"user,forward={free}-22", "--ssh")) as vm:
        assert f"ssh -p {free} root@127.0.0.1" in vm.wait_for("root@", errors=True)
        vm.wait_until_listening()
        vm.ctl("quit")
        vm.finish()
    assert "--ssh: leads through the user-mode network; add --net user" in refused("--ssh")


@NO_PASST
def test_a_bad_flag_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = tmp_path / "begun"
    program = tmp_path / "passt"  # says which processes are ours; other tests have passts, too
    program.write_text(f'#!/bin/sh\necho $$ >> {begun}\nexec {shutil.which("passt")} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    wire = tmp_path / "wire"
    text = refused("--net", "user", "--net", f"listen={wire}", "--net", "tap=no-such-tap")
    assert "--net tap=no-such-tap: no such interface" in text
    assert not wire.exists()
    pids = begun.read_text().split()
    assert len(pids) == 2, "one was asked what it knows, one was a NIC's"
    for pid in pids:
        wait_for_end(int(pid))


@needs_taps
def test_a_tap_is_made_with_what_was_asked_for_and_goes_with_its_nic(tmp_path: Path, netns) -> None:
    words = f"create,netns={netns.name},ip=198.51.100.1/24,mtu=9000,queues=3"
    with running_vm(tmp_path, *options("--net", words)) as vm:
        vm.wait_until_listening()
        (shown,) = json.loads(netns.run("ip", "-j", "addr", "show", "hvkvm0"))
        assert shown["mtu"] == 9000
        assert "198.51.100.1" in [address.get("local") for address in shown["addr_info"]]
        (nic,) = vm.json("net", "stats")
        assert nic["wire"]["queues"] == 3
        vm.ctl("net", "add", f"create,netns={netns.name},name=other")
        assert netns.interfaces() == {"lo", "hvkvm0", "other"}
        vm.ctl("net", "remove", "net0")
        assert netns.interfaces() == {"lo", "other"}
        vm.ctl("quit")
        vm.finish()
    assert netns.interfaces() == {"lo"}


def test_what_cannot_be_is_one_line(tmp_path: Path) -> None:
    assert "choose user, create, tap=NAME" in refused("--net", "mac=02:00:00:00:00:01")
    assert "--net fd=77: is not open" in refused("--net", "fd=77")
    assert "no folder /no-such-folder" in refused("--net", "socket=/no-such-folder/wire")
    done = subprocess.run(
        [sys.executable, "-m", "hvkvm", "run", "--kernel", guest_images.image("agent"), "--net", "user"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, "add --vmbus on" in done.stderr) == (2, True)


def test_a_saved_vm_has_its_nics_on_the_wires_that_it_had_or_on_others(tmp_path: Path) -> None:
    saved, wire, other = tmp_path / "saved", tmp_path / "wire", tmp_path / "other"
    with running_vm(tmp_path, *options("--name", "one", "--net", f"listen={wire}")) as vm:
        vm.wait_until_listening()
        before = nics(vm)
        vm.ctl("save", saved)
        vm.ctl("quit")
        vm.finish()
    assert not wire.exists()

    def restored(*more: object) -> dict[str, dict[str, object]]:
        with running_vm(tmp_path, "--restore", saved, "--name", "two", "--quiet", *more) as vm:
            vm.wait_until_listening()
            found = nics(vm)
            assert (wire.exists(), other.exists()) == ("--net" not in more, bool(more))
            vm.ctl("quit")
            vm.finish()
        return found

    assert restored() == before
    assert restored("--net", f"listen={other}") == before
    more = restored("--net", f"listen={other}", "--net", f"socket={wire}")
    assert set(more) == {"net0", "net1"}
    assert more["net0"] == before["net0"]
    for words, why in ((["--net", f"listen={other},mac=02:00:00:00:00:01"], "leave mac= out"),):
        command = command_line("run", "--restore", saved, *words)
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, why in done.stderr) == (2, True), done
    assert not other.exists()


def test_a_nic_that_was_removed_leaves_a_gap_in_the_names_of_a_saved_vm(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    words = [word for name in "ab" for word in ("--net", f"listen={tmp_path / name}")]
    with running_vm(tmp_path, *options("--name", "one", *words)) as vm:
        vm.wait_until_listening()
        vm.ctl("net", "remove", "net0")
        before = nics(vm)
        vm.ctl("save", saved, "--end")
        vm.finish()
    assert set(before) == {"net1"}
    with running_vm(tmp_path, "--restore", saved, "--name", "one", "--quiet") as vm:
        vm.wait_until_listening()
        assert nics(vm) == before
        assert vm.ctl("net", "add", f"listen={tmp_path / 'c'}").startswith("net0 added")
        before = nics(vm)
        vm.ctl("save", saved, "--end")
        vm.finish()
    assert list(before) == ["net1", "net0"]
    with running_vm(tmp_path, "--restore", saved, "--name", "one", "--quiet") as vm:
        vm.wait_until_listening()
        assert list(nics(vm).items()) == list(before.items())
        vm.ctl("quit")
        vm.finish()
