"""The parsers of every verb, for what is made from them: completion, manual pages, and tests."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from hvkvm.cli import VERBS
from hvkvm.cli.arguments import Parser


def own_verbs(verb: str) -> Sequence[str]:
    """The verbs under `verb`, as `list` under `ctl`; empty for a verb that has none."""
    module = import_module(f"hvkvm.cli.{verb}")
    if not hasattr(module, "verb_parser"):
        return ()
    return tuple(module.VERBS if hasattr(module, "VERBS") else module.SUMMARY)


def parsers_of(verb: str) -> dict[str, Parser]:
    """The parser of each verb under `verb`, by its name; of `verb` itself, by "", where it has none."""
    module = import_module(f"hvkvm.cli.{verb}")
    if own := own_verbs(verb):
        return {name: module.verb_parser(name) for name in own}
    return {"": module.parser()}


def all_parsers() -> dict[str, Parser]:
    """Every parser, by the words that lead to it: "run", "ctl list"."""
    return {f"{verb} {name}".rstrip(): parser for verb in VERBS for name, parser in parsers_of(verb).items()}
