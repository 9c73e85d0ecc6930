"""Apt's configuration as it is found on machines, and the cache without a network."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from steps import artifacts, distribution
from steps.distribution import Source, StepError

DEB822 = """\
# a comment
Types: deb deb-src
URIs: http://mirror.example/debian http://other.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
# another
Signed-By: /usr/share/keyrings/x.gpg

Types: deb-src
URIs: http://sources.example/debian
Suites: bookworm
Components: main

Enabled: no
Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main
"""


def test_deb822_entries() -> None:
    suites, components, key = (
        ("bookworm", "bookworm-updates"),
        ("main", "contrib"),
        "/usr/share/keyrings/x.gpg",
    )
    assert distribution._deb822(DEB822) == [
        Source("http://mirror.example/debian", suites, components, key),
        Source("http://other.example/debian", suites, components, key),
    ]


def test_one_line_entries() -> None:
    text = (
        "deb [arch=amd64 signed-by=/k.gpg] http://a.example/debian bookworm main contrib # why\n"
        "deb http://b.example/debian bookworm-updates main\n"
        "# deb http://off.example/debian bookworm main\n"
        "deb-src http://c.example/debian bookworm main\n"
    )
    assert distribution._one_line(text) == [
        Source("http://a.example/debian", ("bookworm",), ("main", "contrib"), "/k.gpg"),
        Source("http://b.example/debian", ("bookworm-updates",), ("main",), ""),
    ]


@given(st.text())
def test_any_text_is_parsed_or_passed_over(text: str) -> None:
    distribution._deb822(text)
    distribution._one_line(text)


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> None:
    main = Source("http://a.example/debian", ("bookworm", "bookworm-updates"), ("main", "contrib"), "/k.gpg")
    security = Source("http://s.example/security", ("bookworm-security",), ("main",), "")
    other = Source("http://node.example", ("nodistro",), ("main",), "")
    monkeypatch.setattr(distribution, "configured_sources", lambda: [other, main, security])
    monkeypatch.setattr(distribution, "release_codename", lambda: "bookworm")


@pytest.mark.usefixtures("configured")
def test_own_suite_keeps_updates_and_security_and_no_other_archive() -> None:
    assert [s.uri for s in distribution.sources_of(None)] == [
        "http://a.example/debian",
        "http://s.example/security",
    ]


@pytest.mark.usefixtures("configured")
def test_other_suite_is_the_main_archive_with_the_name_exchanged() -> None:
    assert distribution.sources_of("trixie") == [
        Source("http://a.example/debian", ("trixie",), ("main",), "/k.gpg")
    ]


def test_no_archive_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribution, "configured_sources", list)
    with pytest.raises(StepError, match=r"sources\.list"):
        distribution.sources_of(None)


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a trixie guest kernel in it and nothing else."""
    monkeypatch.setenv("HVKVM_CACHE", str(tmp_path))
    monkeypatch.setattr(artifacts, "Archive", lambda suite: pytest.fail("asked the archive"))
    monkeypatch.setattr(artifacts, "release_codename", lambda: "bookworm")
    entry = {"package": "linux-image-6.12.1-cloud-amd64", "version": "1:6.12.1-1"}
    (tmp_path / "resolved").mkdir()
    (tmp_path / "resolved/trixie-linux-image-cloud-amd64.json").write_text(json.dumps(entry))
    tree = tmp_path / "packages/linux-image-6.12.1-cloud-amd64_1%3a6.12.1-1"
    (tree / "boot").mkdir(parents=True)
    (tree / "boot/vmlinuz-6.12.1-cloud-amd64").touch()
    (tree / "usr/lib/modules/6.12.1-cloud-amd64/kernel").mkdir(parents=True)
    return tree


def test_cached_artifacts_need_no_archive(cached: Path) -> None:
    assert artifacts.path("guest-kernel", "trixie") == cached / "boot/vmlinuz-6.12.1-cloud-amd64"
    assert artifacts.path("guest-modules", "trixie").name == "6.12.1-cloud-amd64"
    kernels = {"HVKVM_GUEST_KERNEL", "HVKVM_GUEST_MODULES", "HVKVM_NEWER_KERNEL", "HVKVM_NEWER_MODULES"}
    # Of the newest one the cache has nothing.
    assert set(artifacts.variables("trixie")) == kernels


@pytest.mark.usefixtures("cached")
def test_offline_says_what_to_run() -> None:
    with pytest.raises(StepError, match="scripts/artifacts --suite trixie fetch lab-kernel"):
        artifacts.path("lab-kernel", "trixie", offline=True)


@pytest.mark.usefixtures("cached")
def test_what_one_suite_has_comes_from_there() -> None:
    with pytest.raises(StepError, match=r"efi-shell \(trixie\) .* --suite trixie fetch efi-shell"):
        artifacts.path("efi-shell", "sid", offline=True)


