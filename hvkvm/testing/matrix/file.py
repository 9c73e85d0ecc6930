"""The TOML file of a matrix: `[machine]`, `[axes]` and `[[command]]`, checked and made into cases.

Every error is one ConfigError: the file, the table, the key, the reason and the remedy.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hvkvm.errors import ConfigError
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.config_fields import fields_of, read_table
from hvkvm.machine.config_kinds import check_file, wrong_type
from hvkvm.machine.toml_file import read_toml
from hvkvm.testing.matrix.apart import apart
from hvkvm.testing.matrix.cases import Case, can_be_warm

SECONDS = 300.0
"""A case's time limit where the file has none."""
MAX_CASES = 10_000
MAX_NAME = 60
"""Characters of the name that a script of several lines has."""
_TABLES = ("machine", "axes", "command", "warm")
_COMMAND: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "run": (str, list),
    "seconds": (int, float),
    "status": (int,),
    "stdout": (str,),
}
_NOT_IN_A_FILE = ("command", "command_io", "timeout", "awaits")
_SECONDS_REMEDY = "give seconds to a [[command]]"


def read(path: Path, *, alone: bool = False) -> list[Case]:
    """The cases that the file at `path` asks for; its relative paths start beside it. ConfigError.

    `alone`: one runs at a time.
    """
    return cases(read_toml(path, str(path)), path.parent, str(path), alone=alone)


def cases(tables: Mapping[str, Any], folder: Path, file: str, *, alone: bool = False) -> list[Case]:
    """As `read`, of a file that is parsed already; `file` is its name in errors."""
    for key in tables:
        if key not in _TABLES:
            raise ConfigError(f"{file}: {key}: unknown; the tables are {', '.join(_TABLES)}")
    warm = tables.get("warm", True)
    if not isinstance(warm, bool):
        raise ConfigError(f"{file}: warm: {warm!r} is no bool; write warm = false")
    machine = _fields(_table(tables, "machine", file), f"{file}: [machine]", folder)
    axes = _axes(_table(tables, "axes", file), file, folder)
    commands = _commands(tables.get("command", []), file)
    count = len(commands)
    for values in axes.values():
        count *= len(values)
    if count > MAX_CASES:
        raise ConfigError(f"{file}: {count} cases, more than {MAX_CASES}; shorten [axes], or split the file")
    found: list[Case] = []
    for group, combination in enumerate(itertools.product(*axes.values()), 1):
        place = tuple((axis, name) for axis, (name, _fields) in zip(axes, combination, strict=True))
        fields = dict(machine)
        for _name, more in combination:
            fields.update(more)
        for command in commands:
            case = _case(len(found) + 1, place, fields, command, file)
            shared = warm and len(commands) > 1 and can_be_warm(case.config)
            found.append(case._replace(group=group if shared else 0))
    return apart(found, file, alone=alone)


def _table(tables: Mapping[str, Any], name: str, file: str) -> dict[str, Any]:
    found = tables.get(name, {})
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: {name}: no table; write [{name}] and its keys below")
    return found


def _fields(values: Mapping[str, Any], where: str, folder: Path) -> dict[str, Any]:
    """Fields of MachineConfig, by the table's own kinds."""
    for key in _NOT_IN_A_FILE:
        if key in values:
            remedy = _SECONDS_REMEDY if key == "timeout" else "give it by a [[command]]"
            raise ConfigError(f"{where} {key}: is a case's own; {remedy}")
    found = read_table(MachineConfig, values, folder, where)
    if "kernel" in found:
        found = {**_with_modules(found["kernel"], where), **found}
        if os.path.isdir(found["kernel"]):
            found["kernel"] = found.pop("_image")
        found.pop("_image", None)
    if "disks" in found:
        # Cases run side by side, and each shall find the image as it was.
        found["disks"] = tuple(
            disk if disk.readonly or disk.snapshot else disk._replace(snapshot=True)
            for disk in found["disks"]
        )
    return found


def _with_modules(kernel: Path, where: str) -> dict[str, Any]:
    """The modules beside a kernel, and the kernel in a folder."""
    from hvkvm.testing.kernels import kernel_at

    if not os.path.isdir(kernel):
        check_file(f"{where} kernel", kernel)
    try:
        found = kernel_at(kernel)
    except ConfigError as error:
        raise ConfigError(f"{where} kernel: {str(error).removeprefix('--hvkvm-kernels ')}") from None
    more = {} if found.modules is None else {"modules_dir": found.modules}
    return {**more, "_image": found.image}


