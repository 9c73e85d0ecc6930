"""scripts/setup, with programs in place of the system's package tools and of Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
PYTHON = """
echo "$*" >>"$LOG"
case $1 in
-c) [ "$2" != "import pip" ] || [ -e "${0%/*}/pip-there" ] ;;
-m)
	case $2 in
	venv)
		mkdir -p "$3/bin"
		cp "$0" "$3/bin/python"
		[ -z "${CUT_SHORT-}" ] || exit 1
		: >"$3/bin/pip-there"
		;;
	esac
	;;
esac
"""


class Clone:
    """A clone with a space in its path, and the programs that its setup finds."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.log = folder / "log"
        self.log.touch()
        self.place = folder / "a clone"
        (self.place / "scripts").mkdir(parents=True)
        shutil.copy(SCRIPTS / "setup", self.place / "scripts/setup")
        (self.place / "pyproject.toml").write_text("[project]\n")
        self.program("python3", PYTHON)
        # Everything is installed; there is nothing optional, and no npm that could be asked.
        found = re.search(r'^packages="([^"]*)"', (SCRIPTS / "setup").read_text(), re.M)
        assert found is not None
        self.program("dpkg-query", f"printf '%s installed\\n' {' '.join(found[1].split())}")
        self.program("apt-cache", "exit 100")
        self.program("npm", "exit 1")

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{text}\n")
        (self.bin / name).chmod(0o755)

    def setup(self, *, cwd: Path | None = None, **more: str) -> list[str]:
        """The lines by which Python made or filled an environment; `more` are variables."""
        self.log.write_text("")
        done = subprocess.run(
            ["scripts/setup" if cwd is None else os.path.relpath(self.place / "scripts/setup", cwd)],
            cwd=cwd or self.place,
            env={**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", "LOG": str(self.log), **more},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        self.said = done.stdout + done.stderr
        self.status = done.returncode
        return [line.split(" --")[0] for line in self.log.read_text().splitlines() if line.startswith("-m")]


MADE, FILLED = "-m venv .venv", "-m pip install -q"


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_a_second_run_does_nothing_and_another_pyproject_fills_it_again(clone: Clone) -> None:
    assert clone.setup() == [MADE, FILLED], clone.said
    assert clone.setup() == []
    (clone.place / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert clone.setup() == [FILLED]


def test_an_environment_that_was_cut_short_is_made_anew(clone: Clone) -> None:
    """It has a Python, and no pip: that failed for good."""
    assert clone.setup(CUT_SHORT="1") == [MADE]
    assert clone.status != 0
    assert clone.setup() == [MADE, FILLED], clone.said


def test_a_clone_that_was_moved_gets_another_environment(clone: Clone) -> None:
    """The programs in it begin with the path of its Python: make check found none of them."""
    assert clone.setup() == [MADE, FILLED]
    clone.place = clone.place.rename(clone.place.with_name("elsewhere"))
    assert clone.setup() == [MADE, FILLED]
    assert clone.setup() == []


def test_cdpath_leads_nowhere_else(clone: Clone, tmp_path: Path) -> None:
    """It made its environment in another folder, having removed the one that was there."""
    other = tmp_path / "other"
    for folder in ("scripts", ".venv"):
        (other / folder).mkdir(parents=True)
    assert clone.setup(CDPATH=str(other)) == [MADE, FILLED], clone.said
    assert sorted(one.name for one in other.iterdir()) == [".venv", "scripts"]
    assert list((other / ".venv").iterdir()) == []
    assert clone.setup(cwd=tmp_path, CDPATH=str(other)) == []
