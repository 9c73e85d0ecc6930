"""Structured options: `--flag WORD,key=value,...`, in QEMU's manner, into a NamedTuple of their own.

The type is a table of fields (`config_fields`); its first field is the word that needs no key. A
comma within a value is written twice. A key of a bool may stand alone, for on; one whose kind is
repeated may be given again. In TOML the same is a table with the type's keys, or the same text.

    class DiskSpec(NamedTuple):
        file: Annotated[str, Field(Kind(), help="the image")]
        readonly: Annotated[bool, Field(OnOff(), help="refuse writes")] = False

        def check(self, name: str) -> None:
            "Raise ConfigError, beginning with `name`, for values that do not go together."

`Structured("hvkvm.machine.disk_spec", "DiskSpec")` is the kind of such a field. The type's
module is imported when somebody uses the option, or asks for help.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from hvkvm.errors import ConfigError
from hvkvm.machine.config_fields import Field, check_values, fields_of, read_table, shown_key
from hvkvm.machine.config_kinds import Kind, OnOff, check_type, said, wrong_type

_KEY = re.compile(r"([A-Za-z][\w-]*)=", re.ASCII)


class Structured(Kind):
    """A tuple of what `type_name` of `module` describes, one for each time that the flag is given."""

    repeated = True
    takes = "a list of texts or tables"
    types = (tuple, list)

    def __init__(self, module: str, type_name: str) -> None:
        self._module = module
        self._type_name = type_name

    def type(self) -> type[Any]:
        """The NamedTuple."""
        found: type[Any] = getattr(import_module(self._module), self._type_name)
        return found

    def from_text(self, name: str, text: str, folder: Path | None = None) -> Any:
        return parse_words(self.type(), name, text, folder)

    def from_plain(self, name: str, value: object, folder: Path | None) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise wrong_type(name, value, self.takes)
        return tuple(self._one(f"{name}[{index}]", item, folder) for index, item in enumerate(value))

    def check(self, name: str, value: tuple[Any, ...]) -> None:
        for item in value:
            check_type(name, item, (self.type(),))
            check_values(item, name)
            if hasattr(item, "check"):
                item.check(name)

    def more_help(self) -> str:
        keys = list(fields_of(self.type()).items())[1:]
        return "".join(f"; {_spelling(key, field)}: {field.help}" for key, field in keys)

    def _one(self, name: str, item: object, folder: Path | None) -> Any:
        if isinstance(item, str):
            return parse_words(self.type(), name, item, folder)
        if isinstance(item, Mapping):
            return _made(self.type(), name, read_table(self.type(), item, folder, name))
        if isinstance(item, self.type()):
            return item
        raise wrong_type(name, item, "text in quotes, or a table")


def parse_words(table: type[Any], name: str, text: str, folder: Path | None = None) -> Any:
    """An instance of `table` from `text`, in the form that this module's docstring gives. ConfigError."""
    fields = fields_of(table)
    first = next(iter(fields))
    found: dict[str, Any] = {}
    for index, item in enumerate(_split(name, text)):
        spelled, value = _key_and_value(item)
        if spelled is None and index == 0:
            spelled, value = first, item
        elif spelled is None:
            spelled, value = item, None
        key = spelled.replace("-", "_")
        if key not in fields:
            keys = ", ".join(map(shown_key, fields))
            hint = f", and a {first} with = in it is written {first}=..." if index == 0 else ""
            raise ConfigError(f"{name} {item}: no key {spelled}; the keys are {keys}{hint}")
        found[key] = _read(fields[key].kind, f"{name} {shown_key(key)}=", value, found.get(key), folder)
    return _made(table, name, found)


def _split(name: str, text: str) -> list[str]:
    """The items between single commas, each with its doubled commas made one."""
    if "\0" in text:
        raise ConfigError(f"{name}: cannot hold NUL; remove it")
    items = [item.replace("\0", ",") for item in text.replace(",,", "\0").split(",")]
    if "" in items:
        raise ConfigError(f"{said(name, text)}: an empty item; remove it, or write a comma in a value twice")
    return items


def _key_and_value(item: str) -> tuple[str | None, str | None]:
    found = _KEY.match(item)
    return (found[1], item[found.end() :]) if found else (None, None)


def _read(kind: Kind, name: str, text: str | None, before: Any, folder: Path | None) -> Any:
    if text is None:
        if not isinstance(kind, OnOff):
            raise ConfigError(f"{name}: has no value; write one behind it")
        text = "on"
    value = kind.from_text(name, text, folder)
    if kind.repeated:
        return (*(before or ()), value)
    if before is not None:
        raise ConfigError(f"{said(name, text)}: given twice; leave one out")
    return value


def _made(table: Any, name: str, values: Mapping[str, Any]) -> Any:
    for key in fields_of(table):
        if key not in values and key not in table._field_defaults:
            raise ConfigError(f"{name}: no {shown_key(key)}; add {shown_key(key)}=...")
    return table(**values)


def _spelling(key: str, field: Field) -> str:
    return f"{shown_key(key)}={field.option or key.upper()}"