def _axes(values: Mapping[str, Any], file: str, folder: Path) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for axis, listed in values.items():
        _check_name(axis, f"{file}: [axes]")
        where = f"{file}: [axes] {axis}"
        if not isinstance(listed, list) or not listed:
            raise ConfigError(f"{where}: no list with a value in it; write {axis} = [FIRST, SECOND]")
        found[axis] = [_value(axis, value, where, folder) for value in listed]
        names = [name for name, _fields in found[axis]]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"{where}: {twice} is there twice; leave one out, or give each a name")
    return found


def _value(axis: str, value: Any, where: str, folder: Path) -> tuple[str, dict[str, Any]]:
    if isinstance(value, dict):
        values = dict(value)
        name = values.pop("name", None)
        if not isinstance(name, str) or not name:
            raise ConfigError(f'{where}: a table without a name; add name = "..." to it')
        _check_name(name, where)
        return name, _fields(values, where, folder)
    if axis not in fields_of(MachineConfig):
        raise ConfigError(f"{where}: no key of a machine; write tables: {axis} = [{{name = ..., key = ...}}]")
    return _shown(value), _fields({axis: value}, where, folder)


def _check_name(name: str, where: str) -> None:
    if name and name.splitlines() != [name]:
        raise ConfigError(f"{where}: {name!r:.80} has several lines; write one")


def _line(text: str) -> str:
    """`text`, or where it has several lines the first that is not empty, shortened: a title is one line."""
    if len(text.splitlines()) < 2:
        return text.strip("\n")
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return f"{first[:MAX_NAME]} ..." if first else ""


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(_shown(item) for item in value) or "none"
    text = _line(str(value).lower() if isinstance(value, bool) else str(value))
    return text.rsplit("/", 1)[-1] or text


def _commands(listed: Any, file: str) -> list[dict[str, Any]]:
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise ConfigError(f"{file}: command: no list of tables; write [[command]] and its keys below")
    found = [dict(_command(one, f"{file}: [[command]]")) for one in listed] or [{"name": "boot"}]
    scripts: Counter[str] = Counter()
    for one in found:
        if one.get("script"):  # which may well begin as another does
            scripts[one["name"]] += 1
            one["name"] += f" ({scripts[one['name']]})" if scripts[one["name"]] > 1 else ""
    names = [one["name"] for one in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"{file}: [[command]] name: {twice} is there twice; give each another name")
    return found


def _command(one: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    for key, value in one.items():
        if key not in _COMMAND:
            raise ConfigError(f"{where} {key}: unknown; the keys are {', '.join(_COMMAND)}")
        if not isinstance(value, _COMMAND[key]) or isinstance(value, bool):
            takes = "a number without quotes" if int in _COMMAND[key] else "text in quotes"
            raise wrong_type(
                f"{where} {key}", value, f"{takes}, or a list of words" if key == "run" else takes
            )
    run = one.get("run", [])
    words = ("sh", "-c", run) if isinstance(run, str) else tuple(run)
    if not all(isinstance(word, str) for word in words) or (not words and "run" in one):
        raise ConfigError(f'{where} run: no command; write run = ["uname", "-r"], or a line for a shell')
    _check_name(one.get("name", ""), f"{where} name")
    text = run if isinstance(run, str) else " ".join(words)
    name = one.get("name") or _line(text) or "boot"
    seconds = float(one.get("seconds", SECONDS))
    if not 0 < seconds <= 1e6:
        raise ConfigError(f"{where} seconds: {seconds:g} is no time limit; choose one above 0")
    status = one.get("status", 0)
    if not 0 <= status <= 255:
        raise ConfigError(f"{where} status: {status} is no exit status; choose one of 0 to 255")
    yield from (("words", words), ("script", not one.get("name") and name != text))
    yield from (("name", name), ("seconds", seconds), ("status", status), ("stdout", one.get("stdout", "")))


def _case(
    number: int,
    place: tuple[tuple[str, str], ...],
    fields: Mapping[str, Any],
    command: Mapping[str, Any],
    file: str,
) -> Case:
    words = command.get("words", ())
    title = " ".join(f"{axis}={name}" for axis, name in place)
    where = f"{file}: {f'the case {title}' if title else '[machine]'}"
    if "kernel" not in fields and "firmware" not in fields:
        raise ConfigError(f"{where}: kernel: missing; name one in [machine] or [axes]")
    config = MachineConfig(
        **{
            **fields,
            "command": words,
            "command_io": "streams" if words else "console",
            "timeout": command.get("seconds", SECONDS),
        }
    )
    try:
        config.validate()
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return Case(number, place, command["name"], config, command.get("status", 0), command.get("stdout", ""))
