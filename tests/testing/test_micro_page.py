"""docs/testing.md has each macro of a micro guest, and says what it may overwrite."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hvkvm import testing

ROOT = Path(__file__).parents[2]
MACROS = re.findall(
    r"((?:^#.*\n)*)\.macro (\w+)", (Path(testing.__path__[0]) / "micro_macros.s").read_text(), re.MULTILINE
)


@pytest.mark.parametrize(("comment", "name"), MACROS, ids=lambda text: text if text.isidentifier() else "")
def test_a_macro_has_its_row(comment: str, name: str) -> None:
    page = (ROOT / "docs/testing.md").read_text()
    (row,) = re.findall(rf"^\|(?: |.*, )`{name}\b.*$", page, re.MULTILINE)
    for register in re.findall(r"\br[a-d0-9][x0-9]*|\brdi", "".join(re.findall(r"Clobbers.*", comment))):
        assert register in row
