"""`hvkvm ctl net`: the NICs of a running VM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hvkvm.cli.arguments import Parser
from hvkvm.errors import ConfigError, harmless

_WORDS = {"list": 0, "stats": 0, "add": 1, "remove": 1, "link": 2}
_TAKES = ("nothing more", "WIRE or NAME", "NAME up or NAME down")


def arguments(parser: Parser) -> None:
    """The words of the verb."""
    parser.add_argument(
        "what", choices=tuple(_WORDS), help="list, stats; add WIRE; remove NAME; link NAME up|down"
    )
    parser.add_argument(
        "name", nargs="?", metavar="WIRE|NAME", help="as behind --net, or as list names a NIC"
    )
    parser.add_argument("state", nargs="?", metavar="up|down", help="whether the cable is plugged in")


def request(options: Any) -> dict[str, Any]:
    """What is asked of the VM. ConfigError."""
    what, name, state = options.what, options.name, options.state
    if (name is not None) + (state is not None) != _WORDS[what]:
        raise ConfigError(f"net {what}: takes {_TAKES[_WORDS[what]]}; see hvkvm ctl net --help")
    if what == "add":
        return {"what": what, "spec": _absolute(name)}
    if what == "link" and state not in ("up", "down"):
        raise ConfigError(f"net link {name} {state}: neither up nor down; choose one")
    return {"what": what} | ({"name": name} if name is not None else {}) | ({"state": state} if state else {})


def _absolute(words: str) -> str:
    """With the paths that this process means: the VM's folder is another one."""
    from hvkvm.machine.config_fields import check_values
    from hvkvm.machine.config_words import parse_words
    from hvkvm.machine.nic_spec import NicSpec
    from hvkvm.machine.own_files import absolute

    spec = parse_words(NicSpec, "net add", words)
    check_values(spec, "net add")
    spec.check("net add")
    paths = {key: getattr(spec, key) for key in ("socket", "listen", "pcap")}
    made: dict[str, Any] = {key: absolute(str(path)) for key, path in paths.items() if path is not None}
    return str(spec._replace(**made).text)


def text_of(options: Any) -> Callable[[Any], str]:
    """How the answer is shown."""
    return _TEXTS[options.what]


def _list(nics: list[dict[str, Any]]) -> str:
    if not nics:
        return "this VM has no NIC"
    rows = [("NAME", "MAC", "LINK", "DRIVER", "MTU", "WIRE")]
    for nic in nics:
        wire = " ".join(str(nic[key]) for key in ("kind", "interface", "guest", "failure") if nic.get(key))
        up, driver = "up" if nic["up"] else "down", "yes" if nic["driver"] else "no"
        rows.append((nic["name"], nic["mac"], up, driver, str(nic["mtu"]), wire))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), harmless(row[5])])
        for row in rows
    )


def _stats(nics: list[dict[str, Any]]) -> str:
    lines = []
    for nic in nics:
        for side in ("wire", "guest"):
            lines += _counts(f"{nic['name']} {side}", nic[side])
    return "\n".join(lines) or "this VM has no NIC"


def _counts(head: str, values: dict[str, Any]) -> list[str]:
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += _counts(f"{head} {key}", value)
        elif isinstance(value, int) and not isinstance(value, bool) and key not in ("mtu", "passt"):
            found.append(f"{head} {key} {value}")
    return found


def _added(nic: dict[str, Any]) -> str:
    return f"{nic['name']} added, MAC {nic['mac']}"


def _removed(nic: dict[str, Any]) -> str:
    return f"{nic['name']} removed"


def _linked(nic: dict[str, Any]) -> str:
    return f"{nic['name']} is {'up' if nic['up'] else 'down'}"


_TEXTS: dict[str, Callable[[Any], str]] = {
    "list": _list,
    "stats": _stats,
    "add": _added,
    "remove": _removed,
    "link": _linked,
}
