"""`hvkvm explain`: VMBus traffic in words, from a recording, or from bytes in hexadecimal.

`--wireshark` prints the dissector by which Wireshark shows a recording with the same names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from hvkvm.cli.arguments import Parser
from hvkvm.errors import ConfigError

EPILOG = """examples:
  hvkvm run --kernel vmlinuz --vmbus on --record FILE -- true
  hvkvm explain FILE
  hvkvm explain 0e000000000000000300050000000000020000000000000000100000000000000020000000000000
  hvkvm explain --protocol kbd 0100000000000100
  hvkvm explain --wireshark

tshark -X lua_script:FILE.lua -r RECORDING shows a recording by the dissector in FILE.lua;
Wireshark loads it from its folder of personal plugins.
"""


def parser() -> Parser:
    """The options."""
    p = Parser("hvkvm explain", "Put VMBus traffic into words.", EPILOG)
    p.add_argument(
        "what",
        nargs="*",
        metavar="FILE|HEX",
        help="a recording of `hvkvm run --record`, or bytes of a message",
    )
    p.add_argument(
        "--protocol", metavar="NAME", help="the bytes are a device's payload, such as kbd, kvp or storvsp"
    )
    p.add_argument(
        "--wireshark", action="store_true", help="print a dissector for Wireshark and tshark, in Lua"
    )
    return p


def parse(arguments: list[str]) -> Any:
    """The checked options. ConfigError."""
    options = parser().parse_args(arguments)
    given = "".join(options.what).strip()
    if options.wireshark == bool(given) or (options.wireshark and options.protocol is not None):
        raise ConfigError("name a recording, or bytes in hexadecimal; or --wireshark alone")
    return options


def main(arguments: list[str]) -> int:
    """Run the verb; returns the exit status."""
    options = parse(arguments)
    from hvkvm.cli.output import show

    if options.wireshark:
        from hvkvm.record.dissector import dissector

        show(dissector())
        return 0
    files = [name for name in options.what if os.path.exists(name)]
    if files and len(options.what) == 1:
        if options.protocol is not None:
            raise ConfigError("--protocol: a recording says whose its packets are; leave it out")
        for line in _lines(files[0]):
            show(line)
        return 0
    from hvkvm.record import explain

    try:
        text = explain.from_hex(" ".join(options.what), options.protocol)
    except ValueError as error:
        if files:
            raise ConfigError(f"{files[0]}: a file, and more beside it; name one recording alone") from None
        raise ConfigError(f"{' '.join(options.what)[:60]}: {error}") from None
    show(text)
    return 0


def _lines(name: str) -> Iterator[str]:
    """The lines of the recording in a file. ConfigError for what is no recording."""
    from hvkvm.record import explain

    try:
        with open(name, "rb") as file:
            yield from explain.lines(file)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{name}: {why}; give a recording of `hvkvm run --record`") from None
