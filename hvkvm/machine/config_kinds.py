"""What a configuration value may be: how it is read from the command line and from TOML, and what is refused.

A `Kind` is one sort of value: a path, a size, a word out of a few. `name` is always how
the user knows the value, for the error: "--memory" on the command line, "config key memory" in a
file, "--disk size=" for a key of a structured option (`config_words`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from errno import EACCES, EPERM
from os.path import isdir
from pathlib import Path
from typing import Any

from hvkvm.abi.guest_command import place_of
from hvkvm.errors import ConfigError, harmless
from hvkvm.given_file import open_at_once

MIB = 1 << 20
GIB = 1 << 30

_UNITS = {"": MIB, "b": 1, "k": 1 << 10, "m": MIB, "g": GIB, "t": 1 << 40}

MAX_NUMBER = 1 << 63
_MOST_SHOWN = 400
"""Characters of a value in an error."""

Check = Callable[[str, Any], None]
"""(name, value): raises ConfigError for a value of the right type that cannot work."""


def said(name: str, value: object) -> str:
    """A value as its user gave it: "--cpus 0", "--disk size=0", "config key cpus: 0".

    It is one line as a terminal shows it, and what is long is cut.
    """
    text = harmless(str(value))
    value = text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
    if name.endswith("="):
        return f"{name}{value}"
    return f"{name}: {value}" if name.startswith("config key ") else f"{name} {value}"


def parse_size(text: str, name: str = "--memory") -> int:
    """Bytes in `text`: "512M", "1.5G", "300MiB"; a bare number is MiB. Raises ConfigError naming `name`."""
    body = text.strip().lower().removesuffix("ib")
    if len(body) > 1 and body[-1] == "b" and not body[-2].isdigit():
        body = body[:-1]
    number, unit = (body[:-1], body[-1]) if body and body[-1] in _UNITS else (body, "")
    try:
        value = float(number) if "." in number else int(number, 10)
        size = value * _UNITS[unit]
        if not 0 <= size < 1 << 63:
            raise ValueError
    except (ValueError, OverflowError):
        raise ConfigError(
            f"{said(name, text)}: not a size; write a number with K, M or G, such as 512M"
        ) from None
    return int(size)


class Kind:
    """Text, and the base of every other kind. Immutable."""

    repeated = False
    """Whether the flag may be given again and again, and the value is a tuple."""
    flag_value: object = None
    """What a flag without a value stands for; None for a flag that takes one."""
    takes = "text in quotes"
    """What is to be written in TOML, for the error about something else."""
    types: tuple[type[Any], ...] = (str,)
    """What a value is in Python, besides a default; empty where that is not looked at."""

    def from_text(self, name: str, text: str, folder: Path | None = None) -> Any:
        """The value in one word of the command line; a relative path starts at `folder`. ConfigError."""
        return text

    def from_plain(self, name: str, value: object, folder: Path | None) -> Any:
        """The value in what TOML or JSON has; a relative path starts at `folder`. ConfigError."""
        if isinstance(value, str):
            return self.from_text(name, value, folder)
        raise wrong_type(name, value, self.takes)

    def check(self, name: str, value: Any) -> None:
        """Raise ConfigError for a value that no machine could have."""
        if isinstance(value, str):
            check_no_nul(name, value)

    def more_help(self) -> str:
        """What is put behind the flag's help."""
        return ""


class Choice(Kind):
    """One word of a few."""

    types = ()

    def __init__(self, words: tuple[str, ...]) -> None:
        self.words = words
        self.takes = " or ".join(f'"{word}"' for word in words if word)

    def check(self, name: str, value: str) -> None:
        if value not in self.words:
            raise ConfigError(f"{said(name, value)}: unknown; choose {', '.join(filter(None, self.words))}")


