"""`--disk` and `--cdrom`: what they say, what is refused, and what a saved machine says of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from errno import EIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hvkvm.block.raw import RawImage
from hvkvm.block.request import Status
from hvkvm.cli import ctl_disk
from hvkvm.cli.run import config_from
from hvkvm.devices.synth.storvsp import Storvsp
from hvkvm.errors import ConfigError, StateError
from hvkvm.machine.attached import Attached
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.disk_spec import CdromSpec, DiskSpec
from hvkvm.machine.disks import Disks
from hvkvm.machine.saved_disks import saved_disk, specs_of
from hvkvm.runtime.io_loop import IoLoop
from hvkvm.state.manifest import SavedDisk
from hvkvm.testing.vmbus_loopback import Notes

SECONDS = 60


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("kernel", "a.raw", "b.raw", "c.iso"):
        (tmp_path / name).write_bytes(bytes(1 << 16))
    return tmp_path


class World:
    """A machine's disks on a real loop, and a bus that only notes its devices."""

    def __init__(
        self,
        folder: Path,
        stack: ExitStack,
        disks: tuple[DiskSpec, ...],
        saved: tuple[SavedDisk, ...] = (),
        **more: Any,
    ) -> None:
        self.io = IoLoop()
        stack.callback(self.io.stop)
        self.notes = Notes()
        config = MachineConfig(folder / "kernel", vmbus="on", cpus=2, disks=disks, **more).validate()
        self.devices: dict[str, Any] = {}
        platform = SimpleNamespace(config=config, io=self.io, memory=None, observer=self.notes)
        self.disks = Disks(platform, self, stack, saved)  # type: ignore[arg-type]

    def add(self, name: str, device: Storvsp) -> Storvsp:
        self.devices[name] = SimpleNamespace(device=device)
        return device

    def remove(self, name: str, done: Callable[[], object]) -> None:
        del self.devices[name]
        done()

    def wait(self, begin: Callable[..., object]) -> list[Any]:
        """Call `begin(done)` on the loop; what `done` was called with."""
        heard: list[Any] = []
        event = threading.Event()

        def done(*arguments: Any) -> None:
            heard.extend(arguments)
            event.set()

        if self.io.state == "not started":
            self.io.start()
        self.io.call_soon(begin, done)
        assert event.wait(SECONDS)
        return heard


@pytest.fixture
def make(folder: Path) -> Iterator[Callable[..., World]]:
    with ExitStack() as stack:
        yield lambda *disks, **more: World(folder, stack, disks, **more)


def test_what_a_command_line_says(folder: Path) -> None:
    kernel = str(folder / "kernel")
    a, b, iso = (str(folder / name) for name in ("a.raw", "b.raw", "c.iso"))
    disks = ["--disk", f"{a},readonly,serial=abc,lun=3", "--disk", b]
    cdroms = ["--cdrom", iso, "--cdrom", "none,controller=2"]
    config, _options = config_from(["--kernel", kernel, "--vmbus", "on", *disks, *cdroms])
    assert config.disks == (DiskSpec(a, readonly=True, serial="abc", lun=3), DiskSpec(b))
    assert config.cdroms == (CdromSpec(iso), CdromSpec("", controller=2))


def test_what_a_toml_file_says(folder: Path) -> None:
    file = folder / "machine.toml"
    file.write_text(
        'kernel = "kernel"\nvmbus = "on"\n'
        'disks = ["a.raw,snapshot=on", {file = "b.raw", format = "raw", sector = "4096"}]\n'
        'cdroms = [{file = "c.iso"}]\n'
    )
    config = MachineConfig.from_toml(file)
    assert config.disks[0] == DiskSpec(str(folder / "a.raw"), snapshot=True)
    assert config.disks[1].options.sector_size == 4096
    assert config.cdroms[0].file == str(folder / "c.iso")


