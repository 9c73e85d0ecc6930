"""The root disk's cache: what is believed of it, and what is said when it cannot be made."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from steps import root_disk
from steps.distribution import StepError


class Offline:
    """An archive that has packages, and cannot install any."""

    def __init__(self, suite: str) -> None:
        self.suite = suite

    def refresh(self) -> None:
        pass

    def simulated_install(self, *words: str) -> str:
        assert {"?essential", "systemd-sysv", "hyperv-daemons"} <= set(words)
        return (
            "Inst libc6 (2.36-9 Debian:12 [amd64])\nConf libc6 (2.36-9)\nInst apt (2.6 Debian:12 [amd64])\n"
        )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HVKVM_CACHE", str(tmp_path))
    monkeypatch.setattr(root_disk, "Archive", Offline)
    monkeypatch.setattr(root_disk, "release_codename", lambda: "bookworm")
    return tmp_path


def made(*arguments: object) -> None:
    folder = arguments[-1]
    assert isinstance(folder, Path)
    folder.mkdir(parents=True)
    for path in root_disk.RootDisk.of(folder):
        path.touch()


def test_it_is_made_once_for_the_same_packages_and_recipe(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(root_disk, "_make", made)
    first = root_disk.root_disk()
    assert first.disk.is_relative_to(cache / "root")
    monkeypatch.setattr(root_disk, "_make", lambda *_: pytest.fail("made again"))
    assert root_disk.root_disk(offline=True) == root_disk.root_disk(update=True) == first
    assert root_disk.variables()["HVKVM_ROOT_DISK"] == str(first.disk)


def test_other_packages_or_another_recipe_make_another(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(root_disk, "_make", made)
    first = root_disk.root_disk()
    monkeypatch.setattr(Offline, "simulated_install", lambda *_: "Inst apt (2.7 Debian:12 [amd64])\n")
    second = root_disk.root_disk(update=True)
    monkeypatch.setattr(root_disk, "_EARLY", "true")
    third = root_disk.root_disk()
    assert len({first.disk, second.disk, third.disk}) == 3


def test_those_asked_for_last_are_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(root_disk, "_make", made)
    folders = []
    for number in range(root_disk.MOST + 2):
        monkeypatch.setattr(root_disk, "_EARLY", f"recipe {number}")
        folders.append(root_disk.root_disk().disk.parent)
        os.utime(folders[-1], (number, number))  # made long ago, one after the other
        if number == root_disk.MOST - 1:
            monkeypatch.setattr(root_disk, "_EARLY", "recipe 0")
            root_disk.root_disk()  # and the first is asked for again
            os.utime(folders[0], (100, 100))
    begun = cache / "root" / ".begun"
    begun.mkdir()
    abandoned = cache / "root" / ".abandoned"
    abandoned.mkdir()
    os.utime(abandoned, (1, 1))
    monkeypatch.setattr(root_disk, "_EARLY", "one more")
    last = root_disk.root_disk().disk.parent
    assert {path.name for path in (cache / "root").iterdir()} == {
        *(folder.name for folder in (folders[0], folders[-1], last)),
        ".begun",
    }


@pytest.mark.usefixtures("cache")
def test_offline_says_what_to_run() -> None:
    with pytest.raises(StepError, match="run scripts/root-disk --suite trixie make"):
        root_disk.root_disk("trixie", offline=True)
    assert root_disk.variables() == {}


def test_damaged_note_is_not_believed(cache: Path) -> None:
    (cache / "resolved").mkdir()
    for damage in ("", "[]", '{"folder": 1}', json.dumps({"folder": "x", "recipe": root_disk._recipe()})):
        (cache / "resolved/bookworm-root.json").write_text(damage)
        with pytest.raises(StepError):
            root_disk.root_disk(offline=True)


@pytest.mark.usefixtures("cache")
def test_missing_tools_are_named_before_anything_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(root_disk.shutil, "which", lambda tool: None if tool == "mmdebstrap" else tool)
    with pytest.raises(StepError, match=r"mmdebstrap, not installed here; run scripts/setup"):
        root_disk.root_disk()


def test_what_fails_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_arguments: object) -> None:
        raise StepError("mmdebstrap: E: no space left on device")

    monkeypatch.setattr(root_disk, "_install", no_space)
    with pytest.raises(StepError, match="no space"):
        root_disk.root_disk()
    assert list((cache / "root").iterdir()) == []


def test_a_tree_becomes_a_file_system_that_is_sound(tmp_path: Path) -> None:
    import subprocess
    import uuid

    source = tmp_path / "source"
    (source / "etc").mkdir(parents=True)
    (source / "etc/x").write_text("text")
    tarball, image = tmp_path / "root.tar", tmp_path / "disk.raw"
    subprocess.run(
        ["tar", "-C", str(source), "--owner=7", "--group=8", "--mode=4711", "-cf", str(tarball), "etc/x"],
        check=True,
    )
    name = uuid.UUID(int=5)
    root_disk._make_file_system(tarball, tmp_path / "tree", image, name, 8 << 20)
    assert not (tmp_path / "tree").exists()
    subprocess.run(["e2fsck", "-fn", str(image)], check=True, capture_output=True)
    seen = subprocess.run(
        ["debugfs", "-R", "stat /etc/x", str(image)], check=True, capture_output=True, text=True
    ).stdout
    assert "Mode:  04711" in seen
    assert "User:     7   Group:     8" in seen
