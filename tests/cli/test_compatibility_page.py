"""docs/compatibility.md says of each enlightenment what `hvkvm features` says on this host."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from hvkvm.cli import main

PAGE = Path(__file__).parents[2] / "docs/compatibility.md"
COLUMNS = {"kvm": (1, "missing"), "user": (2, "user_missing")}


@pytest.mark.parametrize(
    "column",
    [pytest.param("user", marks=pytest.mark.kvm), pytest.param("kvm", marks=pytest.mark.hyperv)],
)
def test_table_of_enlightenments_is_right(column: str, capsys: pytest.CaptureFixture[str]) -> None:
    section = PAGE.read_text().split("## Enlightenments by their QEMU names", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `(hv-[\w-]+)` \| ([^|]+) \| ([^|]+) \|", section, re.MULTILINE)
    assert main(["features", "--json"]) == 0
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)["features"]}
    cell, key = COLUMNS[column]
    said = {row[0]: row[cell].strip() for row in rows}
    # Those depend on the host's processor and kernel.
    said.pop("hv-tsc-invariant")
    if column == "kvm" and tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) < (6, 1):
        # The column is of Linux 6.1: an older one may lack what it names, but has nothing beyond it.
        said = {name: word for name, word in said.items() if not found[name][key]}
    assert said == {name: "no" if found[name][key] else "yes" for name in said}
