"""Fields of a configuration: a NamedTuple whose annotations carry a `Field` is a table of them.

    cpus: Annotated[int, Field(Number(2), "--cpus N", "vCPUs (1)", check_cpus)] = 1

is the key, the type, the default, and by its `Field` all that the command line, TOML and the
checks need. `MachineConfig` is such a table; so is the type of each structured option, such as
`--disk FILE,key=value,...` (`config_words`).

A module with a table has no `from __future__ import annotations`: its annotations must be
objects, not text. A type that is only imported for type checkers stands in quotes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvkvm.errors import ConfigError
from hvkvm.machine.config_kinds import Check, Kind, check_type
from hvkvm.tuples import NamedTuple


class Field(NamedTuple):
    """One row of the table."""

    kind: Kind
    option: str = ""
    """Of `hvkvm run`, with what it takes: "--cpus N"; "" for a key that has none. In a structured
    option, what stands behind the key's = in its help."""
    help: str = ""
    check: Check | None = None
    """Called with the flag and the value, after the kind's own check."""
    in_saved: bool = False
    """A saved machine has it already: with `--restore` it cannot be asked for."""
    boot_only: bool = False
    """Makes sense only for a machine that boots: with `--restore` it cannot be given."""

    @property
    def flag(self) -> str:
        """Such as "--cpus", or ""."""
        return self.option.partition(" ")[0]

    @property
    def metavar(self) -> str | None:
        """What the flag takes, as the help shows it; None for a flag that takes nothing."""
        return self.option.partition(" ")[2] or None

    def name(self, key: str) -> str:
        """How an error calls it."""
        return self.flag or f"config key {key}"


def fields_of(table: type[Any]) -> Mapping[str, Field]:
    """Every key of `table`, a NamedTuple class, with its Field, in order."""
    found: dict[str, Field] = {}
    for key, annotation in table.__annotations__.items():
        (found[key],) = annotation.__metadata__
    return found


def check_values(values: Any, prefix: str = "") -> None:
    """Raise ConfigError for the first of `values`, an instance of a table, that cannot work by itself.

    `prefix` is the flag of a structured option, whose keys are named behind it.
    """
    for (key, field), value in zip(fields_of(type(values)).items(), values, strict=True):
        name = f"{prefix} {shown_key(key)}=" if prefix else field.name(key)
        if field.kind.types and value is not values._field_defaults.get(key, field):
            check_type(name, value, field.kind.types)
        field.kind.check(name, value)
        if field.check is not None:
            field.check(name, value)


def read_table(
    table: type[Any], values: Mapping[str, object], folder: Path | None, prefix: str = "config key"
) -> dict[str, Any]:
    """The fields in a TOML table or other plain values; a relative path starts at `folder`.

    Raises ConfigError for unknown keys and wrong types.
    """
    fields = fields_of(table)
    if unknown := sorted(set(values) - set(fields)):
        raise ConfigError(f"{prefix} {unknown[0]}: unknown; the keys are {', '.join(sorted(fields))}")
    return {
        key: fields[key].kind.from_plain(f"{prefix} {key}", value, folder) for key, value in values.items()
    }


def shown_key(key: str) -> str:
    """A key as a structured option spells it."""
    return key.replace("_", "-")
