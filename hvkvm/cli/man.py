"""`hvkvm man`: manual pages made from the verbs' own parsers."""

from __future__ import annotations

from argparse import Action
from importlib import import_module
from typing import Any

from hvkvm.cli.arguments import Parser
from hvkvm.errors import ConfigError

EPILOG = """examples:
  hvkvm man run
  hvkvm man

  man -l - shows a page that is given to it; as hvkvm-VERB.1 in a man1 folder of $MANPATH
  it is found by man hvkvm-VERB.
"""


def parser() -> Parser:
    """The options."""
    p = Parser("hvkvm man", "Print the manual page of hvkvm, or of a verb, for man -l -.", EPILOG)
    p.add_argument("verb", nargs="?", metavar="VERB", help="whose page (hvkvm's own)")
    return p


def parse(arguments: list[str]) -> Any:
    """The checked options. ConfigError."""
    from hvkvm.cli import VERBS

    options = parser().parse_args(arguments)
    if options.verb is not None and options.verb not in VERBS:
        raise ConfigError(f"{options.verb}: no such verb; choose {', '.join(VERBS)}")
    return options


def main(arguments: list[str]) -> int:
    """Run the verb; returns the exit status."""
    options = parse(arguments)
    from hvkvm.cli.output import show

    show(overview() if options.verb is None else page(options.verb))
    return 0


def overview() -> str:
    """hvkvm(1)."""
    from hvkvm.cli import VERBS, __doc__

    lines = [*_head("hvkvm", "run guests on /dev/kvm with Hyper-V enlightenments")]
    lines += [".SH SYNOPSIS", ".B hvkvm", ".I VERB", "[options]", ".SH VERBS"]
    for verb, text in VERBS.items():
        lines += [".TP", f".BR hvkvm-{_escaped(verb)} (1)", _escaped(text)]
    status = (__doc__ or "").partition("Exit status: ")[2].strip()
    lines += [".SH EXIT STATUS", *map(_line, status.splitlines())]
    return "\n".join(lines)


def page(verb: str) -> str:
    """hvkvm-VERB(1)."""
    from hvkvm.cli import VERBS
    from hvkvm.cli.parsers import parsers_of

    module = import_module(f"hvkvm.cli.{verb}")
    lines = [*_head(f"hvkvm-{verb}", VERBS[verb]), ".SH SYNOPSIS"]
    parsers = parsers_of(verb)
    if "" not in parsers:
        lines += [".B hvkvm", f".B {_escaped(verb)}", ".I VERB", "[options]"]
        for name, one in parsers.items():
            lines += [f".SH {_escaped(name.upper())}", *_options(one)]
        epilog = module.EPILOG
    else:
        one = parsers[""]
        lines += [".B hvkvm", f".B {_escaped(verb)}", "[options]", ".SH DESCRIPTION", _line(one.description)]
        lines += [".SH OPTIONS", *_options(one)]
        epilog = one.epilog or ""
    # The epilogs are laid out for terminals: left as they are.
    return "\n".join([*lines, ".SH NOTES", ".nf", *map(_line, epilog.strip().splitlines()), ".fi"])


def _head(name: str, text: str) -> list[str]:
    from hvkvm import __version__

    title = f'.TH {_escaped(name.upper())} 1 "" "hvkvm {__version__}"'
    return [title, ".SH NAME", f"{_escaped(name)} \\- {_escaped(text)}"]


def _options(one: Parser) -> list[str]:
    one.format_help()  # has `hvkvm run` read what its structured options take
    lines: list[str] = []
    for action in one._actions:
        lines += [".TP", _heading(action), _line(" ".join((action.help or "").split()).replace("%%", "%"))]
    return lines


def _heading(action: Action) -> str:
    value = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if not action.option_strings:
        return f"\\fI{_escaped(value)}\\fR"
    names = ", ".join(f"\\fB{_escaped(name)}\\fR" for name in action.option_strings)
    return names if action.nargs == 0 else f"{names} \\fI{_escaped(value)}\\fR"


def _line(text: str | None) -> str:
    """Text of a page: a dot or quote at its beginning would be a request."""
    escaped = _escaped(text or "")
    return f"\\&{escaped}" if escaped[:1] in (".", "'") else escaped


def _escaped(text: str) -> str:
    return text.replace("\\", "\\e").replace("-", "\\-")
