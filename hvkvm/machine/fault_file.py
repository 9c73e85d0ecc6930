"""The file of `--disk ...,faults=FILE`: a TOML table of faults, made into a plan for the disk.

    seed = 7

    [[fault]]
    do = "error"
    op = "read"
    lba = "2048-4095"
    times = 3
    sense = "medium-error"

`FaultSpec` is one fault. ConfigError names the file, the fault and the key.
"""

# No `from __future__ import annotations`: the annotations are the table, and read at run time.

import re
from pathlib import Path
from typing import Annotated, Any

from hvkvm import given_file
from hvkvm.abi.scsi import Sense
from hvkvm.devices.scsi.fault_rules import OPERATIONS, SENSES, Action, Plan, Rule
from hvkvm.errors import ConfigError
from hvkvm.machine.config_fields import Field, check_values, read_table
from hvkvm.machine.config_kinds import Choice, Kind, Number, OnOff, Seconds, check_range, said, wrong_type
from hvkvm.machine.toml_file import parse_toml
from hvkvm.tuples import NamedTuple

MAX_RULES = 64
MAX_SECONDS = 3600.0
_MAX_LBA = (1 << 63) - 1
_MAX_COUNT = 1 << 32


class _Range(Kind):
    """Text "FIRST-LAST", or one LBA as text or number."""

    takes = 'a sector, or text such as "2048-4095"'
    types = ()

    def from_text(self, name: str, text: str, folder: Path | None = None) -> tuple[int, int]:
        found = re.fullmatch(r"(\d{1,19})(?:-(\d{1,19}))?", text, re.ASCII)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not first <= last <= _MAX_LBA:
            raise ConfigError(f"{said(name, text)}: no range of sectors; write FIRST-LAST, such as 2048-4095")
        return first, last

    def from_plain(self, name: str, value: object, folder: Path | None) -> tuple[int, int]:
        is_number = isinstance(value, int) and not isinstance(value, bool)
        check_range(name, value)
        return super().from_plain(name, str(value) if is_number else value, folder)  # type: ignore[no-any-return]


class _Sense(Kind):
    """A name of SENSES, or "KEY/ASC/ASCQ" in hexadecimal, as sg3_utils and Linux print them."""

    types = ()

    def from_text(self, name: str, text: str, folder: Path | None = None) -> Sense:
        if text in SENSES:
            return SENSES[text]
        if not re.fullmatch(r"[0-9a-fA-F](/[0-9a-fA-F]{1,2}){1,2}", text, re.ASCII):
            raise ConfigError(
                f"{said(name, text)}: no sense; choose {', '.join(SENSES)}, or KEY/ASC/ASCQ such as 3/11/00"
            )
        return Sense(*(int(part, 16) for part in text.split("/")))


class _Operations(Kind):
    """A name of OPERATIONS, the number of an operation code, or a list of these."""

    takes = "an operation's name in quotes, an operation code, or a list of these"
    types = ()

    def from_plain(self, name: str, value: object, folder: Path | None) -> frozenset[int]:
        if isinstance(value, list | tuple):
            return frozenset().union(*(self.from_plain(name, item, folder) for item in value))
        if isinstance(value, int) and not isinstance(value, bool):
            if 0 <= value < 256:
                return frozenset((value,))
            check_range(name, value)
            raise ConfigError(f"{said(name, value)}: no operation code; they are 0 to 255")
        if not isinstance(value, str):
            raise wrong_type(name, value, self.takes)
        if value not in OPERATIONS:
            raise ConfigError(
                f"{said(name, value)}: unknown; choose {', '.join(OPERATIONS)}, or an operation code"
            )
        return OPERATIONS[value]


def _count(name: str, value: int) -> None:
    if not 0 <= value <= _MAX_COUNT:
        raise ConfigError(f"{said(name, value)}: not 0 to {_MAX_COUNT}; choose a number in that range")


def _sectors(name: str, value: int) -> None:
    if not 1 <= value < 1 << 16:
        raise ConfigError(f"{said(name, value)}: not 1 to {(1 << 16) - 1}; choose a number in that range")


def _seconds(name: str, value: float) -> None:
    if not 0 <= value <= MAX_SECONDS:
        raise ConfigError(f"{said(name, value)}: not 0 to {MAX_SECONDS:g}; choose a number in that range")


def _probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{said(name, value)}: not 0 to 1; choose a number in that range")


class FaultSpec(NamedTuple):
    """One [[fault]]."""

    do: Annotated[str, Field(Choice(tuple(one.value for one in Action)))]
    op: Annotated[frozenset[int], Field(_Operations())] = OPERATIONS["any"]
    lba: Annotated[tuple[int, int] | None, Field(_Range())] = None
    after: Annotated[int, Field(Number(10), check=_count)] = 0
    times: Annotated[int, Field(Number(1), check=_count)] = _MAX_COUNT
    probability: Annotated[float, Field(Seconds(0.5), check=_probability)] = 1.0
    seconds: Annotated[float, Field(Seconds(0.1), check=_seconds)] = 1.0
    sense: Annotated[Sense | None, Field(_Sense())] = None
    sectors: Annotated[int, Field(Number(1), check=_sectors)] = 1
    good: Annotated[bool, Field(OnOff())] = False

    @property
    def rule(self) -> Rule:
        """The same for the disk."""
        action = Action(self.do)
        usual = SENSES["write-error" if action is Action.TORN else "medium-error"]
        return Rule(
            action,
            self.op,
            self.lba[0] if self.lba else None,
            self.lba[1] if self.lba else None,
            after=self.after,
            times=None if self.times == _MAX_COUNT else self.times,
            probability=self.probability,
            seconds=self.seconds,
            sense=self.sense or usual,
            sectors=self.sectors,
            good=self.good,
        )


def read_plan(path: Path, name: str = "--disk faults=") -> Plan:
    """The plan in a file. ConfigError, which begins with `name`."""
    where = said(name, path)
    try:
        content = given_file.read(path)
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}; give a readable TOML file") from None
    return plan_of(parse_toml(content, where), where)


def plan_of(values: dict[str, Any], where: str) -> Plan:
    """The plan in a TOML table. ConfigError, which begins with `where`."""
    unknown = sorted(set(values) - {"seed", "fault"})
    if unknown:
        raise ConfigError(f"{where}: {unknown[0]}: unknown; the keys are seed and [[fault]]")
    seed, faults = values.get("seed", 0), values.get("fault", [])
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ConfigError(f"{where}: seed: not a number; write one, such as seed = 7")
    if not isinstance(faults, list) or not all(isinstance(one, dict) for one in faults):
        raise ConfigError(f"{where}: fault: not a list of tables; write each fault under [[fault]]")
    if len(faults) > MAX_RULES:
        raise ConfigError(f"{where}: {len(faults)} faults; a disk takes up to {MAX_RULES}")
    rules = []
    for number, one in enumerate(faults, 1):
        prefix = f"{where}: fault {number}:"
        if "do" not in one:
            raise ConfigError(f'{prefix} no do; say what is to happen, such as do = "error"')
        spec = FaultSpec(**read_table(FaultSpec, one, None, prefix))
        check_values(spec, prefix)
        rules.append(spec.rule)
    return Plan(rules, seed)