def test_damaged_note_is_not_believed(cached: Path) -> None:
    note = cached.parents[1] / "resolved/trixie-linux-image-cloud-amd64.json"
    for damage in ("", "[]", "{}", '{"package": "x", "version": "1"}', '{"package": 1, "version": []}'):
        note.write_text(damage)
        with pytest.raises(StepError):
            artifacts.path("guest-kernel", "trixie", offline=True)


RELEASE = "7.2.1-cloud-amd64"
SPLIT = {
    "linux-image-cloud-amd64": ("linux-base-cloud-amd64", f"linux-image-{RELEASE}"),
    f"linux-image-{RELEASE}": (
        "kmod",
        f"linux-base-{RELEASE}",
        f"linux-binary-{RELEASE}",
        f"linux-modules-{RELEASE}",
    ),
    f"linux-base-{RELEASE}": (),
    f"linux-binary-{RELEASE}": ("linux-initramfs-tool",),
    f"linux-modules-{RELEASE}": ("kmod",),
}
FILES = {
    f"linux-base-{RELEASE}": "modules.builtin",
    f"linux-binary-{RELEASE}": "vmlinuz",
    f"linux-modules-{RELEASE}": "kernel/drivers/hv/hv_utils.ko.xz",
}


@pytest.fixture
def split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive whose kernel is split among packages, as from Linux 7.2 on; real .deb files, no network."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is needed to make packages: this is not a Debian system")
    monkeypatch.setenv("HVKVM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(artifacts, "release_codename", lambda: "bookworm")
    debs = tmp_path / "debs"
    for name in SPLIT:
        folder = tmp_path / "build" / name
        (folder / "DEBIAN").mkdir(parents=True)
        (folder / "DEBIAN/control").write_text(
            f"Package: {name}\nVersion: 1\nArchitecture: amd64\nMaintainer: x\nDescription: x\n"
        )
        if name in FILES:
            file = folder / "usr/lib/modules" / RELEASE / FILES[name]
            file.parent.mkdir(parents=True)
            file.write_text(name)
        debs.mkdir(exist_ok=True)
        subprocess.run(["dpkg-deb", "--build", folder, debs / f"{name}.deb"], check=True, capture_output=True)

    def apt(self: distribution.Archive, tool: str, *words: str, cwd: Path | None = None) -> str:
        if tool == "apt-cache":
            name = words[-1].partition("=")[0]
            return f"Package: {name}\nVersion: 1\nDepends: {', '.join(f'{d} (= 1)' for d in SPLIT[name])}\n"
        for word in words[1:]:
            assert cwd is not None
            shutil.copy(debs / f"{word.partition('=')[0]}.deb", cwd)
        return ""

    monkeypatch.setattr(distribution.Archive, "_apt", apt)
    monkeypatch.setattr(artifacts, "_refreshed", distribution.Archive)
    return tmp_path / "cache/packages" / f"linux-image-{RELEASE}_1"


def test_a_kernel_that_is_split_among_packages_becomes_one_tree(split: Path) -> None:
    modules = split / "usr/lib/modules" / RELEASE
    assert artifacts.path("guest-kernel", "sid") == modules / "vmlinuz"
    assert artifacts.path("guest-modules", "sid", offline=True) == modules
    assert (modules / "modules.builtin").is_file()


def test_a_tree_from_before_the_split_was_known_is_fetched_again(split: Path) -> None:
    (split / "usr/share").mkdir(parents=True)
    note = split.parents[1] / "resolved/sid-linux-image-cloud-amd64.json"
    note.parent.mkdir()
    note.write_text(json.dumps({"package": f"linux-image-{RELEASE}", "version": "1"}))
    with pytest.raises(StepError, match="--suite sid fetch guest-kernel"):
        artifacts.path("guest-kernel", "sid", offline=True)
    assert artifacts.path("guest-kernel", "sid").read_text() == f"linux-binary-{RELEASE}"


def test_what_a_killed_run_had_begun_to_unpack_goes(split: Path) -> None:
    left = split.parent / ".linux-image-1_1.77"
    (left / "tree").mkdir(parents=True)
    artifacts.path("guest-kernel", "sid")
    assert sorted(one.name for one in split.parent.iterdir()) == [".lock", split.name]


def test_who_waits_for_another_run_takes_what_that_has_brought(
    split: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """apt's lists are for one process at a time: the second one failed."""
    found: list[Path] = []
    other = threading.Thread(target=lambda: found.append(artifacts.path("guest-kernel", "sid")))
    fetch = artifacts._fetch

    def slow(*words: Any) -> Path:
        other.start()
        while "waiting for another run" not in capsys.readouterr().err:
            time.sleep(0.01)
        return fetch(*words)

    monkeypatch.setattr(artifacts, "_fetch", slow)
    first = artifacts.path("guest-kernel", "sid")
    other.join(60)
    assert found == [first]


def test_a_cache_without_locks_is_filled_as_well(split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_fd: object, _how: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert artifacts.path("guest-kernel", "sid").is_relative_to(split)
