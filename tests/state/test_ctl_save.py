"""`hvkvm ctl save` and `hvkvm run --restore` as a user has them, and files that were tampered with."""

from __future__ import annotations

import json
import os
import random
import re
import stat
import threading
from pathlib import Path
from typing import Any

import guest_images
import pytest
from guest_machine import Guest
from running_vm import command_line, environment, running_vm
from saved_file import rewrite

from hvkvm.block.vhdx.create import VhdxOptions, create_vhdx
from hvkvm.cli.ctl_client import Vm
from hvkvm.errors import StateError
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.machine import Machine
from hvkvm.runtime.io_loop import IoLoop
from hvkvm.state.file import RAM_OFFSET, Writer

pytestmark = pytest.mark.kvm

SOAK = bool(os.environ.get("HVKVM_SOAK"))
TIMEOUT = 77
AGENT = ("--kernel", guest_images.image("agent"), "--memory", "64M", "--synic", "user", "--quiet")


def test_a_vm_is_saved_and_goes_on_in_another_process(tmp_path: Path) -> None:
    file = tmp_path / "vm.state"
    with running_vm(tmp_path, *AGENT, "--vmbus", "on", "--name", "first") as vm:
        vm.wait_until_listening()
        assert vm.ctl("save", file) == f"saved to {file}\n"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert file.stat().st_blocks * 512 < 8 << 20, "RAM that is zero takes no room"
        with running_vm(tmp_path, "--restore", file, "--quiet", "--name", "second") as other:
            while len(other.json("list")) < 2:
                assert other.process.poll() is None, other.report()
            info = other.json("--vm", "second", "info")
            assert info["outcome"] is None
            assert (info["config"]["memory"], info["config"]["vmbus"]) == (64 << 20, "on")
            again = tmp_path / "again.state"
            answer = other.json("--vm", "second", "save", again)
            assert answer == {"file": str(again), "bytes": again.stat().st_size}
            other.ctl("--vm", "second", "quit")
            assert other.finish() == 130
        assert vm.process.poll() is None, "the one that was saved runs on"
        assert "No such file" in vm.ctl("save", tmp_path / "no" / "folder", status=1)
        os.mkfifo(tmp_path / "fifo")
        for name in ("fifo", "hvkvm"):
            assert "is not a regular file" in vm.ctl("save", tmp_path / name, status=1)
        assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
        assert os.listdir(tmp_path / "hvkvm") == ["first.sock"]
        vm.ctl("quit")


def test_a_save_takes_no_place_of_what_the_vm_has(tmp_path: Path) -> None:
    """A save is a new file under its name: the guest's disk would be gone when the VM ends."""
    disk, more = tmp_path / "disk.raw", tmp_path / "more.raw"
    parent, child = tmp_path / "parent.vhdx", tmp_path / "child.vhdx"
    create_vhdx(parent, VhdxOptions(1 << 20))
    create_vhdx(child, VhdxOptions(0, parent=parent))
    before = parent.read_bytes()
    for image in (disk, more):
        image.write_bytes(b"data" * (1 << 14))
    made = ("--record", tmp_path / "recording")
    with running_vm(tmp_path, *AGENT, "--vmbus", "on", "--disk", disk, *made) as vm:
        vm.wait_until_listening()
        vm.ctl("disk", "add", more)
        vm.ctl("disk", "add", child)
        assert "is the image of a disk that is in use; name another" in vm.ctl("save", parent, status=1)
        for name, flag in (("disk.raw", "--disk"), ("more.raw", "--disk"), ("recording", "--record")):
            error = vm.ctl("save", tmp_path / name, "--end", status=1)
            assert f"{name}: this VM has it as {flag}, whose content would be lost; name another" in error
        assert "this VM has it as --disk, " in vm.ctl("net", "add", f"listen=wire,pcap={disk}", status=2)
        assert vm.json("net", "list") == []
        vm.ctl("save", tmp_path / "vm.state", "--end")
        assert vm.finish() == 0
    assert parent.read_bytes() == before
    for image in (disk, more):
        assert image.read_bytes() == b"data" * (1 << 14)


