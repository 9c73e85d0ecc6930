"""`hvkvm ctl disk`, from the words typed to the disks of a machine: all that needs no guest."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hvkvm.block.disk import Disk
from hvkvm.block.open_image import open_image
from hvkvm.cli import ctl_disk
from hvkvm.devices.scsi.dvd import DvdDrive
from hvkvm.devices.scsi.faulty import FaultyDisk
from hvkvm.devices.synth.storvsp import Storvsp
from hvkvm.errors import ConfigError
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.control_disks import MOST_OPENING, DiskRequests
from hvkvm.machine.disk_shelf import DiskShelf
from hvkvm.machine.disk_spec import DiskSpec
from hvkvm.runtime.guard import Guard
from hvkvm.runtime.io_loop import IoLoop
from hvkvm.testing.vmbus_loopback import Notes

SECONDS = 60
MIB = 1 << 20


class World:
    """A machine without a guest: its disks, and who asks for them."""

    def __init__(self, folder: Path, stack: ExitStack, *disks: DiskSpec) -> None:
        self.io = IoLoop()
        stack.callback(self.io.stop)
        self.devices: dict[str, Any] = {}
        self.removed: list[str] = []
        config = MachineConfig(folder / "kernel", vmbus="on", disks=disks).validate()
        platform = SimpleNamespace(config=config, io=self.io, memory=None, observer=Notes())
        self.shelf = DiskShelf(platform, self, self, stack)  # type: ignore[arg-type]
        self.saver = SimpleNamespace(busy=False)
        parts = SimpleNamespace(platform=platform, disk_shelf=self.shelf, saver=self.saver)
        self.requests = DiskRequests(parts)  # type: ignore[arg-type]
        self.io.start()

    def add(self, name: str, device: Storvsp) -> Storvsp:
        self.devices[name] = SimpleNamespace(device=device)
        return device

    def add_nvme(self, _disk: Disk, _image: object, *, name: str, serial: str) -> tuple[int, Any]:
        """As PCI plugs one in."""
        return 3, SimpleNamespace(guard=Guard(), inspect=lambda: {"name": name, "serial": serial})

    def remove(self, name: str, done: Any) -> None:
        del self.devices[name]
        self.removed.append(name)
        done()

    def ask(self, **request: Any) -> Any:
        """What is answered; an error as its text."""
        heard: list[Any] = []
        event = threading.Event()

        class Answer:
            wanted = True

            def ok(self, result: object = None) -> None:
                heard.append(json.loads(json.dumps(result)))
                event.set()

            def fail(self, kind: str, text: str) -> None:
                heard.append(f"{kind}: {text}")
                event.set()

        def run() -> None:
            try:
                self.requests(request, Answer())  # type: ignore[arg-type]
            except ValueError as error:
                Answer().fail("usage", str(error))

        self.io.call_soon(run)
        assert event.wait(SECONDS)
        return heard[0]

    def typed(self, *words: str, cdrom: bool = False, force: bool = False) -> str:
        """As typed behind `hvkvm ctl disk`; what it prints."""
        what, *rest = words
        result = self.ask(**ctl_disk.request(what, rest, cdrom=cdrom, force=force))
        return result if isinstance(result, str) else ctl_disk.text(what, result)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.chdir(tmp_path)
    for name in ("kernel", "a.raw", "b.raw", "c.iso"):
        (tmp_path / name).write_bytes(bytes(1 << 16))
    with ExitStack() as stack:
        yield World(tmp_path, stack)


def test_disks_come_and_go(world: World, tmp_path: Path) -> None:
    assert world.typed("list") == "the VM has no disks"
    assert world.shelf.disks is None  # nothing was made for looking
    assert world.typed("add", "a.raw") == "disk0: controller 0, LUN 0"
    assert world.typed("add", "b.raw,readonly=on,controller=2,lun=5") == "disk1: controller 2, LUN 5"
    assert world.typed("list").splitlines() == [
        "NAME   CONTROLLER  LUN  SIZE    FORMAT          FILE",
        f"disk0  0           0    64 KiB  raw             {tmp_path}/a.raw",
        f"disk1  2           5    64 KiB  raw, read-only  {tmp_path}/b.raw",
    ]
    assert "is gone" in world.typed("remove", "disk0")
    assert world.typed("add", "a.raw") == "disk0: controller 0, LUN 0"  # its image was let go


def test_disks_on_pci_are_told_of_and_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("kernel", "a.raw", "b.raw"):
        (tmp_path / name).write_bytes(bytes(1 << 16))
    with ExitStack() as stack:
        both = World(tmp_path, stack, DiskSpec("b.raw", bus="nvme"), DiskSpec("a.raw"))
        assert both.typed("list").splitlines() == [
            "NAME   CONTROLLER  LUN  SIZE    FORMAT  FILE",
            "disk0  0           0    64 KiB  raw     a.raw",
            "nvme0  PCI slot 3  -    64 KiB  raw     b.raw",
        ]
        assert list(both.ask(what="stats")) == ["disk0", "nvme0"]
        assert both.ask(what="stats", name="nvme0")["nvme0"]["serial"] == "hvkvm-nvme0"
        for words in (("remove", "nvme0"), ("resize", "nvme0", "1G"), ("eject", "nvme0")):
            assert both.typed(*words).startswith("guest: nvme0: a disk on PCI stays as it is")
        assert "there are disk0, nvme0" in both.typed("remove", "disk7")


def test_resize(world: World, tmp_path: Path) -> None:
    world.typed("add", "a.raw")
    assert world.typed("resize", "disk0", "1G") == "disk0 has 1 GiB now"
    assert (tmp_path / "a.raw").stat().st_size == 1 << 30
    assert "not a multiple of 512" in world.ask(what="resize", name="disk0", size=1000)
    (tmp_path / "a.raw").write_bytes(b"kept" * (1 << 14))  # and shorter, by somebody else
    assert world.typed("resize", "disk0", "64K") == "disk0 has 64 KiB now"
    assert "has 65536, and a disk cannot become smaller" in world.typed("resize", "disk0", "60K")
    assert (tmp_path / "a.raw").read_bytes() == b"kept" * (1 << 14)
    assert world.typed("resize", "disk0", "1G") == "disk0 has 1 GiB now"
    for size in (0, -1, 1 << 63, True, "1G", None):
        assert world.ask(what="resize", name="disk0", size=size).startswith("usage: ")
    world.saver.busy = True
    assert world.typed("resize", "disk0", "2G").startswith("busy: disk0 keeps its size while the VM is being")
    assert (tmp_path / "a.raw").stat().st_size == 1 << 30


def test_a_drive_is_told_without_the_medium_that_was_taken_out(world: World, tmp_path: Path) -> None:
    """It still had the file, for programs that ask, and `save` refused to replace that."""
    iso = str(tmp_path / "c.iso")
    assert "cdrom0" in world.typed("add", iso, cdrom=True)
    for force, file in ((None, iso), (True, ""), (False, "")):
        if force is not None:
            assert world.typed("eject", "cdrom0", force=force) == "cdrom0 is empty"
        assert [row["file"] for row in world.ask(what="list")] == [file]
        assert [one.file for one in world.shelf.specs] == [file]
        assert world.ask(what="stats")["cdrom0"]["file"] == file


def test_a_controller_that_is_full_says_so(world: World) -> None:
    for _ in range(64):
        world.typed("add", "none", cdrom=True)
    full = "controller=0: all of its 64 LUNs are taken; choose another place"
    assert world.typed("add", "none", cdrom=True) == f"guest: --cdrom none: {full}"
    assert world.typed("add", "a.raw").endswith(f"a.raw: {full}")
    assert "controller 1, LUN 0" in world.typed("add", "a.raw,controller=1")


def test_who_gives_up_gets_no_disk(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """An NBD server may take long: whoever was told so would find a disk later that is not there."""
    world.typed("add", "none", cdrom=True)
    opened, go = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        image = open_image(*arguments)
        opened.set()
        go.wait(SECONDS)
        return image

    monkeypatch.setattr("hvkvm.machine.disks.open_image", slow)
    gave_up = SimpleNamespace(wanted=False)
    for asked in (("add", ["a.raw"]), ("insert", ["cdrom0", "c.iso"])):
        opened.clear()
        go.clear()
        request = ctl_disk.request(*asked, cdrom=False, force=False)
        world.io.call_soon(world.requests, request, gave_up)
        assert opened.wait(SECONDS)
        go.set()
        while world.requests._opening:
            threading.Event().wait(0.01)
    assert [row["file"] for row in world.ask(what="list")] == [""]
    assert world.typed("add", "a.raw") == "disk0: controller 0, LUN 1", "nobody holds its lock"


def test_media(world: World, tmp_path: Path) -> None:
    assert world.typed("add", "none", cdrom=True) == "cdrom0: controller 0, LUN 0"
    assert "no medium" in world.typed("list")
    assert world.typed("insert", "cdrom0", "c.iso") == f"cdrom0 has {tmp_path}/c.iso"
    assert "eject it first" in world.typed("insert", "cdrom0", "c.iso")
    assert world.shelf.disks is not None
    drive = world.shelf.disks.attached["cdrom0"].unit
    assert isinstance(drive, DvdDrive)
    drive.locked = True
    assert world.typed("eject", "cdrom0").startswith("guest: the guest has locked the medium")
    assert world.typed("eject", "cdrom0", force=True) == "cdrom0 is empty"
    assert world.typed("insert", "cdrom0", "a.raw") == f"cdrom0 has {tmp_path}/a.raw"


def test_an_image_that_the_vm_has(world: World, tmp_path: Path) -> None:
    """It names the disk, not another program; two that only read share it."""
    (tmp_path / "link").symlink_to("a.raw")
    world.typed("add", "a.raw,readonly=on")
    assert world.typed("add", "link,snapshot=on") == "disk1: controller 0, LUN 1"
    assert world.typed("add", "none", cdrom=True) == "cdrom0: controller 0, LUN 2"
    assert world.typed("insert", "cdrom0", "a.raw") == f"cdrom0 has {tmp_path}/a.raw"
    assert world.typed("add", "link").startswith(f"guest: {tmp_path}/link: disk0 has it; remove that first")
    world.typed("add", "b.raw")
    assert "is empty" in world.typed("eject", "cdrom0")
    assert world.typed("insert", "cdrom0", "b.raw").startswith(f"guest: {tmp_path}/b.raw: disk2 has it; ")


def test_stats(world: World) -> None:
    world.typed("add", "a.raw")
    found = world.ask(what="stats", name="disk0")
    assert found["disk0"]["operations"]["read"] == {"requests": 0, "bytes": 0, "failed": 0, "seconds": 0.0}
    assert "read" in world.typed("stats")


def test_faults_and_a_rescinded_controller(world: World, tmp_path: Path) -> None:
    (tmp_path / "faults.toml").write_text('[[fault]]\ndo = "busy"\n')
    assert world.typed("add", "a.raw,faults=faults.toml") == "disk0: controller 0, LUN 0"
    assert world.shelf.disks is not None
    assert isinstance(world.shelf.disks.attached["disk0"].unit, FaultyDisk)
    stats = world.ask(what="stats")["disk0"]
    assert stats["faults"]["rules"] == [{"action": "busy", "met": 0, "faults": 0}]
    done = threading.Event()
    disks = world.shelf.disks

    def rescind() -> None:
        disks.rescind(0)
        disks.rescind(0)
        done.set()

    world.io.call_soon(rescind)
    assert done.wait(SECONDS)
    assert world.removed == ["scsi0"]
    assert world.typed("list") == "the VM has no disks"
    assert world.typed("add", "b.raw") == "disk0: controller 0, LUN 0"  # a new controller


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("remove", "disk7"), "usage: disk7: no such disk; there are disk0"),
        (("add", "none.raw"), "disk add file=none.raw: no such file"),
        (("add", "b.raw,format=qcow2"), "disk add format=qcow2: unknown; choose"),
        (("add", "b.raw,lun=0"), "choose another place"),
        (("add", "a.raw"), "a.raw: disk0 has it; remove that first, or give each readonly=on or snapshot=on"),
        (("add", "a.raw,readonly=on"), "a.raw: disk0 has it; remove that first"),
        (("add", "b.raw,bus=nvme"), "a disk on PCI cannot come while the VM runs; leave out bus=nvme"),
        (("resize", "disk0"), "disk resize: takes NAME SIZE"),
        (("resize", "disk0", "big"), "SIZE big: not a size"),
        (("eject", "disk0"), "disk0 is a disk"),
        (("insert", "disk0", "c.iso"), "disk0 is a disk"),
        (("list", "x"), "disk list: takes nothing more"),
        (("stats", "x", "y"), "disk stats: takes nothing more, or a NAME"),
    ],
)
def test_what_cannot_be_is_one_line(world: World, words: tuple[str, ...], said: str) -> None:
    world.typed("add", "a.raw")
    try:
        line = world.typed(*words)
    except ConfigError as error:
        line = str(error)
    assert said in line
    assert "\n" not in line
    assert world.typed("list").count("\n") == 1


@pytest.mark.parametrize(
    "request_",
    [
        {"what": "explode"},
        {},
        {"what": "add"},
        {"what": "add", "kind": "disk"},
        {"what": "add", "kind": "tape", "spec": {"file": "/x"}},
        {"what": "add", "kind": "disk", "spec": {"file": 3}},
        {"what": "add", "kind": "disk", "spec": {"file": "/x", "odd": 1}},
        {"what": "add", "kind": "disk", "spec": {}},
        {"what": "add", "kind": "disk", "spec": {"file": ""}},
        {"what": "add", "kind": "cdrom", "spec": {"file": "/none", "lun": 3.5}},
        {"what": "insert", "name": "disk0"},
        {"what": "eject", "name": "disk0", "force": "yes"},
        {"what": "remove", "name": ["x"]},
        {"what": "stats", "name": "\x1b"},
    ],
)
def test_clients_mistakes_are_answered(world: World, request_: dict[str, Any]) -> None:
    answer = world.ask(**request_)
    assert isinstance(answer, str)
    assert answer.startswith(("usage: ", "guest: "))


def test_an_image_that_fails_to_open_in_any_way_is_answered(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More often than may be opened at once: none counts as being opened any more."""

    def fail(*_arguments: object) -> None:
        raise MemoryError("no more")

    assert world.shelf.disks is not None or world.typed("add", "a.raw")
    disks: Any = world.shelf.disks
    monkeypatch.setattr(disks, "open", fail)
    for _ in range(MOST_OPENING + 2):
        assert world.typed("add", "b.raw") == "guest: MemoryError: no more"


def test_a_flush_of_all_tells_of_each_that_fails(world: World) -> None:
    """A save that is told that all is well would be of a machine whose disks are not."""

    def disks(why: str) -> Any:
        return SimpleNamespace(flush=lambda done: done(why))

    for on_vmbus, on_pci in (("", ""), ("disk0: broken", ""), ("", "nvme0: broken")):
        world.shelf.disks, world.shelf.pci_disks = disks(on_vmbus), disks(on_pci)
        told: list[str] = []
        world.shelf.flush(told.append)
        assert told == [on_vmbus or on_pci]
    world.shelf.disks = world.shelf.pci_disks = None


@pytest.mark.parametrize("spec", [{"file": "/a.raw", "colour": "red"}, {"file": "/a.raw", "lun": -2}, {}])
def test_a_disk_that_is_described_wrongly_is_a_mistake_of_the_client(world: World, spec: Any) -> None:
    assert world.ask(what="add", kind="disk", spec=spec).startswith("usage: ")


def test_a_vm_without_a_bus_for_disks_says_so(world: World) -> None:
    world.requests._parts.disk_shelf = None
    assert world.ask(request="disk", what="list").startswith("absent: this VM has no bus for disks")
