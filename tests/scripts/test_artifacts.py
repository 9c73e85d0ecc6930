"""Apt's configuration as it is found on machines, and the cache without a network."""

from __future__ import annotations

import json
from pathlib import Path

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
    (tree / "usr/lib/modules/6.12.1-cloud-amd64").mkdir(parents=True)
    return tree


def test_cached_artifacts_need_no_archive(cached: Path) -> None:
    assert artifacts.path("guest-kernel", "trixie") == cached / "boot/vmlinuz-6.12.1-cloud-amd64"
    assert artifacts.path("guest-modules", "trixie").name == "6.12.1-cloud-amd64"
    kernels = {"HVKVM_GUEST_KERNEL", "HVKVM_GUEST_MODULES", "HVKVM_NEWER_KERNEL", "HVKVM_NEWER_MODULES"}
    assert set(artifacts.variables("trixie")) == kernels


@pytest.mark.usefixtures("cached")
def test_offline_says_what_to_run() -> None:
    with pytest.raises(StepError, match="scripts/artifacts fetch lab-kernel"):
        artifacts.path("lab-kernel", "trixie", offline=True)


def test_damaged_note_is_not_believed(cached: Path) -> None:
    note = cached.parents[1] / "resolved/trixie-linux-image-cloud-amd64.json"
    for damage in ("", "[]", "{}", '{"package": "x", "version": "1"}', '{"package": 1, "version": []}'):
        note.write_text(damage)
        with pytest.raises(StepError):
            artifacts.path("guest-kernel", "trixie", offline=True)
