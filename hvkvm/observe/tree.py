"""Nested values as text for people: what belongs together on one line, the rest indented below.

Used for dumps and by `hvkvm ctl`. Any thread.
"""

from __future__ import annotations

from collections.abc import Mapping

WIDTH = 110
_STEP = "  "


def lines(tree: Mapping[str, object], indent: str = "") -> list[str]:
    """The lines of `tree`: dicts, lists and scalars, such as JSON holds."""
    found = _wrapped(
        [f"{_label(key)} {_text(value)}" for key, value in tree.items() if _is_leaf(value)], indent
    )
    for key, value in tree.items():
        if not _is_leaf(value):
            found += _below(f"{indent}{key}:", value, indent)
    return found


def _label(key: object) -> str:
    """What stands before a value: a number with a colon, lest it be read as another value."""
    return f"{key}:" if str(key).isdecimal() else str(key)


def _below(head: str, value: object, indent: str) -> list[str]:
    if isinstance(value, Mapping):
        inner = lines(value, indent + _STEP)
        return _joined(head, inner)
    found = [head]
    for item in value if isinstance(value, list | tuple) else [value]:
        inner = (
            lines(item, indent + 2 * _STEP)
            if isinstance(item, Mapping)
            else [f"{indent}{_STEP * 2}{_text(item)}"]
        )
        if inner:
            found.append(f"{indent}{_STEP}- {inner[0].strip()}")
            found += inner[1:]
    return found


def _joined(head: str, inner: list[str]) -> list[str]:
    """What is one short line goes behind its name."""
    if len(inner) == 1 and len(head) + len(inner[0].strip()) < WIDTH:
        return [f"{head} {inner[0].strip()}"]
    return [head, *inner]


def _is_leaf(value: object) -> bool:
    if isinstance(value, Mapping):
        return not value
    if isinstance(value, list | tuple):
        return not any(isinstance(item, Mapping | list | tuple) for item in value)
    return True


def _text(value: object) -> str:
    if value is None or value == [] or value == {} or value == "":
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:.1f}"
    return str(value)


def _wrapped(parts: list[str], indent: str) -> list[str]:
    found: list[str] = []
    line = ""
    for part in parts:
        if line and len(indent) + len(line) + 2 + len(part) > WIDTH:
            found.append(f"{indent}{line},")
            line = part
        else:
            line = f"{line}, {part}" if line else part
    return [*found, f"{indent}{line}"] if line else found