@pytest.mark.parametrize("how", ["expired", "left"])
def test_a_save_that_nobody_waits_for_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Who was told that there is no answer had the old file replaced, and with --end the VM gone."""
    (tmp_path / "saved").write_text("of yesterday")
    writing, go_on = threading.Event(), threading.Event()
    real = Writer.write_ram

    def write_ram(writer: Writer, offset: int, data: bytes) -> None:
        writing.set()
        assert go_on.wait(100)
        real(writer, offset, data)

    # A real time-out might pass before anything is written.
    expiring: list[tuple[Any, ...]] = []
    later = IoLoop.call_later

    def call_later(loop: IoLoop, seconds: float, *what: Any) -> Any:
        if seconds == TIMEOUT:
            expiring.append(what)
        return later(loop, seconds, *what)

    monkeypatch.setattr(Writer, "write_ram", write_ram)
    monkeypatch.setattr(IoLoop, "call_later", call_later)
    guest = Guest(synic="user", control=str(tmp_path / "control"))
    try:
        guest.start()
        request = {"do": "save", "file": f"{tmp_path}/saved", "end": True, "timeout": TIMEOUT}
        with Vm(tmp_path / "control") as client:
            client._socket.sendall(json.dumps(request).encode() + b"\n")
            assert writing.wait(100)
            if how == "expired":
                assert len(expiring) == 1
                guest.machine.platform.io.call_soon(*expiring[0])
                assert "no answer within" in json.loads(client._line(100))["error"]
        guest.io_barrier()
        go_on.set()
        guest.until(lambda: not guest.machine.parts.saver.busy, "the save ends")
        guest[0].do("NOP")
        assert guest.machine.outcome is None
    finally:
        go_on.set()
        guest.close()
    assert (tmp_path / "saved").read_text() == "of yesterday"
    assert not list(tmp_path.glob(".*"))


def test_a_vm_whose_disks_have_all_gone_goes_on(tmp_path: Path) -> None:
    """The controllers that they were on are still its guest's."""
    file, image = tmp_path / "vm.state", tmp_path / "disk.raw"
    image.write_bytes(bytes(1 << 16))
    with running_vm(tmp_path, *AGENT, "--vmbus", "on", "--name", "first") as vm:
        vm.wait_until_listening()
        for place in ("controller=0", "controller=2"):
            vm.ctl("disk", "add", f"{image},{place}")
            vm.ctl("disk", "remove", "disk0")
        vm.ctl("save", file, "--end")
        vm.finish()
    with running_vm(tmp_path, "--restore", file, "--quiet", "--name", "first") as vm:
        vm.wait_until_listening()
        assert vm.json("disk", "list") == []
        inspected = vm.ctl("inspect")
        assert [f"scsi{index}" in inspected for index in range(3)] == [True, False, True]
        vm.ctl("quit")
        vm.finish()


def test_a_vm_whose_first_disk_has_gone_has_the_others_by_their_names(tmp_path: Path) -> None:
    """A script that knows a disk by its name means another one else."""
    file, on_pci = tmp_path / "vm.state", tmp_path / "nvme.raw"
    images = [tmp_path / f"{number}.raw" for number in range(3)]
    for image in (*images, on_pci):
        image.write_bytes(bytes(1 << 16))
    disks = [words for image in images for words in ("--disk", image)]
    with running_vm(
        tmp_path, *AGENT, "--vmbus", "on", *disks, "--disk", f"{on_pci},bus=nvme", "--name", "first"
    ) as vm:
        vm.wait_until_listening()
        vm.ctl("disk", "remove", "disk0")
        listed = vm.ctl("disk", "list")
        assert [line.split()[0] for line in listed.splitlines()] == ["NAME", "disk1", "disk2", "nvme0"]
        vm.ctl("save", file, "--end")
        vm.finish()
    with running_vm(tmp_path, "--restore", file, "--quiet", "--name", "first") as vm:
        vm.wait_until_listening()
        assert vm.ctl("disk", "list") == listed
        vm.ctl("disk", "remove", "disk1")
        assert vm.ctl("disk", "add", images[1]).startswith("disk0: ")
        vm.ctl("quit")
        vm.finish()


