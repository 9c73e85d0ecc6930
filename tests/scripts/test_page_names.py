"""What the pages name of the code is there: files, and what is said to be in one."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("hvkvm", "tests", "scripts", "kvm_headers", ".ci", "docs")
OTHERS = {"FILE.toml", "hvkvm.lua", "guest.toml"}
"""Files of the reader's own."""
NO_MODULES = {"kernel.sysrq"}
"""Settings of the guest that look like a module of ours."""


def outside_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@cache
def files() -> dict[str, list[Path]]:
    """By their names without folders."""
    found: dict[str, list[Path]] = {}
    for path in [*(one for folder in FOLDERS for one in (ROOT / folder).rglob("*.*")), *ROOT.glob("*.*")]:
        if "__pycache__" not in path.parts:
            found.setdefault(path.name, []).append(path.relative_to(ROOT))
    return found


def named(path: str) -> list[Path]:
    """The files that a page may mean: it leaves out the folders that are plain from the words around it."""
    parts = Path(path).parts
    return [one for one in files().get(parts[-1], ()) if one.parts[-len(parts) :] == parts]


@cache
def classes() -> dict[str, set[str]]:
    """Of each class of ours, the names in it and in classes of its name elsewhere."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "hvkvm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                inside = set(re.findall(r"\w+", ast.unparse(node)))
                found.setdefault(node.name, set()).update(inside)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_file_that_is_named_is_there(page: Path) -> None:
    text = " ".join(re.findall(r"`([^`\n]+)`", outside_blocks(page)))
    for path in set(re.findall(r"[\w./*-]+\.(?:py|md|s|S|inc|toml|sh|yml|lua)\b", text)) - OTHERS:
        if "*" in path:
            assert any(one.match(path) for some in files().values() for one in some), path
        else:
            assert named(path), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_said_to_be_in_a_file_or_class_is_there(page: Path) -> None:
    text = outside_blocks(page)
    said = re.findall(r"`(\w+)(?:\(\))?`s? (?:of|in) (?:the table of )?`([\w/]+\.(?:py|s|inc))`", text)
    for folders, module, name in re.findall(r"`((?:\w+[./])*)(\w+)\.(\w+)(?:\([^`]*\))?`", text):
        path = f"{folders.replace('.', '/')}{module}.py"
        if f"{module}.{name}" in NO_MODULES or named(f"{module}.{name}") or named(f"{module}/{name}.py"):
            continue
        if named(path):
            said.append((name, path))
        elif module in classes() and not folders:
            assert name in classes()[module], f"{module}.{name}"
    for name, path in said:
        texts = [(ROOT / one).read_text() for one in named(path)]
        made = rf"\b(?:class|def|\.macro) {name}\b|^\s*(?:self\.)?{name}\b.*[:=]"
        assert any(re.search(made, text, re.MULTILINE) for text in texts), f"{name} in {path}"
