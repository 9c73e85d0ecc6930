"""Runs the real command as a process, and makes the tiny guests it boots."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from running_vm import command_line

from hvkvm.block.vhdx.create import VhdxOptions, create_vhdx
from hvkvm.record.recorder import Recorder

MULTIBOOT_MAGIC = 0x1BADB002
LOAD_ADDRESS = 0x100000


def multiboot_elf(code: bytes) -> bytes:
    """An ELF32 image with a multiboot-1 header that enters `code` in flat 32-bit mode, interrupts off."""
    header = struct.pack("<III", MULTIBOOT_MAGIC, 0, -MULTIBOOT_MAGIC & 0xFFFFFFFF)
    body = header + code
    entry = LOAD_ADDRESS + len(header)
    ehdr = struct.pack(
        "<16sHHIIIIIHHHHHH", b"\x7fELF\x01\x01\x01", 2, 3, 1, entry, 52, 0, 0, 52, 32, 1, 0, 0, 0
    )
    offset = 0x1000
    phdr = struct.pack("<IIIIIIII", 1, offset, LOAD_ADDRESS, LOAD_ADDRESS, len(body), len(body), 7, 0x1000)
    # The multiboot header must lie within the first 8 KiB of the file; 0x1000 is.
    return (ehdr + phdr).ljust(offset, b"\0") + body


@pytest.fixture
def guest(tmp_path: Path) -> Callable[[bytes], Path]:
    """guest(code) writes a bootable image of that machine code and returns its path."""

    def make(code: bytes) -> Path:
        path = tmp_path / f"guest-{len(list(tmp_path.iterdir()))}"
        path.write_bytes(multiboot_elf(code))
        return path

    return make


@pytest.fixture(scope="session")
def verb_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small file of each sort that a verb takes: a recording, disks, a matrix."""
    folder = tmp_path_factory.mktemp("verbs")
    with (folder / "disk.raw").open("wb") as file:
        file.truncate(1 << 20)
    create_vhdx(folder / "disk.vhdx", VhdxOptions(4 << 20))
    machine = {"memory": 1 << 24, "cpus": 1, "vmbus_max_version": "6.0", "devices": []}
    recorder = Recorder(folder / "recording", "full", machine)
    recorder.start()
    recorder.close()
    (folder / "kernel").write_bytes(bytes(64))
    (folder / "matrix.toml").write_text('[machine]\nkernel = "kernel"\n')
    return folder


Hvkvm = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def hvkvm() -> Hvkvm:
    """hvkvm("run", ...) runs the command with no terminal and returns what subprocess.run does."""

    def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        settings: dict[str, object] = {
            "stdin": subprocess.DEVNULL,
            "capture_output": True,
            "text": True,
            "timeout": 100,
            "env": {**os.environ, "NO_COLOR": "1"},
        }
        settings.update(options)
        return subprocess.run(command_line(*arguments), check=False, **settings)  # type: ignore[call-overload,no-any-return]

    return run