def test_a_servers_socket_is_named_from_the_folder_it_was_said_in(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As files are: a machine restored elsewhere, or a TOML file read from elsewhere, found nobody there."""
    monkeypatch.chdir(folder)
    file = folder / "machine.toml"
    named = "nbd:unix:q.sock:exportname=a/b"
    file.write_text(f'kernel = "kernel"\nvmbus = "on"\ndisks = ["{named}", "nbd:host:1"]\n')
    wanted = f"nbd:unix:{folder}/q.sock:exportname=a/b"
    assert [one.file for one in MachineConfig.from_toml(file).disks] == [wanted, "nbd:host:1"]
    assert ctl_disk.request("add", ["nbd:unix:q.sock"], cdrom=False, force=False)["spec"] == {
        "file": f"nbd:unix:{folder}/q.sock"
    }
    image = SimpleNamespace(format="nbd", read_only=False)
    unit = SimpleNamespace(image=image, size=0)
    for said, kept in (
        (named, wanted),
        ("nbd:host:1", "nbd:host:1"),
        ("nbd:unix:" + "x" * 100, "nbd:unix:" + "x" * 100),  # too long a name of a socket elsewhere
    ):
        one: Any = Attached("nvme0", DiskSpec(said), 2, 0, unit, "nvme", unit)  # type: ignore[arg-type]
        assert saved_disk(one).file == kept


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("nothing.raw", "no such file"),
        ("a.raw,format=qcow2", "--disk format=qcow2: unknown; choose"),
        ("a.raw,cache=maybe", "--disk cache=maybe: unknown; choose"),
        ("a.raw,sector=520", "--disk sector=520: unknown; choose"),
        ("a.raw,lun=64", "there are LUNs 0 to 63"),
        ("a.raw,controller=-1", "there are controllers 0 to 63"),
        (f"a.raw,serial={'x' * 21}", "no serial number"),
        ("a.raw,colour=red", "no key colour"),
    ],
)
def test_what_cannot_be_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, why: str
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match="--disk") as caught:
        config_from(["--kernel", "kernel", "--vmbus", "on", "--disk", text])
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        ("--disk a.raw --disk a.raw", "--disk a.raw"),
        ("--disk a.raw --disk ./b.raw --disk link", "--disk link"),
        ("--disk a.raw,readonly=on --disk a.raw,bus=nvme", "--disk a.raw"),
        ("--disk c.iso --cdrom c.iso", "--cdrom c.iso"),
        ("--disk a.raw,readonly=on --disk a.raw,snapshot=on --cdrom a.raw --cdrom none", ""),
        ("--disk nbd:unix:x --disk nbd:unix:x", ""),
    ],
)
def test_an_image_that_is_given_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, words: str, refused: str
) -> None:
    monkeypatch.chdir(folder)
    (folder / "link").symlink_to("a.raw")
    arguments = ["--kernel", "kernel", "--vmbus", "on", *words.split()]
    if refused:
        with pytest.raises(ConfigError, match=f"^{refused}: given twice; leave one out, or give each"):
            config_from(arguments)
    else:
        config_from(arguments)


def test_many_images_are_looked_at_once_each(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each was compared with every other by name, which looks at both: 4,032 times with 64 disks."""
    seen: list[str] = []
    real = os.stat

    def noted(path: Any, *more: Any, **named: Any) -> os.stat_result:
        if str(path).endswith(".many"):
            seen.append(str(path))
        return real(path, *more, **named)

    files = [folder / f"{number}.many" for number in range(24)]
    for file in files:
        file.write_bytes(bytes(512))
    config = MachineConfig(
        kernel=folder / "kernel", vmbus="on", disks=tuple(DiskSpec(str(file)) for file in files)
    )
    monkeypatch.setattr(os, "stat", noted)
    config.validate()
    assert len(seen) <= 4 * len(files)


def test_a_server_that_is_not_there_is_named_with_its_flag(folder: Path, make: Callable[..., World]) -> None:
    with pytest.raises(ConfigError, match=r"^--disk nbd:unix:.*/no: No such file .*; is the server running"):
        make(DiskSpec(f"nbd:unix:{folder}/no"))


def test_an_image_without_a_byte_is_no_disk(folder: Path, make: Callable[..., World]) -> None:
    """Its guest's first READ CAPACITY would end the controller, with all other disks on it."""
    (folder / "empty").touch()
    for snapshot in (False, True):
        with pytest.raises(ConfigError, match=r"^--disk .*empty: it has no bytes; truncate -s SIZE"):
            make(DiskSpec(str(folder / "empty"), snapshot=snapshot))


def test_disks_need_the_bus(folder: Path) -> None:
    with pytest.raises(ConfigError, match="needs the VMBus host that carries it; add --vmbus on"):
        MachineConfig(folder / "kernel", disks=(DiskSpec(str(folder / "a.raw")),)).validate()


def test_units_have_their_places(folder: Path, make: Callable[..., World]) -> None:
    a, b, iso = (str(folder / name) for name in ("a.raw", "b.raw", "c.iso"))
    world = make(DiskSpec(a, lun=1), DiskSpec(b, controller=3), cdroms=(CdromSpec(iso), CdromSpec("")))
    placed = {name: (one.controller, one.lun) for name, one in world.disks.attached.items()}
    assert placed == {"disk0": (0, 1), "disk1": (3, 0), "cdrom0": (0, 0), "cdrom1": (0, 2)}
    assert list(world.devices) == ["scsi0", "scsi3"]
    assert world.disks.inspect()["disk1"]["serial"] == "hvkvm-3-0"
    instances = {device.device.offer.instance for device in world.devices.values()}
    assert len(instances) == 2


def test_a_place_that_is_taken_and_an_image_in_use(folder: Path, make: Callable[..., World]) -> None:
    a, b = (DiskSpec(str(folder / name), lun=1) for name in ("a.raw", "b.raw"))
    with pytest.raises(ConfigError, match=r"--disk .*b.raw: controller=0,lun=1: target 0 has a LUN 1"):
        make(a, b)
    with pytest.raises(ConfigError, match=r"a.raw: another program uses it"):
        make(a)  # the machine before this one has it


def test_the_end_closes_and_flushes(folder: Path, make: Callable[..., World]) -> None:
    world = make(DiskSpec(str(folder / "a.raw")), DiskSpec(str(folder / "b.raw"), readonly=True))
    world.wait(world.disks.end)
    make(DiskSpec(str(folder / "a.raw")))  # nobody has it open any more
    assert world.notes.events == []


def test_what_cannot_be_made_stable_is_told(
    folder: Path, make: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a flush, which a save needs, to who asked for it; at the end, to the user."""
    flushed: list[str] = []

    def flush(image: RawImage) -> None:
        flushed.append(image.file.path.name)
        if image.file.path.name == "a.raw":
            raise OSError(EIO, "Input/output error")

    monkeypatch.setattr(RawImage, "flush", flush)
    world = make(*(DiskSpec(str(folder / name)) for name in ("a.raw", "b.raw")))
    (why,) = world.wait(world.disks.flush)
    assert why == f"disk0: {Status.ERROR.value}: Input/output error"
    assert sorted(flushed) == ["a.raw", "b.raw"]
    world.wait(world.disks.end)
    (told,) = world.notes.events
    assert "disk0: what the guest had not flushed may be lost" in told.text  # type: ignore[union-attr]


def test_a_removed_disk_is_closed(folder: Path, make: Callable[..., World]) -> None:
    world = make(DiskSpec(str(folder / "a.raw")))
    (result,) = world.wait(lambda done: world.disks.remove("disk0", done))
    assert result.status.name == "OK"
    assert world.disks.attached == {}
    spec = DiskSpec(str(folder / "a.raw"), lun=9)
    world.wait(lambda done: done(world.disks.attach(spec, world.disks.open(spec))))
    assert list(world.disks.attached) == ["disk0"]


def test_a_flush_that_fails_behind_a_removal_is_told_once(
    folder: Path, make: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever removed it may wait no more, and of a controller's disks nobody asks. The end waits, too."""
    flushing = threading.Event()

    def flush(_image: RawImage) -> None:
        assert flushing.wait(SECONDS)
        raise OSError(EIO, "Input/output error")

    monkeypatch.setattr(RawImage, "flush", flush)
    world = make(DiskSpec(str(folder / "a.raw")), DiskSpec(str(folder / "b.raw"), controller=1))
    heard: list[Any] = []

    def remove(done: Callable[[], object]) -> None:
        world.disks.remove("disk0", heard.append)
        world.disks.rescind(1)
        world.io.call_soon(done)

    def end(done: Callable[[], object]) -> None:
        world.disks.end(done)
        flushing.set()

    world.wait(remove)
    world.wait(end)
    assert [result.status for result in heard] == [Status.ERROR]
    told = sorted(event.text for event in world.notes.events)  # type: ignore[union-attr]
    why = f"what the guest had not flushed may be lost: {Status.ERROR.value}: Input/output error"
    assert told == [f"disk0: {why}", f"disk1: {why}"]


def test_what_a_saved_machine_had_is_asked_for_again(folder: Path, make: Callable[..., World]) -> None:
    a, b, iso = (str(folder / name) for name in ("a.raw", "b.raw", "c.iso"))
    world = make(
        DiskSpec(a, serial="one", sector="4096"),
        DiskSpec(b, readonly=True, controller=1, lun=5),
        cdroms=(CdromSpec(iso), CdromSpec("")),
    )
    saved = world.disks.saved()
    assert world.wait(world.disks.flush) == [""]
    world.wait(world.disks.end)
    disks, cdroms = specs_of(saved)
    again = make(*disks, cdroms=cdroms)
    places = [(one.controller, one.lun) for one in world.disks.attached.values()]
    assert [(one.controller, one.lun) for one in again.disks.attached.values()] == places
    again.disks.check(saved)
    assert again.notes.events == []
    with pytest.raises(StateError, match=r"a.raw: 65536 bytes, and 4096 when the VM was saved"):
        again.disks.check((saved[0]._replace(size=4096), *saved[1:]))
    again.disks.check((saved[0]._replace(changed=1), *saved[1:]))
    (told,) = again.notes.events
    assert "a.raw was written to since the VM was saved" in told.text  # type: ignore[union-attr]
    with pytest.raises(StateError, match="'tape'"):
        specs_of([saved[0]._replace(kind="tape", name="tape0")])
    for name in ("", "disk", "disk00", "disk-1", "disk٣", "cdrom0", "nvme0", "disk0\n", saved[1].name):
        with pytest.raises(StateError, match=r"it has '.*': no name of a disk, or one of two") as refusal:
            specs_of([saved[1], saved[0]._replace(name=name)])
        assert str(refusal.value).isprintable()


def test_a_saved_machines_disks_keep_their_names(folder: Path, make: Callable[..., World]) -> None:
    """disk1 was disk0 where disk0 had been removed, and whoever meant disk0 from then on got another."""
    a, b, iso = (str(folder / name) for name in ("a.raw", "b.raw", "c.iso"))
    world = make(DiskSpec(a), DiskSpec(b), cdroms=(CdromSpec(""), CdromSpec(iso)))
    for name in ("disk0", "cdrom0"):
        del world.disks.attached[name]
    saved = world.disks.saved()
    world.wait(world.disks.end)
    disks, cdroms = specs_of(saved)
    again = make(*disks, cdroms=cdroms, saved=saved)
    assert {name: one.spec.file for name, one in again.disks.attached.items()} == {"disk1": b, "cdrom1": iso}
    assert again.disks.saved() == saved
    added = again.disks.attach(DiskSpec(a), again.disks.open(DiskSpec(a)))
    assert added.name == "disk0"


def test_what_is_thrown_away_is_not_saved(folder: Path, make: Callable[..., World]) -> None:
    world = make(DiskSpec(str(folder / "a.raw"), snapshot=True))
    assert world.disks.why_not_saved() == "", "nothing was written yet"
    disk = world.disks.attached["disk0"].disk
    assert disk is not None
    disk.image.writev(0, [memoryview(bytearray(512))])
    assert "disk0 has snapshot=on" in world.disks.why_not_saved()
    assert make(DiskSpec(str(folder / "b.raw"))).disks.why_not_saved() == ""
