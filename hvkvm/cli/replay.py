"""`hvkvm replay`: plays a recording's guest against this hvkvm's code, and names the first difference."""

from __future__ import annotations

from typing import Any

from hvkvm.cli.arguments import Parser
from hvkvm.errors import ConfigError

EPILOG = """A recording is made by `hvkvm run --record FILE,depth=full`, from a guest's start on.

exit status: 0 no difference; 1 a difference, which is printed; 2 usage

examples:
  hvkvm replay FILE
"""


def parser() -> Parser:
    """The options."""
    p = Parser("hvkvm replay", "Play a recording's guest against the host's code as it is now.", EPILOG)
    p.add_argument("file", metavar="FILE", help="a recording, with depth=full")
    p.add_argument("--json", action="store_true", help="print the result as one JSON line")
    return p


def main(arguments: list[str]) -> int:
    """Run the verb; returns the exit status."""
    options = parser().parse_args(arguments)
    from hvkvm.testing.replay import replay

    try:
        with open(options.file, "rb") as file:
            result = replay(file)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{options.file}: {why}; record with --record FILE,depth=full") from None
    _tell(result, options)
    return 0 if result.difference is None else 1


def _tell(result: Any, options: Any) -> None:
    from hvkvm.cli.output import show

    if options.json:
        import json

        found = None if result.difference is None else result.difference._asdict()
        show(json.dumps({**result._asdict(), "difference": found}))
        return
    if result.difference is not None:
        show(f"a difference: {result.difference}")
    skipped = ", ".join(f"{count} of {name}" for name, count in result.skipped.items())
    show(
        f"{result.messages} messages and {result.packets} packets of the host"
        f" {'agree' if result.difference is None else 'were compared'}"
        + (f"; packets left out, for devices have stand-ins here: {skipped}" if skipped else "")
    )
