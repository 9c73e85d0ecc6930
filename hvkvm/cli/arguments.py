"""An argument parser whose complaints are one line with a remedy, like every other error of ours.

Options may stand anywhere, before, between and behind the other words. argparse
alone does not take that: it gives an optional word its default as soon as an
option follows the word before it. So options are put in front of the rest.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hvkvm.errors import ConfigError

_NUMBER = re.compile(r"-\d+$|-\d*\.\d+$")
_WIDTHS = range(40, 1001)


def _formatter(prog: str) -> argparse.HelpFormatter:
    # argparse makes one for every option, and without a width each asks shutil, which imports compressors.
    return argparse.RawDescriptionHelpFormatter(prog, width=_columns() - 2)


def _columns() -> int:
    """The terminal's width as $COLUMNS has it; 80 where it says nothing of use."""
    try:
        columns = int(os.environ.get("COLUMNS", "")[:9])
    except ValueError:
        return 80
    return columns if columns in _WIDTHS else 80


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, raising ConfigError instead of printing usage and exiting."""

    def __init__(self, prog: str, description: str, epilog: str = "") -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=_formatter,
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's, with options anywhere. `args` are a verb's own."""
        with_value = self.value_options()
        options, words = split_words(args or (), with_value)
        # Not without need: argparse names "--" among what it does not know.
        value_missing = bool(options) and options[-1] in with_value
        end = ["--"] if value_missing or any(word.startswith("-") for word in words) else []
        return super().parse_args([*options, *end, *words], namespace)

    def value_options(self) -> set[str]:
        """The options that take a value."""
        return {name for action in self._actions if action.nargs is None for name in action.option_strings}

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.removeprefix('argument ')}; see {self.prog} --help")

    def print_help(self, file: Any = None) -> None:
        """To standard output, and an error where that does not take it."""
        from hvkvm.cli.output import show

        show(self.format_help().rstrip("\n"))


def named(text: str) -> str:
    """The type of an argument that is a path, or a server."""
    if not text:
        raise argparse.ArgumentTypeError("empty; name a path")
    return text


def path_word(text: str) -> Path:
    """The type of an argument that is a path. Path takes an empty one for the current folder."""
    return Path(named(text))


def split_words(arguments: Sequence[str], with_value: Collection[str]) -> tuple[list[str], list[str]]:
    """The options, those in `with_value` with their values, and the other words, as all behind `--` are."""
    options: list[str] = []
    words: list[str] = []
    rest = iter(arguments)
    takes_value = False
    for word in rest:
        if word == "--":
            words += rest
        elif not _is_option(word):
            (options if takes_value else words).append(word)
            takes_value = False
        else:
            options.append(word)
            takes_value = word in with_value
    return options, words


def _is_option(word: str) -> bool:
    """As argparse sees it: "-" alone, a negative number and what has a space are words."""
    return len(word) > 1 and word[0] == "-" and " " not in word and not _NUMBER.match(word)


def split_command(arguments: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Split at the first `--`: our own options, and the guest command behind it."""
    if "--" not in arguments:
        return arguments, ()
    at = arguments.index("--")
    return arguments[:at], tuple(arguments[at + 1 :])
