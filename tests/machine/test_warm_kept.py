"""Kept warm guests: the same file for the same guest, another as soon as what shapes it is another."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hvkvm.machine import warm_kept
from hvkvm.machine.config import MachineConfig


def test_what_shapes_the_guest_is_in_its_key_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HVKVM_CACHE", str(tmp_path / "cache"))
    made: list[Path] = []

    def warm(_config: MachineConfig, path: Path, on_console: object) -> int:
        made.append(path)
        path.write_bytes(b"warm")
        return 4

    monkeypatch.setattr(warm_kept, "warm", warm)
    kernel, tool = tmp_path / "kernel", tmp_path / "tool"
    kernel.write_bytes(b"kernel")
    tool.write_bytes(b"tool")
    config = MachineConfig(kernel=kernel)
    assert warm_kept.find(config) is None
    first = warm_kept.kept(config)
    assert warm_kept.find(config) == first
    assert first.parent == tmp_path / "cache" / "warm"
    for same in (config, config._replace(timeout=5, name="x", control="auto")):
        assert warm_kept.kept(same) == first
    assert made == [first]
    others = [
        config._replace(cpus=2),
        config._replace(memory=256 << 20),
        config._replace(hv="none"),
        config._replace(append="quiet"),
        config._replace(vmbus="on"),
        config._replace(modules=("x",)),
        config._replace(files=(("/x", tool),)),
    ]
    paths = [warm_kept.kept(other) for other in others]
    tool.write_bytes(b"another tool")
    paths.append(warm_kept.kept(others[-1]))
    os.utime(kernel, ns=(1, 1))
    paths.append(warm_kept.kept(config))
    assert len({first, *paths}) == len(paths) + 1
    left = {path for path in (first, *paths) if path.exists()}
    assert (len(left), first in left, paths[-1] in left) == (warm_kept.MOST, False, True), "the oldest went"


def test_what_a_killed_one_left_half_saved_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has all that the guest touched of its RAM, and nothing else looks for it."""
    monkeypatch.setenv("HVKVM_CACHE", str(tmp_path))
    monkeypatch.setattr(warm_kept, "warm", lambda _config, path, on_console: path.write_bytes(b"warm"))
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"kernel")
    half = tmp_path / "warm" / ".0123.state.4567.partial"
    half.parent.mkdir()
    half.write_bytes(b"half")
    file = warm_kept.kept(MachineConfig(kernel=kernel))
    assert os.listdir(half.parent) == [file.name]
