"""Kernel module trees for the tests of what loads modules."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from hvkvm.boot.kmod import ModuleTree


def elf_module(*lines: str) -> bytes:
    """The smallest relocatable ELF with these .modinfo lines."""
    info = b"".join(line.encode() + b"\0" for line in lines)
    names = b"\0.modinfo\0.shstrtab\0"
    tables = 64 + len(info) + len(names)
    magic = b"\x7fELF\x02\x01\x01"
    header = struct.pack("<16sHHIQQQIHHHHHH", magic, 1, 62, 1, 0, 0, tables, 0, 64, 0, 0, 64, 3, 2)

    def section(name: int, offset: int, size: int) -> bytes:
        return struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, offset, size, 0, 0, 1, 0)

    sections = bytes(64) + section(1, 64, len(info)) + section(10, 64 + len(info), len(names))
    return header + info + names + sections


@pytest.fixture(scope="session")
def make_module() -> Callable[..., bytes]:
    """`make_module(*modinfo_lines)` gives a module's bytes."""
    return elf_module


@pytest.fixture
def make_tree(tmp_path: Path) -> Callable[..., ModuleTree]:
    """`make_tree({name: modinfo lines}, builtin="", order=True)` lays a kernel package's modules out."""

    def make(modules: dict[str, list[str]], builtin: str = "", order: bool = True) -> ModuleTree:
        root = tmp_path / "lib/modules/6.1.0-test"
        for name, lines in modules.items():
            path = root / "kernel/drivers" / f"{name}.ko"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(elf_module(f"name={name}", *lines))
        (root / "modules.builtin").write_text(builtin)
        if order:
            (root / "modules.order").write_text("".join(f"kernel/drivers/{name}.ko\n" for name in modules))
        return ModuleTree(tmp_path)

    return make
