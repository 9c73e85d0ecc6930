"""The newc archive: what the cpio tool reads back is what was put in."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvkvm.boot import cpio
from hvkvm.errors import BootError

needs_cpio = pytest.mark.skipif(shutil.which("cpio") is None, reason="the cpio tool is not installed")


def _unpack(archive: bytes, folder: Path) -> None:
    subprocess.run(["cpio", "-idm", "--quiet"], input=archive, cwd=folder, check=True)


@needs_cpio
def test_cpio_tool_reads_back_files_links_and_modes(tmp_path: Path) -> None:
    entries = [
        cpio.regular("etc/one", b"x"),
        cpio.regular("etc/empty", b""),
        cpio.regular("bin/tool", b"#!/bin/sh\n" * 999, 0o755),
        cpio.symlink("bin/alias", "tool"),
        cpio.directory("var", 0o700),
    ]
    _unpack(cpio.pack(cpio.with_parents(entries)), tmp_path)
    assert (tmp_path / "etc/one").read_bytes() == b"x"
    assert (tmp_path / "etc/empty").read_bytes() == b""
    assert (tmp_path / "bin/tool").read_bytes() == b"#!/bin/sh\n" * 999
    assert (tmp_path / "bin/tool").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "bin/alias").readlink() == Path("tool")
    assert (tmp_path / "var").stat().st_mode & 0o777 == 0o700


@needs_cpio
def test_cpio_tool_lists_a_device_node() -> None:
    archive = cpio.pack([cpio.char_device("console", 5, 1)])
    listing = subprocess.run(["cpio", "-itv", "--quiet"], input=archive, stdout=subprocess.PIPE, check=True)
    words = listing.stdout.decode().split()
    assert words[0] == "crw-------"
    assert words[4:6] == ["5,", "1"]


@needs_cpio
@settings(deadline=None)
@given(
    files=st.dictionaries(st.from_regex(r"[a-z]{1,12}", fullmatch=True), st.binary(max_size=70), max_size=6)
)
def test_any_content_round_trips(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("tree")
    _unpack(cpio.pack(cpio.regular(name, data) for name, data in files.items()), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


@given(st.lists(st.binary(max_size=9), max_size=5))
def test_archives_can_be_joined(contents: list[bytes]) -> None:
    # The kernel looks for the next archive at a 4-byte boundary.
    assert len(cpio.pack(cpio.regular(f"f{n}", data) for n, data in enumerate(contents))) % 4 == 0


def test_same_input_same_bytes() -> None:
    entries = [cpio.regular("a", b"1"), cpio.regular("b", b"2")]
    assert cpio.pack(entries) == cpio.pack(entries)


def test_parents_come_first_and_once() -> None:
    names = [e.name for e in cpio.with_parents([cpio.regular("/a/b/c", b""), cpio.regular("a/b/d", b"")])]
    assert names == ["a", "a/b", "/a/b/c", "a/b/d"]


def test_leading_slash_is_dropped() -> None:
    assert cpio.pack([cpio.regular("/x", b"1")]) == cpio.pack([cpio.regular("x", b"1")])


@pytest.mark.parametrize("name", ["", "/", "a\0b", "x" * 5000])
def test_impossible_names_are_refused(name: str) -> None:
    with pytest.raises(BootError):
        cpio.pack([cpio.regular(name, b"")])
