"""A saved machine's file with RAM compressed: the same RAM again, and one line for what is damaged."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import guest_images
import pytest
from running_vm import running_vm

from hvkvm.errors import CapabilityMissing, StateError
from hvkvm.memory.mapping import PAGE_SIZE
from hvkvm.state import file as state_file
from hvkvm.state.compressed import MAX_PIECE, Packer, Unpacker
from hvkvm.state.file import RAM_OFFSET, Saved, Writer
from hvkvm.state.manifest import Manifest, SavedConfig

SOAK = bool(os.environ.get("HVKVM_SOAK"))
RAM = 3 << 20
CONFIG = SavedConfig("/vmlinuz", "", 1, RAM, "none", "auto", (), "off", "6.0", True)


def contents() -> bytes:
    chance = random.Random(1)
    ram = bytearray(RAM)
    ram[0:PAGE_SIZE] = chance.randbytes(PAGE_SIZE)
    ram[5 * PAGE_SIZE : 100 * PAGE_SIZE] = b"some text" * PAGE_SIZE + bytes(95 * PAGE_SIZE - 9 * PAGE_SIZE)
    ram[-PAGE_SIZE:] = b"\1" * PAGE_SIZE
    return bytes(ram)


def written(path: Path) -> Path:
    with Writer(path, RAM, compress=True) as writer:
        ram = contents()
        for at in range(0, RAM, MAX_PIECE):
            writer.write_ram(at, ram[at : at + MAX_PIECE])
        writer.commit(Manifest("0.1.0", 1.0, "demo", CONFIG, ()), {"part": (1, 2)})
    return path


def test_ram_comes_back_whole_and_the_file_is_small(tmp_path: Path) -> None:
    file = written(tmp_path / "vm")
    assert file.stat().st_size < RAM_OFFSET + 4 * PAGE_SIZE
    with Saved(file) as saved:
        assert saved.ram_size == RAM
        assert os.pread(saved.fd, RAM + 1, RAM_OFFSET) == contents()
        assert saved.parts == {"part": [1, 2]}
        saved.verify()


def test_damage_anywhere_is_one_line_and_leaves_nothing_open(tmp_path: Path) -> None:
    file = written(tmp_path / "vm")
    whole = file.read_bytes()
    chance = random.Random(2)
    fds = len(os.listdir("/proc/self/fd"))
    refused = 0
    for _ in range(100_000 if SOAK else 500):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            # Not between the header and RAM: there is nothing.
            place = chance.choice((chance.randrange(200), chance.randrange(RAM_OFFSET, len(whole))))
            damaged[place] ^= 1 << chance.randrange(8)
        if chance.random() < 0.1:
            del damaged[chance.randrange(len(damaged)) :]
        file.write_bytes(damaged)
        try:
            with Saved(file) as saved:
                assert os.pread(saved.fd, RAM, RAM_OFFSET) == contents()
        except StateError as error:
            refused += 1
            assert str(error).startswith(str(file))
            assert "\n" not in str(error)
    assert refused > (90_000 if SOAK else 450)
    assert len(os.listdir("/proc/self/fd")) == fds


@pytest.fixture(params=["compression", "zstandard"])
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The one module for zstd that is there."""
    name: str = request.param
    pytest.importorskip(name)
    for other in {"compression", "zstandard"} - {name}:
        monkeypatch.setitem(sys.modules, other, None)
    return name


def test_frames_of_either_module_are_the_others(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = contents()[: 9 * PAGE_SIZE]
    frame = Packer("x").pack(data)
    monkeypatch.undo()
    assert Unpacker("x").unpack(frame, len(data)) == data


@pytest.mark.usefixtures("module")
def test_a_frame_that_says_it_is_huge_is_not_unpacked() -> None:
    packer, unpacker = Packer("x"), Unpacker("x")
    frame = packer.pack(bytes(64 << 20))
    assert unpacker.unpack(frame, PAGE_SIZE) is None
    assert unpacker.unpack(b"none", PAGE_SIZE) is None
    one = packer.pack(b"x" * PAGE_SIZE)
    assert unpacker.unpack(one, PAGE_SIZE) == b"x" * PAGE_SIZE
    assert unpacker.unpack(one[:-1], PAGE_SIZE) is None
    assert unpacker.unpack(one, PAGE_SIZE - 1) is None


def test_extents_of_impossible_sizes_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "vm")
    with Saved(file) as saved:
        extents = saved.manifest.extents
    for changed in (
        extents[0]._replace(stored=0),
        extents[0]._replace(stored=-1),
        extents[0]._replace(stored=1 << 40),
        extents[0]._replace(size=RAM),
        extents[0]._replace(checksum=-1),
    ):
        with Writer(file, RAM, compress=True) as writer:
            writer.write_ram(0, contents()[:MAX_PIECE])
            writer._extents[0] = changed
            writer.commit(Manifest("0.1.0", 1.0, "demo", CONFIG, ()), {})
        with pytest.raises(StateError, match=r"RAM|saved"):
            Saved(file)


def test_without_the_module_the_remedy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path / "vm")
    for name in ("zstandard", "compression"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(CapabilityMissing, match=r"a compressed file: needs .* pip install"):
        Saved(file)
    with pytest.raises(
        CapabilityMissing, match=r"^--compress: needs the Python module zstandard; install it"
    ):
        Writer(tmp_path / "other", RAM, compress=True)
    assert [path.name for path in tmp_path.iterdir()] == ["vm"]


@pytest.mark.kvm
def test_a_vm_is_saved_small_and_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "vm.state"
    agent = ("--kernel", guest_images.image("agent"), "--memory", "64M", "--synic", "user", "--quiet")
    with running_vm(tmp_path, *agent, "--name", "first") as vm:
        vm.wait_until_listening()
        assert vm.ctl("save", file, "--compress") == f"saved to {file}\n"
        vm.ctl("quit")
    assert file.stat().st_size < RAM_OFFSET + (1 << 20)
    with running_vm(tmp_path, "--restore", file, "--quiet", "--name", "second") as other:
        other.wait_until_listening()
        assert other.json("--vm", "second", "info")["config"]["memory"] == 64 << 20
        other.ctl("quit")
    with state_file.Saved(file) as saved:
        assert saved.manifest.name == "first"
