"""Files on their way to another host: known by content, whole or not at all, whatever an archive says."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from hvkvm.errors import ConfigError
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.disk_spec import DiskSpec
from hvkvm.testing.matrix.parcels import PREFIX, Sender, Store, digest_of, names_of


@pytest.fixture
def config(tmp_path: Path) -> MachineConfig:
    modules = tmp_path / "modules/1.2"
    (modules / "kernel").mkdir(parents=True)
    (modules / "modules.dep").write_text("x:")
    (modules / "kernel/x.ko").write_bytes(b"module")
    for name in ("kernel", "disk", "file"):
        (tmp_path / name).write_bytes(name.encode())
    return MachineConfig(
        kernel=tmp_path / "kernel",
        modules=("x",),
        modules_dir=modules,
        disks=(DiskSpec(str(tmp_path / "disk"), snapshot=True),),
        files=(("/root/f", tmp_path / "file"),),
    )


def sent(sender: Sender, store: Store, digests: list[str]) -> None:
    for digest in store.missing(digests):
        for data in sender.chunks(digest):
            store.receive(digest, "test", data, last=data is not None)


def test_a_configuration_arrives_with_its_files(config: MachineConfig, tmp_path: Path) -> None:
    (tmp_path / "sender").mkdir()
    sender, store = Sender(tmp_path / "sender"), Store(tmp_path / "store")
    packed = sender.packed(config)
    names = names_of(packed)
    assert len(names) == 4
    assert store.missing(names) == names
    assert str(tmp_path) not in repr(packed)
    sent(sender, store, names)
    assert store.missing(names) == []
    for _ in range(2):
        there = store.unpacked(packed)
        assert there.kernel is not None
        assert there.modules_dir is not None
        assert there.kernel.read_bytes() == b"kernel"
        assert Path(there.disks[0].file).read_bytes() == b"disk"
        assert there.files[0][0] == "/root/f"
        assert there.files[0][1].read_bytes() == b"file"
        assert there.modules_dir.name == "1.2"
        assert (there.modules_dir / "kernel/x.ko").read_bytes() == b"module"
    assert there._replace(kernel=None, disks=(), files=(), modules_dir=None) == config._replace(
        kernel=None, disks=(), files=(), modules_dir=None
    )


def test_the_same_content_is_the_same_parcel(config: MachineConfig, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    packed = [Sender(tmp_path / name).packed(config) for name in ("one", "two")]
    assert packed[0] == packed[1]
    assert packed[0].kernel is not None
    digest = digest_of(tmp_path / "kernel")
    assert str(packed[0].kernel) == f"{PREFIX}{digest}/kernel"


def test_modules_that_nobody_loads_stay(config: MachineConfig, tmp_path: Path) -> None:
    assert Sender(tmp_path).packed(config._replace(modules=())).modules_dir is None


def test_another_content_is_refused(config: MachineConfig, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    digest = digest_of(tmp_path / "kernel")
    with pytest.raises(ValueError, match="another content"):
        store.receive(digest, "key", b"no kernel", last=True)
    assert store.missing([digest]) == [digest]
    assert list((tmp_path / "store").iterdir()) == []
    store.receive(digest, "key", b"ker", last=False)
    store.receive(digest, "other", b"kernel", last=True)
    assert store.path(digest).read_bytes() == b"kernel"


@pytest.mark.parametrize("name", ["", "../x", "a" * 63, "A" * 64, "a" * 63 + "/"])
def test_what_is_no_digest_is_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="names no parcel"):
        Store(tmp_path).path(name)


def test_an_archive_writes_below_its_folder_alone(config: MachineConfig, tmp_path: Path) -> None:
    archive = tmp_path / "bad.tar"
    with tarfile.open(archive, "w") as out:
        for name in ("../out", "/abs-hvkvm-test", "a/../../out", "good"):
            entry = tarfile.TarInfo(name)
            entry.size = 1
            out.addfile(entry, io.BytesIO(b"x"))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/"
        out.addfile(link)
    sender, store = Sender(tmp_path), Store(tmp_path / "store")
    name = sender.add(archive)
    digest = digest_of(archive)
    sent(sender, store, [digest])
    packed = MachineConfig(modules_dir=Path(name.replace(digest, f"{digest}.tar").replace("bad.tar", "1.2")))
    folder = store.unpacked(packed).modules_dir
    assert folder is not None
    assert [path.name for path in folder.rglob("*")] == ["good"]
    assert not (tmp_path / "store/out").exists()
    assert not Path("/abs-hvkvm-test").exists()


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_keeps_nothing_of_what_it_did_not_take(
    config: MachineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sender").mkdir()
    sender, store = Sender(tmp_path / "sender"), Store(tmp_path / "store")
    packed = sender.packed(config)
    sent(sender, store, names_of(packed))
    before = sorted(tmp_path.glob("store/*"))
    with monkeypatch.context() as full:
        full.setattr("shutil.copyfileobj", no_space)
        with pytest.raises(OSError, match="No space"):
            store.unpacked(packed)
    assert sorted(tmp_path.glob("store/*")) == before
    content = b"first" + b"second"
    digest = hashlib.sha256(content).hexdigest()
    store.receive(digest, "test", b"first", last=False)
    does = Path.open

    def fails(path: Path, mode: str) -> object:
        file = does(path, mode)
        return contextlib.nullcontext(SimpleNamespace(write=no_space, close=file.close))

    with monkeypatch.context() as full:
        full.setattr(Path, "open", fails)
        with pytest.raises(OSError, match="No space"):
            store.receive(digest, "test", b"second", last=True)
    assert sorted(tmp_path.glob("store/*")) == before
    for data in (b"first", b"second"):  # once more, from the beginning
        store.receive(digest, "test", data, last=data == b"second")
    assert store.missing([digest]) == []


def test_what_cannot_travel_is_said(config: MachineConfig, tmp_path: Path) -> None:
    disk = DiskSpec("x", faults=tmp_path / "file")
    with pytest.raises(ConfigError, match="does not travel"):
        Sender(tmp_path).packed(config._replace(disks=(disk._replace(file=config.disks[0].file),)))
    with pytest.raises(ConfigError, match="does not travel"):
        Sender(tmp_path).packed(config._replace(firmware=tmp_path / "file"))
    with pytest.raises(ConfigError, match="No such file"):
        Sender(tmp_path).packed(config._replace(kernel=tmp_path / "no"))


def test_the_documented_job_is_one() -> None:
    yaml = pytest.importorskip("yaml")
    page = (Path(__file__).parents[2] / "docs/matrix.md").read_text()
    job = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] in ("OnFailure", "Never")
    (container,) = pod["containers"]
    assert container["command"][:2] == ["dask", "worker"]
    assert "devices.kubevirt.io/kvm" in container["resources"]["limits"]
    names = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} <= names
    image = (Path(__file__).parents[2] / ".ci/Containerfile").read_text()  # by which the page has it made
    assert f"HVKVM_CACHE={container['volumeMounts'][0]['mountPath']}\n" in image
    assert "/src[dask" in image
