"""What a machine from a file boots at its reset: what was booted, and a warm guest's copy its command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kernel_images as ki
import pytest

from hvkvm.boot import guest_exit
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.guest_image import GuestImage
from hvkvm.state.manifest import SavedBoot

WAITS = b"guest-orders >/dev/null"
RUNS = b"exec echo copied"


class Files:
    """A kernel, a busybox, and two files for the guest."""

    def __init__(self, folder: Path) -> None:
        self.kernel, self.busybox, self.first, self.own, self.saved = (
            folder / name for name in ("kernel", "busybox", "first", "own", "saved")
        )
        self.kernel.write_bytes(ki.vmlinux())
        self.busybox.write_bytes(guest_exit.program())
        self.first.write_bytes(b"in every copy")
        self.own.write_bytes(b"in this copy")

    def warm(self) -> SavedBoot:
        """What the file of a warm guest made of them has."""
        config = MachineConfig(
            kernel=self.kernel, busybox=self.busybox, files=(("/first", self.first),), awaits=True
        )
        made = GuestImage(config, "it").recipe()
        assert made is not None
        return made

    def copy(self, **changed: Any) -> MachineConfig:
        """The configuration of a copy, as `restored_config` makes it."""
        command = ("echo", "copied")
        return MachineConfig(kernel=self.kernel, warm=self.saved, awaits=True, command=command)._replace(
            **changed
        )


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.setenv("HVKVM_CACHE", str(tmp_path / "cache"))
    return Files(tmp_path)


def loaded(image: GuestImage) -> bytes:
    made = image.initrd()
    assert isinstance(made, bytes)
    return made


def test_a_copy_boots_for_its_command_with_its_files(files: Files) -> None:
    image = GuestImage(files.copy(files=(("/own", files.own),)), "it", files.warm())
    for _ in range(2):  # reset twice
        assert image.why_not_again() == ""
        made = loaded(image)
        assert RUNS in made
        assert WAITS not in made
        assert b"in every copy" in made
        assert b"in this copy" in made
    assert image.recipe() is None, "a file does not name what was handed over"


def test_a_copy_that_was_saved_boots_for_its_command(files: Files) -> None:
    boot = GuestImage(files.copy(), "it", files.warm()).recipe()
    image = GuestImage(files.copy(warm=None, restore=files.saved), "it", boot)
    assert image.why_not_again() == ""
    assert RUNS in loaded(image)


def test_a_warm_guest_boots_to_wait_again(files: Files) -> None:
    image = GuestImage(files.copy(warm=None, restore=files.saved, command=()), "it", files.warm())
    assert image.why_not_again() == ""
    assert WAITS in loaded(image)


@pytest.mark.parametrize("name", ["kernel", "busybox", "first"])
def test_what_has_changed_is_not_booted(files: Files, name: str) -> None:
    boot = files.warm()
    image = GuestImage(files.copy(), "it", boot)
    path: Path = getattr(files, name)
    path.write_bytes(path.read_bytes() + b"more")
    assert "has changed since it was saved" in image.why_not_again()


def test_a_file_of_its_own_that_has_gone_is_told(files: Files) -> None:
    image = GuestImage(files.copy(files=(("/own", files.own),)), "it", files.warm())
    files.own.unlink()
    assert "own: No such file" in image.why_not_again()
