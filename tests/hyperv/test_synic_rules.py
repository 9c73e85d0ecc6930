"""docs/synic-rules.md tells the truth: a row for each rule; every file and test that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs/synic-rules.md"
UNTESTED = {55}
"""The kernel's own."""


def rows() -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for line in DOCUMENT.read_text().splitlines():
        if match := re.match(r"\| S(\d+) \|", line):
            assert int(match[1]) not in found, line
            found[int(match[1])] = [cell.strip() for cell in line.strip("|").split(" | ")]
    return found


def test_every_rule_has_one_row_with_every_cell() -> None:
    table = rows()
    assert list(table) == list(range(1, 63))
    assert all(len(cells) == 5 and all(cells) for cells in table.values())


@pytest.mark.parametrize("number", sorted(set(range(1, 63)) - UNTESTED))
def test_every_row_names_files_and_tests_that_exist(number: int) -> None:
    _, _, where, tests, _ = rows()[number]
    for path in re.findall(r"`([\w/]+\.py)`", where):
        assert (ROOT / "hvkvm/hyperv" / path).exists() or (ROOT / "hvkvm" / path).exists(), path
    names = re.findall(r"`(test_\w+)`", tests)
    assert names
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in names:
        assert f"def {name}(" in sources, name
