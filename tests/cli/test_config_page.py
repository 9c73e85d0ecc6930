"""docs/config.md has every key of a machine, the pages of disks and networks every key of theirs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from hvkvm.cli import run
from hvkvm.devices.scsi.fault_rules import OPERATIONS, SENSES, Action
from hvkvm.errors import ConfigError
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.config_fields import Field, fields_of, read_table
from hvkvm.machine.config_words import Structured
from hvkvm.machine.disk_spec import CdromSpec, DiskSpec
from hvkvm.machine.fault_file import FaultSpec, plan_of
from hvkvm.machine.nic_spec import NicSpec
from hvkvm.machine.record_spec import RecordSpec

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "config.md").read_text()
TABLES: list[Any] = [MachineConfig, DiskSpec, CdromSpec, NicSpec, RecordSpec, FaultSpec]


def flag_of(key: str) -> str:
    """The flag that the page's rule makes of a key."""
    return "--" + key.replace("_", "-")


def rows() -> dict[str, str]:
    """The table's keys, each with the flag beside it."""
    machine = PAGE.partition("## The environment")[0]
    found = {}
    for keys, flags in re.findall(r"^\| (`[^|]+) \| ([^|]+) \|", machine, re.MULTILINE):
        names = re.findall(r"`([^`]+)`", flags) if flags.startswith("`--") else []
        for number, key in enumerate(re.findall(r"`(\w+)`", keys)):
            found[key] = names[number] if names else ""
    return found


def test_each_key_has_the_flag_that_the_page_says() -> None:
    fields = fields_of(MachineConfig)
    listed = rows()
    assert set(listed) <= set(fields)
    said = {key: listed.get(key, flag_of(key)) for key in fields}
    assert said == {key: field.flag for key, field in fields.items()}
    assert listed["record"] == "--record"  # which is a list all the same
    repeated = {key for key, field in fields.items() if field.kind.repeated}
    assert repeated <= set(listed)


def test_flags_without_a_key_are_named() -> None:
    flags = {name for action in run.parser()._actions for name in action.option_strings}
    mine = flags - {field.flag for field in fields_of(MachineConfig).values()} - {"-h", "--help", "--config"}
    (line,) = re.findall(r"^(.*have no keys)\.$", PAGE, re.MULTILINE)
    assert set(re.findall(r"`(-[\w-]+)`", line)) == mine | {"--output"}


def test_the_example_is_a_machine(tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    for name in ("vmlinuz", "disk.raw", "data.raw", "test"):
        (tmp_path / name).write_bytes(b"\0")
    (tmp_path / "modules").mkdir()
    config = MachineConfig.from_mapping(tomllib.loads(block), tmp_path)
    assert config.kernel == tmp_path / "vmlinuz"
    assert [disk.readonly for disk in config.disks] == [False, True]
    assert config.files == (("/root/test", tmp_path / "test"),)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_a_value_of_another_type_is_refused_with_what_to_write(table: Any) -> None:
    for key, field in fields_of(table).items():
        wrong: object = {1: 2}  # which nothing takes
        with pytest.raises(ConfigError, match=f"^config key {key}: .*; write ") as caught:
            read_table(table, {key: wrong}, None)
        assert "\n" not in str(caught.value)
        assert field.kind.takes in str(caught.value) or "not a size" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("vmbus = true", 'vmbus: true has the wrong type; write "on" or "off"'),
        ('acpi = "off"', "acpi: 'off' has the wrong type; write true or false, without quotes"),
        ('cpus = "2"', "cpus: '2' has the wrong type; write a whole number without quotes, such as 2"),
        ('modules = "x"', "modules: 'x' has the wrong type; write a list of texts"),
        ('disks = [{file = "x", sector = 512}]', 'disks[0] sector: 512 has the wrong type; write "512" or'),
        ('nets = [{backend = "user", delay = 1}]', "delay: 1 has the wrong type; write text with its unit"),
    ],
)
def test_what_toml_users_write_first_is_told_from_what_is_right(text: str, line: str) -> None:
    with pytest.raises(ConfigError, match=f"^config key .*{re.escape(line)}"):
        MachineConfig.from_mapping({"kernel": "/dev/null", **tomllib.loads(text)})


def keys_of(page: str) -> set[str]:
    """What stands in the first column of a page's tables, or before the = there."""
    found = set()
    for cell in re.findall(r"^\| (`.*?) \| ", (DOCS / page).read_text(), re.MULTILINE):
        found |= set(re.findall(r"`([a-z-]+)[=`]", cell))
    return found


@pytest.mark.parametrize(
    ("table", "page"),
    [(DiskSpec, "disks.md"), (CdromSpec, "disks.md"), (NicSpec, "network.md"), (FaultSpec, "disks.md")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_each_key_of_a_structured_option_is_in_its_page(table: Any, page: str) -> None:
    keys = set(fields_of(table)) - {"file", "backend"}
    if table is FaultSpec:
        (block,) = re.findall(r"```toml\n(seed = .*?)```", (DOCS / page).read_text(), re.DOTALL)
        said = set(re.findall(r"^(\w+) =", block, re.MULTILINE))
        said |= set(re.findall(r"`(\w+)(?: = \w+)?`", (DOCS / page).read_text()))
    else:
        said = keys_of(page)
    assert keys - said == set()


def test_every_structured_option_is_looked_at() -> None:
    kinds = [field.kind for field in fields_of(MachineConfig).values()]
    assert {kind.type() for kind in kinds if isinstance(kind, Structured)} <= set(TABLES)
    assert isinstance(fields_of(MachineConfig)["cpus"], Field)


def test_each_variable_of_the_environment_is_listed() -> None:
    package = DOCS.parent / "hvkvm"
    read = {
        name for file in package.rglob("*.py") for name in re.findall(r"\bHVKVM_[A-Z_]+", file.read_text())
    }
    listed = re.findall(r"`(HVKVM_[A-Z_]+)`", PAGE.partition("## The environment")[2])
    assert set(listed) == read


def test_the_faults_of_the_page_are_a_plan_and_all_of_its_words_are_known() -> None:
    page = (DOCS / "disks.md").read_text()
    (block,) = re.findall(r"```toml\n(seed = .*?)```", page, re.DOTALL)
    plan = plan_of(tomllib.loads(block), "page")
    assert (plan.seed, len(plan.rules)) == (7, 1)
    assert [name for name in (*SENSES, *OPERATIONS) if name not in block] == []
    rows = re.findall(r"^\| `(\w+)` \| .*$", page.partition("| `do` |")[2].partition("\n\n")[0], re.MULTILINE)
    assert set(rows) == {action.value for action in Action}
