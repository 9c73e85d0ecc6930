"""Files that a user names are read at once or refused: a pipe that nobody writes is not waited for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from hvkvm import given_file
from hvkvm.block.host_file import HostFile
from hvkvm.boot import command_files, firmware, kmod
from hvkvm.cli import main
from hvkvm.errors import ConfigError, HvkvmError
from hvkvm.machine import cloud_init, fault_file, guest_image
from hvkvm.net.capture import Capture
from hvkvm.record.recorder import Recorder
from hvkvm.state.file import Writer


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "user-data"
    os.mkfifo(path)
    return path


def modules(path: Path, name: str) -> kmod.ModuleTree:
    """A folder of modules whose list called `name` is at `path`."""
    (path.parent / "kernel").mkdir()
    path.rename(path.with_name(name))
    return kmod.ModuleTree(path.parent)


def test_a_file_is_read_whole_or_so_much_of_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    assert given_file.read(path) == b"0123456789"
    assert given_file.read(path, 4) == b"0123"


@pytest.mark.parametrize("name", [".", "/dev/null", "gone"])
def test_what_is_no_file_is_an_oserror_with_words(name: str, tmp_path: Path) -> None:
    fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=r"\w+") as caught:
        given_file.read(tmp_path / name)
    assert caught.value.strerror
    assert len(os.listdir("/proc/self/fd")) == fds


@pytest.mark.parametrize(
    "reader",
    [
        command_files.read,
        kmod.read_module,
        firmware.read,
        firmware.kernel_parts,
        guest_image.read_initrd,
        fault_file.read_plan,
        lambda path: cloud_init.seed(path.parent),
        lambda path: modules(path, "modules.order"),
        lambda path: modules(path, "modules.builtin"),
    ],
)
def test_no_reader_waits_for_a_writer(reader: Callable[[Path], Any], fifo: Path) -> None:
    fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(HvkvmError, match="is not a regular file; "):
        reader(fifo)
    assert len(os.listdir("/proc/self/fd")) == fds


def test_a_pipe_that_is_not_read_is_not_waited_for_either(fifo: Path) -> None:
    with pytest.raises(ConfigError, match=r"--out .*: nobody reads this pipe; "):
        given_file.open_to_write(fifo, "--out ")
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    writer = given_file.open_to_write(fifo, "--out ")
    given_file.write_in_time(writer.fd, b"abc", 0)
    assert os.read(reader, 10) == b"abc"
    with pytest.raises(OSError, match="is not read"):
        given_file.write_in_time(writer.fd, bytes(1 << 21), 0.01)
    os.close(reader)
    writer.close()


def test_a_place_for_a_file(tmp_path: Path) -> None:
    there, link = tmp_path / "file", tmp_path / "link"
    there.touch()
    link.symlink_to("nowhere")
    for path in (there, link, tmp_path / "new"):
        assert given_file.why_no_place(path) == ""
    for path, why in (
        (tmp_path, "is a directory; name a file in it"),
        (tmp_path / "no" / "x", f"no folder {tmp_path}/no; create it, or name another"),
        (there / "x", f"no folder {there}; create it, or name another"),
        (tmp_path / ("n" * 300), "File name too long; name another"),
        (tmp_path / ("n" * 300) / "x", f"{tmp_path}/{'n' * 300}: File name too long; name another"),
    ):
        assert given_file.why_no_place(path) == why


WRITERS: dict[str, Callable[[Path], object]] = {
    "record": lambda path: Recorder(path, "full", {}),
    "timeline": lambda path: given_file.open_to_write(path, "--timeline "),
    "pcap": lambda path: Capture(MagicMock(), path, "socket"),
    "junit": lambda path: given_file.write_at_once(path, b"x", 1),
    "save": lambda path: Writer(path, 4096),
}


@pytest.mark.parametrize("read_only", [True, False])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_is_in_use_is_neither_emptied_nor_replaced(
    tmp_path: Path, writer: str, read_only: bool
) -> None:
    """Whoever has it, and by whatever name: a VHDX's parent is named by its child alone."""
    path = tmp_path / "disk.raw"
    path.write_bytes(b"data" * 1024)
    image = HostFile(path, read_only=read_only)
    with pytest.raises((ConfigError, OSError), match="is the image of a disk that is in use"):
        WRITERS[writer](path)
    image.close()
    assert path.read_bytes() == b"data" * 1024
    assert [one.name for one in tmp_path.iterdir()] == ["disk.raw"]


def test_an_image_that_is_in_use_by_the_beginning_is_not_emptied(tmp_path: Path) -> None:
    """A run opens its captures before its disks, and a VHDX's parent is named by its child alone."""
    path = tmp_path / "disk.raw"
    path.write_bytes(b"data")
    output = given_file.OutputFile(path)
    image = HostFile(path, read_only=True)
    with pytest.raises(OSError, match="is the image of a disk that is in use"):
        output.begin()
    output.close()
    image.close()
    assert path.read_bytes() == b"data"


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_a_file_that_was_made_and_not_begun_goes_again(tmp_path: Path, there: bool, begun: bool) -> None:
    path = tmp_path / "out"
    if there:
        path.touch()
    output = given_file.OutputFile(path)
    if begun:
        output.begin()
    output.close()
    output.close()
    assert path.exists() is (there or begun)


def test_one_that_nobody_uses_any_more_is_emptied(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"data")
    HostFile(path, read_only=False).close()
    given_file.check_replaceable(path)
    given_file.write_at_once(path, b"new", 1)
    assert path.read_bytes() == b"new"


LONG = "n" * 300
"""More than a name may have: before Python 3.14 `Path.is_file` raises OSError for it."""


def test_programs_and_firmware_are_looked_for_beyond_names_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busybox, image = tmp_path / "busybox", tmp_path / "OVMF.fd"
    busybox.touch(mode=0o755)
    image.touch()
    monkeypatch.setenv("PATH", f"/{LONG}:{tmp_path}")
    monkeypatch.setattr(firmware, "OVMF", (Path(f"/{LONG}"), image))
    assert guest_image.find_busybox() == busybox
    assert firmware.find("auto") == image


def test_a_disk_of_a_long_name_has_no_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = MagicMock(sector_size=512, inspect=lambda: {"size": 0})
    monkeypatch.setattr("hvkvm.block.open_image.open_image", lambda *_: image)
    assert main(["disk", "info", "--json", f"nbd:localhost:10809:exportname={LONG}"]) == 0
    assert "space_taken" not in capsys.readouterr().out