def test_a_vm_with_a_disk_is_saved_and_ends_in_that_moment(tmp_path: Path) -> None:
    file, image = tmp_path / "vm.state", tmp_path / "disk.raw"
    image.write_bytes(bytes(1 << 16))
    disk = ("--vmbus", "on", "--disk", f"{image},serial=mine,lun=3", "--cdrom", "none")
    with running_vm(tmp_path, *AGENT, *disk, "--name", "first") as vm:
        vm.wait_until_listening()
        with running_vm(tmp_path, *AGENT, "--vmbus", "on", "--disk", image) as other:
            assert other.finish() == 2
            assert "another program uses it" in other.report()
        assert vm.ctl("save", file, "--end") == f"saved to {file}\n"
        assert vm.finish() == 0
    with running_vm(tmp_path, "--restore", file, "--quiet", "--name", "second") as again:
        again.wait_until_listening()
        units = again.json("inspect")["devices"]["scsi0"]["units"]
        assert units["0:3"]["serial"] == "mine"
        assert units["0:0"]["kind"] == "dvd"
        again.ctl("quit")
    image.write_bytes(bytes(1 << 12))
    with running_vm(tmp_path, "--restore", file, "--quiet") as other:
        assert other.finish() == 2
        assert "4096 bytes, and 65536 when the VM was saved" in other.report()
    image.unlink()
    with running_vm(tmp_path, "--restore", file, "--quiet") as other:
        assert other.finish() == 2
        assert "no such file" in other.report()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--restore", "MISSING"), "no such file"),
        (("--restore", "/dev/null"), "not a saved VM"),
        (("--restore", "FILE", "--cpus", "2"), "the file decides --cpus; leave it out"),
        (("--restore", "FILE", "--kernel", "x"), "the file decides --kernel"),
        (("--restore", "FILE", "--", "true"), "goes on where it was saved"),
    ],
)
def test_a_wrong_restore_gets_one_line(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    import subprocess

    file = tmp_path / "some"
    file.write_bytes(b"no state")
    names = {"FILE": str(file), "MISSING": str(tmp_path / "missing")}
    line = command_line("run", *(names.get(word, word) for word in arguments))
    result = subprocess.run(
        line, capture_output=True, text=True, env=environment(tmp_path), check=False, timeout=100
    )
    assert result.returncode == 2, result
    assert result.stderr.count("\n") == 1
    assert words in result.stderr
    assert result.stdout == ""


def saved_agent(tmp_path: Path) -> Path:
    file = tmp_path / "vm"
    config = MachineConfig(
        kernel=guest_images.image("agent"), memory=64 << 20, synic="user", vmbus="on", hv="host-model", cpus=2
    )
    with Machine(config) as machine:
        machine.start()
        machine.save(file)
    return file


def test_variables_that_nobody_would_have_are_refused(tmp_path: Path) -> None:
    file, variables = saved_agent(tmp_path), tmp_path / "vars"
    with pytest.raises(StateError, match=r"--firmware-vars .*: it was saved without firmware; leave it out"):
        Machine(MachineConfig(restore=file, firmware_vars=variables))
    assert not variables.exists()


def test_a_host_that_lacks_what_the_cpu_had_names_it(tmp_path: Path) -> None:
    file = saved_agent(tmp_path)

    def more(tree: Any) -> None:
        import base64

        for vcpu in tree["parts"]["vCPUs"]["vcpus"]:
            raw = bytearray(base64.b64decode(vcpu["cpuid"]))
            for at in range(0, len(raw), 40):
                if int.from_bytes(raw[at : at + 4], "little") == 0x80000001:
                    raw[at + 20 + 0 : at + 24] = b"\xff\xff\xff\xff"  # ECX: all that AMD ever named there
            vcpu["cpuid"] = base64.b64encode(raw).decode()

    rewrite(file, more)
    with pytest.raises(StateError, match=r"this host cannot show the guest what its CPU had: .*svm"):
        Machine(MachineConfig(kernel=file, restore=file)).close()


def places(tree: Any) -> list[tuple[Any, Any]]:
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    return [(tree, key) for key in keys] + [place for key in keys for place in places(tree[key])]


def test_a_made_up_file_is_refused_in_one_line_or_runs(tmp_path: Path) -> None:
    """Values replaced anywhere in the manifest: no traceback, no machine half made, nothing left open."""
    random_ = random.Random(3)
    values: list[Any] = [
        0,
        1,
        -1,
        255,
        4096,
        1 << 31,
        (1 << 64) - 1,
        1 << 70,
        None,
        True,
        "",
        "AAAA",
        "x" * 300,
        [],
        {},
    ]
    file = saved_agent(tmp_path)
    whole = file.read_bytes()
    refused = 0
    fds = len(os.listdir("/proc/self/fd"))
    for _ in range(3000 if SOAK else 24):
        file.write_bytes(b"")  # a new file for each: the last may still be mapped
        file.unlink()
        with open(file, "wb") as out:
            out.write(whole[:4096])
            out.seek(RAM_OFFSET)
            out.write(whole[RAM_OFFSET:])

        def change(tree: Any) -> None:
            for _ in range(random_.randint(1, 2)):
                container, key = random_.choice(places(tree["parts"]))
                container[key] = random_.choice(values)

        rewrite(file, change)
        try:
            with Machine(MachineConfig(kernel=file, restore=file, timeout=0.2)) as machine:
                machine.run()
        except StateError as error:
            refused += 1
            assert "\n" not in str(error)
            assert re.match(rf"{re.escape(str(file))}|vCPUs|board|VMBus|Hyper-V interface", str(error)), error
    assert refused > 5
    assert len(os.listdir("/proc/self/fd")) == fds
