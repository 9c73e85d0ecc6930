"""The documentation as a site: it builds without a warning, and has every page and the library."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {path.name for path in (ROOT / "docs").glob("*.md")}


def test_every_page_has_its_line_in_the_contents_and_on_the_first_page() -> None:
    listed = re.findall(r"^ +- .*: ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(PAGES | {"reference.md"})
    first = re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs/index.md").read_text())
    assert set(first) == PAGES - {"index.md"}


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs mkdocs: pip install -e '.[docs]'")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = {Path(name).stem for name in PAGES} | {"reference"}
    assert {page.stem for page in tmp_path.glob("*.html")} >= pages
    reference = (tmp_path / "reference.html").read_text()
    for name in ("MachineConfig", "ScriptedDevice", "open_route", "wait_for_stdout"):
        assert name in reference
