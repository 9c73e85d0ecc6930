"""What is given to the guest as its first file system, by what the user gives us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kernel_images as ki
import pytest

from hvkvm.boot import guest_exit
from hvkvm.errors import ConfigError
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.guest_image import initial_ramdisk

USERS = b"the user's own archive"
OUR_INIT = b"#!/bin/busybox sh"


@pytest.fixture
def ramdisk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """ramdisk(initrd=True, ...): the bytes that a guest gets, None for none."""
    monkeypatch.setenv("HVKVM_CACHE", str(tmp_path / "cache"))
    paths = {name: tmp_path / name for name in ("kernel", "busybox", "initrd", "file")}
    paths["kernel"].write_bytes(ki.vmlinux())
    paths["busybox"].write_bytes(guest_exit.program())
    paths["initrd"].write_bytes(USERS)
    paths["file"].write_bytes(b"content of a file")

    def make(*, initrd: bool = False, files: bool = False, **config: Any) -> bytes | None:
        if initrd:
            config["initrd"] = paths["initrd"]
        if files:
            config["files"] = (("/root/file", paths["file"]),)
        settings = MachineConfig(kernel=paths["kernel"], busybox=paths["busybox"], **config)
        made = initial_ramdisk(settings.validate())
        return made.read_bytes() if isinstance(made, Path) else made

    return make


def test_a_guest_that_was_told_nothing_gets_a_shell(ramdisk: Any) -> None:
    assert OUR_INIT in ramdisk()


@pytest.mark.parametrize("append", ["overlayroot=tmpfs", 'x="a root=b"', "-- root=/dev/vda1", "root="])
def test_a_word_that_only_looks_like_root_is_none(ramdisk: Any, append: str) -> None:
    assert OUR_INIT in ramdisk(append=append)


def test_a_root_file_system_has_its_own_init(ramdisk: Any) -> None:
    assert ramdisk(append="quiet root=/dev/vda1") is None


def test_a_command_comes_behind_the_users_archive(ramdisk: Any) -> None:
    made = ramdisk(initrd=True, command=("true",))
    assert made.startswith(USERS)
    assert OUR_INIT in made


def test_files_are_added_to_the_users_archive_and_its_init_stays(ramdisk: Any) -> None:
    made = ramdisk(initrd=True, files=True)
    assert made.startswith(USERS)
    assert b"content of a file" in made
    assert OUR_INIT not in made
    assert b"guest-exit" not in made


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"initrd": True, "modules": ("a",)}, "--module"),
        ({"append": "root=/dev/vda1", "modules": ("a",)}, "--module"),
        ({"append": "root=/dev/vda1", "files": True}, "--file"),
    ],
)
def test_what_nobody_would_use_needs_a_command(
    ramdisk: Any, tmp_path: Path, options: dict[str, Any], flag: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{flag}: .*; add a command") as caught:
        ramdisk(modules_dir=tmp_path, **options)
    assert "\n" not in str(caught.value)
