"""The guest's root: found on its disks when nobody names it, and mounted where the kernel cannot."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kernel_images as ki
import pytest
from disk_images import MIB, ROOT, btrfs_superblock, gpt, put, xfs_superblock

from hvkvm.boot import guest_exit
from hvkvm.errors import ConfigError
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.disk_spec import DiskSpec
from hvkvm.machine.guest_image import initial_ramdisk
from hvkvm.machine.root import find_root, told

A, B = uuid.UUID(int=0xA), uuid.UUID(int=0xB)
Maker = Callable[..., MachineConfig]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    """config(disk, ..., **fields): a machine with these disks, each given as its bytes."""
    monkeypatch.setenv("HVKVM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "kernel").write_bytes(ki.vmlinux())
    (tmp_path / "busybox").write_bytes(guest_exit.program())
    (tmp_path / "initrd").write_bytes(b"the user's")

    def make(*disks: bytes, initrd: bool = False, **fields: Any) -> MachineConfig:
        specs = []
        for number, data in enumerate(disks):
            path = tmp_path / f"disk{number}"
            path.write_bytes(data)
            specs.append(DiskSpec(str(path)))
        if initrd:
            fields["initrd"] = tmp_path / "initrd"
        settings = MachineConfig(
            kernel=tmp_path / "kernel",
            busybox=tmp_path / "busybox",
            vmbus="on",
            disks=tuple(specs),
            **fields,
        )
        return settings.validate()

    return make


def xfs(name: uuid.UUID = A) -> bytes:
    disk = bytearray(MIB)
    put(disk, 0, xfs_superblock(MIB, name))
    return bytes(disk)


def test_only_file_system_becomes_the_root_and_is_told(config: Maker) -> None:
    found = find_root(config(bytes(MIB), xfs(), append="quiet -- single"))
    assert found.config.append == f"root=UUID={A} rootfstype=xfs quiet -- single"
    assert found.note.startswith("root file system: xfs on ")
    assert found.note.endswith(f"disk1, UUID={A}")
    assert "\n" not in found.note


def test_partition_that_says_it_is_a_root_wins_over_another_disk(config: Maker) -> None:
    disk = bytearray(4 * MIB)
    gpt(disk, [(ROOT, MIB, MIB)])
    put(disk, MIB + 65536, btrfs_superblock(MIB, B))
    found = find_root(config(xfs(), bytes(disk)))
    assert f"root=UUID={B} rootfstype=btrfs" in found.config.append


def test_none_is_said_and_changes_nothing(config: Maker) -> None:
    machine = config(bytes(MIB), append="quiet")
    found = find_root(machine)
    assert found.config == machine
    assert found.note == "no root file system on the disks: no root= is added"


def test_several_are_one_line_with_the_remedy(config: Maker) -> None:
    with pytest.raises(ConfigError) as caught:
        find_root(config(xfs(A), xfs(B)))
    line = str(caught.value)
    assert "2 file systems could be the root" in line
    assert f"UUID={A}" in line
    assert f"UUID={B}" in line
    assert "--append root=UUID=" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "fields",
    [
        {"append": "root=/dev/sda"},
        {"append": "root="},
        {"command": ("true",)},
        {"awaits": True},
        {"disks": ()},
    ],
)
def test_who_named_a_root_or_runs_a_command_is_left_alone(config: Maker, fields: dict[str, Any]) -> None:
    machine = config(xfs())._replace(**fields)
    assert find_root(machine) == (machine, "")


def test_image_that_cannot_be_read_names_the_flag(config: Maker, tmp_path: Path) -> None:
    machine = config(bytes(MIB + 100))
    with pytest.raises(ConfigError, match=r"--disk .*disk0.*truncate -s %512"):
        find_root(machine)


def test_images_are_closed_again(config: Maker) -> None:
    from hvkvm.block.open_image import open_image

    machine = config(xfs())
    find_root(machine)
    image = open_image(machine.disks[0].file)  # as a writer: nobody holds the lock
    image.close()


def test_our_init_mounts_what_the_kernel_alone_cannot_name(config: Maker) -> None:
    machine = config(xfs(), append=f"rw root=UUID={A} rootflags=noatime init=/bin/bash -- ro")
    root = told(machine)
    assert root is not None
    assert root == (f"UUID={A}", "", "noatime", "rw", "/bin/bash")
    made = initial_ramdisk(machine)
    assert isinstance(made, bytes)
    assert f"root=UUID={A}\n".encode() in made
    assert b"switch_root" in made


def test_kernel_mounts_what_it_can_and_an_initrd_does_its_own(config: Maker) -> None:
    assert told(config(xfs(), append="root=/dev/sda")) is None
    assert initial_ramdisk(config(xfs(), append="root=/dev/sda")) is None
    machine = config(xfs(), append=f"root=UUID={A}", initrd=True)
    assert told(machine) is None
    assert initial_ramdisk(machine) == machine.initrd


def test_modules_for_a_named_device_need_our_init(config: Maker, tmp_path: Path) -> None:
    (tmp_path / "modules").mkdir()
    machine = config(xfs(), append="root=/dev/sda1", modules_dir=tmp_path / "modules")
    root = told(machine)
    assert root is not None
    assert root.root == "/dev/sda1"


def test_file_for_a_guest_with_its_own_root_is_refused(config: Maker, tmp_path: Path) -> None:
    machine = config(xfs(), append="root=LABEL=x", files=(("/x", tmp_path / "kernel"),))
    with pytest.raises(ConfigError, match="--file: the file system of root= has its own init"):
        initial_ramdisk(machine)


def test_hostile_words_of_the_command_line_are_no_shell(config: Maker) -> None:
    machine = config(xfs(), append='root="UUID=x;reboot" rootflags="$(reboot)"')
    made = initial_ramdisk(machine)
    assert isinstance(made, bytes)
    assert b"root='UUID=x;reboot'\n" in made
    assert b"flags='$(reboot)'\n" in made