class OnOff(Kind):
    """A bool. `flag_value` is for a flag of its own; text is on or off, yes or no, true or false."""

    takes = "true or false, without quotes"
    types = ()
    _WORDS = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}

    def __init__(self, flag_value: bool | None = None) -> None:
        self.flag_value = flag_value

    def from_text(self, name: str, text: str, folder: Path | None = None) -> bool:
        if text not in self._WORDS:
            raise ConfigError(f"{said(name, text)}: neither on nor off; choose one")
        return self._WORDS[text]

    def from_plain(self, name: str, value: object, folder: Path | None) -> bool:
        if isinstance(value, bool):
            return value
        raise wrong_type(name, value, self.takes)


class Number(Kind):
    """An int; `example` is what the error shows."""

    types = (int,)

    def __init__(self, example: int) -> None:
        self.example = example
        self.takes = f"a whole number without quotes, such as {example}"

    def from_text(self, name: str, text: str, folder: Path | None = None) -> int:
        try:
            value = int(text, 0 if text[:2].lower() == "0x" else 10)
        except ValueError:
            raise not_a_number(name, text, self.example) from None
        if abs(value) > MAX_NUMBER:
            raise ConfigError(f"{said(name, text)}: too large; write {said(name, self.example)}, say")
        return value

    def from_plain(self, name: str, value: object, folder: Path | None) -> int:
        if isinstance(value, int) and not isinstance(value, bool):
            check_range(name, value)
            return value
        raise wrong_type(name, value, self.takes)


class Seconds(Kind):
    """A float, of seconds; None stands for no limit."""

    types = (int, float)

    def __init__(self, example: float) -> None:
        self.example = example
        self.takes = f"a number without quotes, such as {example:g}"

    def from_text(self, name: str, text: str, folder: Path | None = None) -> float:
        try:
            return float(text)
        except ValueError:
            raise not_a_number(name, text, self.example) from None

    def from_plain(self, name: str, value: object, folder: Path | None) -> float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            check_range(name, value)
            return float(value)
        raise wrong_type(name, value, self.takes)


class Size(Kind):
    """An int, of bytes: see `parse_size`."""

    types = (int,)

    def from_text(self, name: str, text: str, folder: Path | None = None) -> int:
        return parse_size(text, name)

    def from_plain(self, name: str, value: object, folder: Path | None) -> int:
        check_range(name, value)
        return parse_size(str(value), name)


class PathName(Kind):
    """A Path of this host, there or not."""

    takes = "a path in quotes"
    types: tuple[type[Any], ...] = (Path,)

    def from_text(self, name: str, text: str, folder: Path | None = None) -> Path:
        return self.from_plain(name, text, folder)

    def from_plain(self, name: str, value: object, folder: Path | None) -> Path:
        if value == "":  # which Path would take for the current folder
            raise ConfigError(f"{name}: empty; name a path")
        if isinstance(value, str | Path):
            check_no_nul(name, value)
            return Path(value) if folder is None else folder / value
        raise wrong_type(name, value, self.takes)

    def check(self, name: str, value: Path | None) -> None:
        if value is not None:
            check_no_nul(name, value)


