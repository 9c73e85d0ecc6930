"""docs/compatibility.md says of each enlightenment what `hvkvm features` says on this host."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from hvkvm.cli import main
from hvkvm.hyperv.enlightenments import ENLIGHTENMENTS, VERSION_FIELDS

PAGE = Path(__file__).parents[2] / "docs/compatibility.md"
COLUMNS = {"kvm": (1, "missing"), "user": (2, "user_missing")}


def section() -> str:
    """What is about the enlightenments' names."""
    return PAGE.read_text().split("## Enlightenments by their QEMU names", 1)[1].split("\n## ", 1)[0]


@pytest.mark.parametrize(
    "column",
    [pytest.param("user", marks=pytest.mark.kvm), pytest.param("kvm", marks=pytest.mark.hyperv)],
)
def test_table_of_enlightenments_is_right(column: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = re.findall(r"^\| `(hv-[\w-]+)` \| ([^|]+) \| ([^|]+) \|", section(), re.MULTILINE)
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


@pytest.mark.kvm
def test_a_name_that_is_left_out_of_the_table_is_named_and_is_none_of_the_user_synics(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before, table = section().split("| Name |", 1)
    in_table = set(re.findall(r"^\| `(hv-[\w-]+)` \|", table, re.MULTILINE))
    left_out = set(re.findall(r"`(hv-[\w-]+)`", before))
    assert main(["features", "--json"]) == 0
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)["features"]}
    assert in_table | left_out == set(found)
    assert [name for name in sorted(left_out) if not found[name]["user_missing"]] == []


def test_each_setting_of_hv_is_in_the_page() -> None:
    for row in ENLIGHTENMENTS:
        if row.value == "number":
            assert f"`hv-{row.name}=N`" in section()
        elif row.value == "tristate":
            assert f"`hv-{row.name}=auto`" in section()
    assert "`hv-vendor-id=TEXT`" in section()
    for name in VERSION_FIELDS:
        assert name.removeprefix("version-id") in section()
