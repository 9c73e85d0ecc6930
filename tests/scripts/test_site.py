"""The documentation as a site: it builds without a warning, and has every page and the library."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs mkdocs: pip install -e '.[docs]'")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} | {"reference"}
    assert {page.stem for page in tmp_path.glob("*.html")} >= pages
    reference = (tmp_path / "reference.html").read_text()
    for name in ("MachineConfig", "ScriptedDevice", "open_route", "wait_for_stdout"):
        assert name in reference
