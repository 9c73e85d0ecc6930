"""The look for dead code finds what is dead: else `make check` would be content with anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from steps import dead_code

SOURCE = '''
"""A module."""
FAR = 1
NEAR = 2

class Used:
    def dead(self): ...
    def tested(self): ...
    def press(self): ...

def gone(): ...

def called():
    return Used(), NEAR
    print("never")

called()
'''


TEST = """
def test_it():
    Used().tested()
    Used().press()
"""


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for folder in (*dead_code.OURS, "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "hvkvm/module.py").write_text(SOURCE)
    (tmp_path / "tests/test_module.py").write_text(TEST)
    (tmp_path / "scripts/tool").write_text("#!/usr/bin/env python3\ndef unused_tool(): ...\n")
    monkeypatch.setattr(dead_code, "ROOT", tmp_path)
    return tmp_path


def test_what_is_dead_is_named_and_what_lives_is_not(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dead_code.main() == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("scripts/steps/")]
    assert [line.partition(";")[0] for line in lines] == [
        "hvkvm/module.py:3: variable FAR: nobody uses it",
        "hvkvm/module.py:7: method dead: nobody uses it",
        "hvkvm/module.py:11: function gone: nobody uses it",
        "hvkvm/module.py:15: unreachable_code return: nobody uses it",
        "scripts/tool:2: function unused_tool: nobody uses it",
        "hvkvm/module.py:8: method tested: only tests use it",
    ]


def test_a_tree_without_any_is_content(tree: Path) -> None:
    (tree / "hvkvm/module.py").write_text("def called():\n    return 1\n\ncalled()\n")
    (tree / "scripts/tool").unlink()
    (tree / "tests/test_module.py").write_text("")
    assert dead_code.main() == 0