class PathText(Kind):
    """Text: a path of this host, there or not, or one of `words`, which say that there is none or which."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def from_text(self, name: str, text: str, folder: Path | None = None) -> str:
        return text if folder is None or text in ("", *self.words) else str(folder / text)


class File(PathName):
    """A Path of a file that must be there and readable; None stands for none."""

    def check(self, name: str, value: Path | None) -> None:
        super().check(name, value)
        if value is not None:
            check_file(name, value)


class AutoFile(File):
    """The word "auto", or the Path of a file; None stands for none."""

    types = (str, Path)

    def from_plain(self, name: str, value: object, folder: Path | None) -> Any:
        return value if value == "auto" else super().from_plain(name, value, folder)

    def check(self, name: str, value: Any) -> None:
        if value != "auto":
            super().check(name, value)


class Words(Kind):
    """A tuple of text: a list in TOML, on the command line a flag for each."""

    repeated = True
    takes = 'a list of texts, such as ["...", "..."]'
    types = (tuple, list)

    def from_plain(self, name: str, value: object, folder: Path | None) -> tuple[str, ...]:
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise wrong_type(name, value, self.takes)

    def check(self, name: str, value: tuple[str, ...]) -> None:
        for word in value:
            check_type(name, word, (str,))
            super().check(name, word)


class GuestFiles(Kind):
    """Pairs of a guest path and a Path of this host: GUEST=HOST, in TOML a table."""

    repeated = True
    takes = 'a table, such as {"/root/x" = "x"}'
    types = (tuple, list)

    def from_text(self, name: str, text: str, folder: Path | None = None) -> tuple[str, Path]:
        guest, equals, host = text.partition("=")
        if not (guest and equals and host):
            raise ConfigError(
                f"{said(name, text)}: not two paths; write GUEST=HOST, such as /root/test=./test"
            )
        return guest, (folder or Path()) / host

    def from_plain(self, name: str, value: object, folder: Path | None) -> tuple[tuple[str, Path], ...]:
        if isinstance(value, Mapping) and all(isinstance(item, str | Path) for item in value.values()):
            return tuple((str(guest), (folder or Path()) / host) for guest, host in value.items())
        raise wrong_type(name, value, self.takes)

    def check(self, name: str, value: tuple[tuple[str, Path], ...]) -> None:
        for guest, host in value:
            check_no_nul(name, guest)
            check_no_nul(name, host)
            check_file(f"{name} {guest}", host)
        for guest, _host in value:
            if not guest.startswith("/") or guest.endswith("/") or ".." in guest.split("/"):
                raise ConfigError(
                    f"{name} {guest}=...: not a guest path; write an absolute one, such as /root/x"
                )
        found: dict[str, Path] = {}
        for guest, host in value:
            place = place_of(guest)
            if place in found:
                raise ConfigError(f"{name} {guest}: given twice, as {found[place]} and {host}; leave one out")
            found[place] = host


def wrong_type(name: str, value: object, takes: str) -> ConfigError:
    """The error for a value that is not of the kind's type: `takes` is what to write instead."""
    try:
        shown = str(value).lower() if isinstance(value, bool) else repr(value)
    except ValueError:  # with a number in it that Python does not print
        shown = type(value).__name__
    if len(shown) > _MOST_SHOWN:
        shown = f"{shown[:_MOST_SHOWN]}..."
    return ConfigError(f"{name}: {shown} has the wrong type; write {takes}")


def check_type(name: str, value: object, types: tuple[type[Any], ...]) -> None:
    """Raise ConfigError for a value of another type: one that a program gives, and that nobody has read."""
    if not isinstance(value, types):
        wanted = " or ".join(one.__name__ for one in types)
        given = f"{said(name, repr(value))}: of type {type(value).__name__}"
        raise ConfigError(f"{given}; give a value of type {wanted}")


def check_no_nul(name: str, value: str | Path) -> None:
    """Raise ConfigError for text that the kernel's calls and C's programs would cut."""
    if "\0" in str(value):
        raise ConfigError(f"{name}: cannot hold NUL; remove it")


def check_range(name: str, value: object) -> None:
    """Raise ConfigError for an int that is larger than any that a machine could have."""
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise ConfigError(f"{name}: a number that is too large; write a smaller one")


def not_a_number(name: str, text: str, example: float) -> ConfigError:
    """The error for text that is no number."""
    return ConfigError(f"{said(name, text)}: not a number; write one, such as {said(name, example)}")


def check_file(name: str, path: Path) -> None:
    """Raise ConfigError unless `path` is a file that this user can read."""
    if isdir(path):  # Path.is_dir raises for a name that is too long
        raise ConfigError(f"{said(name, path)}: is a directory; name the file in it")
    try:
        os.close(open_at_once(path))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{said(name, path)}: no such file; check the path") from None
    except OSError as error:
        remedy = "make it readable for this user" if error.errno in (EACCES, EPERM) else "check the path"
        raise ConfigError(f"{said(name, path)}: {error.strerror}; {remedy}") from None
