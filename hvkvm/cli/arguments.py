"""An argument parser whose complaints are one line with a remedy, like every other error of ours."""

from __future__ import annotations

import argparse
import os
from typing import NoReturn

from hvkvm.errors import ConfigError


def _formatter(prog: str) -> argparse.HelpFormatter:
    # argparse makes one for every option, and without a width each asks shutil, which imports compressors.
    return argparse.RawDescriptionHelpFormatter(prog, width=int(os.environ.get("COLUMNS") or 80) - 2)


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

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def split_command(arguments: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Split at the first `--`: our own options, and the guest command behind it."""
    if "--" not in arguments:
        return arguments, ()
    at = arguments.index("--")
    return arguments[:at], tuple(arguments[at + 1 :])
