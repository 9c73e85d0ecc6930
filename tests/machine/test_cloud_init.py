"""A seed for cloud-init: an image with its files under the label it looks for, and folders that are none."""

from __future__ import annotations

import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest

from hvkvm.errors import CapabilityMissing, ConfigError
from hvkvm.machine import cloud_init
from hvkvm.machine.config import MachineConfig

USER = b"#cloud-config\nhostname: seeded\n"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVKVM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "seed"
    made.mkdir()
    (made / "user-data").write_bytes(USER)
    return made


def files_of(image: Path) -> dict[str, bytes]:
    """By both kinds of long names, which must be the same."""
    import pycdlib

    iso = pycdlib.PyCdlib()
    iso.open(str(image))
    found = {}
    for child in iso.list_children(rr_path="/"):
        if child.is_file():
            name = child.rock_ridge.name().decode()
            out, other = BytesIO(), BytesIO()
            iso.get_file_from_iso_fp(out, rr_path=f"/{name}")
            iso.get_file_from_iso_fp(other, joliet_path=f"/{name}")
            assert out.getvalue() == other.getvalue()
            found[name] = out.getvalue()
    iso.close()
    return found


def test_the_image_has_the_files_and_the_label(folder: Path) -> None:
    (folder / "network-config").write_bytes(b"version: 2\n")
    (folder / "something else").write_bytes(b"not for cloud-init")
    image = cloud_init.seed(folder)
    found = files_of(image)
    assert found.pop("meta-data").startswith(b"instance-id: ")
    assert found == {"user-data": USER, "network-config": b"version: 2\n"}
    if shutil.which("blkid"):
        told = subprocess.run(
            ["blkid", "-p", "-o", "export", str(image)], capture_output=True, text=True, check=True
        ).stdout
        assert "TYPE=iso9660" in told
        assert "LABEL=cidata" in told


def test_the_same_files_are_the_same_image_and_others_another_instance(folder: Path) -> None:
    first = cloud_init.seed(folder)
    assert cloud_init.seed(folder) == first
    (folder / "user-data").write_bytes(USER + b"# more\n")
    second = cloud_init.seed(folder)
    assert second != first
    assert files_of(first)["meta-data"] != files_of(second)["meta-data"]
    (folder / "meta-data").write_bytes(b"instance-id: mine\n")
    assert files_of(cloud_init.seed(folder))["meta-data"] == b"instance-id: mine\n"


def test_an_image_that_a_crash_of_the_host_emptied_is_made_again(folder: Path) -> None:
    made = cloud_init.seed(folder)
    files = files_of(made)
    made.write_bytes(b"")
    assert cloud_init.seed(folder) == made
    assert files_of(made) == files


def test_it_becomes_a_last_drive(folder: Path, kernel: Path) -> None:
    config = MachineConfig(kernel=kernel, vmbus="on", cloud_init=folder).validate()
    (drive,) = cloud_init.with_seed(config).cdroms
    assert files_of(Path(drive.file))["user-data"] == USER
    assert config.bus_of(drive) == "vmbus"
    started = MachineConfig(firmware="auto", cloud_init=folder).validate()
    (drive,) = cloud_init.with_seed(started).cdroms
    assert started.bus_of(drive) == "nvme", (
        "where firmware and the guest see it without a driver for the VMBus"
    )


def test_what_is_no_seed_is_one_line(folder: Path, kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="add --vmbus on"):
        MachineConfig(kernel=kernel, cloud_init=folder).validate()
    with pytest.raises(ConfigError, match="no file user-data"):
        cloud_init.seed(folder.parent)
    with pytest.raises(ConfigError, match="no file user-data"):
        cloud_init.seed(folder / "nowhere")
    with pytest.raises(ConfigError, match="Not a directory"):
        cloud_init.seed(folder / "user-data")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pycdlib", None)
        with pytest.raises(CapabilityMissing, match=r"pip install 'hvkvm\[cloud\]'"):
            cloud_init.seed(folder)
    (folder / "vendor-data").write_bytes(bytes(cloud_init.MOST_BYTES))
    with pytest.raises(ConfigError, match="more than 16 MiB"):
        cloud_init.seed(folder)
