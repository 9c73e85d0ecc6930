"""An argument parser whose complaints are one line with a remedy, like every other error of ours."""

from __future__ import annotations

import argparse
from typing import NoReturn

from hvkvm.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, raising ConfigError instead of printing usage and exiting."""

    def __init__(self, prog: str, description: str, epilog: str = "") -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def split_command(arguments: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Split at the first `--`: our own options, and the guest command behind it."""
    if "--" not in arguments:
        return arguments, ()
    at = arguments.index("--")
    return arguments[:at], tuple(arguments[at + 1 :])
