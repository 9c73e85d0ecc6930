"""The documentation as a site: it builds without a warning, and has every page and the library."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from steps import site

from hvkvm import errors

ROOT = Path(__file__).parents[2]
PAGES = {path.name for path in (ROOT / "docs").glob("*.md")}


def test_every_page_has_its_line_in_the_contents_and_on_the_first_page() -> None:
    listed = re.findall(r"^ +- .*: ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(PAGES | {"reference.md"})
    first = re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs/index.md").read_text())
    assert set(first) == PAGES - {"index.md"}


def test_the_order_of_imports_is_the_one_that_is_held() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (held,) = [one["layers"] for one in settings["contracts"] if one["type"] == "layers"]
    page = " ".join((ROOT / "docs/architecture.md").read_text().split())
    (said,) = re.findall(r"Imports point one way, down: `([^`]*)`", page)
    assert [set(layer.split(", ")) for layer in said.split(" > ")] == [
        set(re.findall(r"\w+", layer)) for layer in held
    ]


def test_the_first_page_says_which_python_is_needed() -> None:
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    first = (ROOT / "docs/index.md").read_text()
    assert f"Python {needed.removeprefix('>=')} or newer" in first


def test_each_extra_is_named_where_its_use_is() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = "".join(page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    wanted = set(extras) - {"dev", "docs"}  # those are for who changes hvkvm
    assert set(re.findall(r"hvkvm\[(\w+)\]", text)) == wanted


def test_what_the_pages_name_for_programs_is_in_the_reference() -> None:
    """Its first line says that what is not there is not for users."""
    pages = [ROOT / "README.md", *(ROOT / "docs" / name for name in PAGES - {"cookbook.md"})]
    text = "".join(page.read_text() for page in pages)
    named = set(re.findall(r"`(hvkvm(?:\.\w+){2,})", text)) - {"hvkvm.message.openchannel.relid"}
    assert len(named) > 5
    listed = {module for _title, module, _names in site.PUBLIC}
    listed |= {f"{module}.{name}" for _title, module, names in site.PUBLIC for name in names}
    assert named - listed == set()


def test_the_reference_is_the_same_each_time_and_names_what_it_speaks_of() -> None:
    text = site.reference()
    assert re.findall(r".*(?: at 0x[0-9a-f]{6}|ForwardRef|object at).*", text) == []
    assert "- `Ending.PANIC`: guest panic" in text
    assert "- `cpus` (`--cpus`): vCPUs (1)\n" in text
    assert "- `readonly`: refuse the guest's writes\n" in text
    assert "Annotated" not in text
    words = set(re.findall(r"\b[A-Z]\w+\b", text))
    own = {word for word in words if isinstance(getattr(errors, word, None), type)}
    assert [name for name in sorted(own) if f"### {name}\n" not in text] == []
    for name in ("board.attach_sink", "`bus`"):  # of a Machine, by README.md and docs/testing.md
        assert name in text.partition("### Machine\n")[2].partition("**")[0]


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
