"""scripts/run, behind `make run`, with scripts in place of the lab and of what fetches kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from hvkvm.boot import cache

SCRIPTS = Path(__file__).parents[2] / "scripts"
PAGE = "this line is a page of the host: hv_netvsc and passt\n"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home, in whose cache the guest's disk is already."""
    disk = tmp_path / "home/.cache/hvkvm/guests/run-disk-1.raw"
    disk.parent.mkdir(parents=True)
    disk.touch()
    return tmp_path / "home"


@pytest.fixture
def bin_(tmp_path: Path, home: Path) -> Path:
    """A folder for PATH: who asks the system for the user's home gets `home`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program(folder / "getent", f"echo root:x:0:0::{home}:/bin/sh")
    return folder


def program(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def settings(bin_: Path, **more: str) -> dict[str, str]:
    ours = {name: text for name, text in os.environ.items() if name != "HOME" and "HVKVM" not in name}
    return {**ours, "PATH": f"{bin_}:{os.environ['PATH']}", **more}


def run(tmp_path: Path, bin_: Path, **more: str) -> tuple[list[str], str]:
    """What the lab is asked to run, and what is said."""
    scripts = tmp_path / "scripts"
    (scripts / "steps").mkdir(parents=True, exist_ok=True)
    for name in ("run", "steps/cache.sh"):
        shutil.copy(SCRIPTS / name, scripts / name)
    program(scripts / "artifacts", "echo /an/artifact")
    program(scripts / "lab", 'printf "%s\\n" "$@"')
    words = [scripts / "run"]
    done = subprocess.run(
        words, env=settings(bin_, **more), capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done
    return done.stdout.splitlines(), done.stderr


def test_without_a_home_the_cache_is_where_hvkvm_finds_it(
    tmp_path: Path, bin_: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    homes = ({}, {"HOME": ""}, {"HOME": "/a home"}, {"HOME": "home"})
    for more in (*homes, {"HVKVM_CACHE": "/a cache"}, {"HVKVM_CACHE": ""}, {"HVKVM_CACHE": "a cache"}):
        line = [SCRIPTS / "steps/cache.sh"]
        said = subprocess.check_output(line, env=settings(bin_, **more), text=True, timeout=60)
        with monkeypatch.context() as here:
            here.setattr(cache, "_home", lambda: str(home))
            for name in ("HOME", "HVKVM_CACHE"):
                here.setenv(name, more.get(name, ""))
            assert said == f"{cache.root()}\n"
    # The cache of a user that the system does not know is none: it was a folder named ~ where one stood.
    program(bin_ / "getent", "exit 2")
    said = subprocess.check_output([SCRIPTS / "steps/cache.sh"], env=settings(bin_), text=True, timeout=60)
    with monkeypatch.context() as here:
        here.setenv("HOME", "")
        here.delenv("HVKVM_CACHE", raising=False)
        here.setattr("pwd.getpwuid", {}.__getitem__)
        assert said == f"{cache.root()}\n" == "/nonexistent/.cache/hvkvm\n"
    program(bin_ / "getent", f"echo root:x:0:0::{home}:/bin/sh")
    asked, said = run(tmp_path, bin_)
    assert f"{home}/.cache/hvkvm/guests/run-disk-1.raw,snapshot=on" in asked
    assert asked[:2] == ["--rw", f"{home}/.cache/hvkvm/warm"]
    assert said == ""


def test_the_page_is_written_once(tmp_path: Path, bin_: Path, home: Path) -> None:
    page = home / ".cache/hvkvm/guests/run-page/index.html"
    for before in ("", "another"):
        if before:
            page.write_text(before)
        asked, _said = run(tmp_path, bin_)
        assert page.read_text() == PAGE
        assert str(page) in asked
    os.utime(page, (1, 1))
    assert str(page) in run(tmp_path, bin_)[0]
    assert page.stat().st_mtime == 1


def test_a_cache_that_takes_nothing_costs_the_network_and_the_kept_guest(
    tmp_path: Path, bin_: Path, home: Path
) -> None:
    guests = home / ".cache/hvkvm/guests"
    (guests / "run-page").write_text("no folder")
    (guests.parent / "warm").write_text("no folder")
    asked, said = run(tmp_path, bin_)
    assert said.splitlines() == [
        f"run: no guest can be kept in {guests.parent}/warm; one is booted",
        f"run: {guests}/run-page/index.html cannot be written, so the guest has no network",
    ]
    assert asked[0] == "--"
    assert asked[1].endswith("/.venv/bin/hvkvm")
    assert asked[2] == "run"


def test_a_key_is_made_without_a_home(tmp_path: Path, bin_: Path, home: Path) -> None:
    program(bin_ / "ssh-keygen", 'for last; do :; done; touch "$last" "$last.pub"')
    done = subprocess.run(
        [SCRIPTS / "steps/ssh_key.sh"],
        env=settings(bin_),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == f"{home}/.cache/hvkvm/ssh/id_ed25519\n"
    assert Path(done.stdout.strip()).exists()


def test_cdpath_leads_to_no_other_scripts(tmp_path: Path, bin_: Path) -> None:
    (tmp_path / "other/scripts").mkdir(parents=True)
    run(tmp_path, bin_)
    done = subprocess.run(
        ["scripts/run"],
        cwd=tmp_path,
        env=settings(bin_, CDPATH=str(tmp_path / "other")),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "/an/artifact" in done.stdout


def test_two_that_make_the_key_at_once_have_both_halves_of_one(
    tmp_path: Path, bin_: Path, home: Path
) -> None:
    program(bin_ / "ssh-keygen", 'for last; do :; done; echo $$ >"$last"; echo $$ >"$last.pub"')
    # The first one waits for the other between its halves; not for ever, since the other may wait for it.
    program(
        bin_ / "mv",
        f"""
case $ROLE:$1 in
first:*.pub) ;;
first:*)
	: >{tmp_path}/halfway
	n=0
	until [ -e {tmp_path}/second ] || [ $((n += 1)) -gt 30 ]; do sleep 0.1; done
	;;
esac
PATH=${{PATH#*:}} exec mv "$@"
""",
    )
    line = [SCRIPTS / "steps/ssh_key.sh"]
    with subprocess.Popen(line, env=settings(bin_, ROLE="first"), stdout=subprocess.PIPE) as first:
        while not (tmp_path / "halfway").exists():
            assert first.poll() is None
            time.sleep(0.01)
        subprocess.run(line, env=settings(bin_, ROLE="second"), capture_output=True, check=True, timeout=60)
        (tmp_path / "second").touch()
    key = home / ".cache/hvkvm/ssh/id_ed25519"
    assert (first.returncode, key.read_text()) == (0, key.with_suffix(".pub").read_text())
