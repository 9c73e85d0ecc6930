"""Changes of a saved manifest that keep its structure in mind, or break it on purpose. Any thread."""

from __future__ import annotations

import random
from base64 import b64decode, b64encode
from binascii import Error
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

NUMBERS = (
    0,
    1,
    2,
    255,
    4095,
    4096,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 63,
    (1 << 64) - 1,
    -1,
    1 << 70,
)
STRANGERS: tuple[Any, ...] = (
    None, True, False, 1.5, "", "AAAA", "x" * 300, "\0", "a\nb", [], {}, [[]], {"": 0}, {"\n": 1}, *NUMBERS,
)  # fmt: skip


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every container of a tree with each of its keys."""
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        one = waiting.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        for key in keys:
            found.append((one, key))
            waiting.append(one[key])
    return found


def extremes(tree: Any) -> Iterator[Any]:
    """Copies of `tree`, each with one of its numbers made one that is larger than some register."""
    for container, key in places(tree):
        value = container[key]
        if type(value) is int:
            for number in (-(1 << 63), -1, 1 << 8, 1 << 16, 1 << 32, (1 << 64) - 1):
                container[key] = number
                yield deepcopy(tree)
            container[key] = value


def mutate(tree: Any, chance: random.Random) -> None:
    """Change one to three places of `tree`."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        known = places(tree)
        if not known:
            return
        container, key = chance.choice(known)
        if chance.random() < 0.2:
            _reshape(container, key, chance)
        elif chance.random() < 0.2:
            container[key] = _stranger(chance)
        elif chance.random() < 0.15:
            other, other_key = chance.choice(known)
            container[key] = other[other_key] if not isinstance(other[other_key], dict | list) else 0
        else:
            container[key] = _another(container[key], chance)


def _stranger(chance: random.Random) -> Any:
    """One of its own for each place: what is changed in one later is not to be in all, nor in itself."""
    return deepcopy(chance.choice(STRANGERS))


def _reshape(container: Any, key: Any, chance: random.Random) -> None:
    """Take something out, or put it in twice."""
    if isinstance(container, dict):
        value = container.pop(key)
        if chance.random() < 0.5:
            container[f"{key}{chance.choice(('', '_', '0'))}"] = value
    elif chance.random() < 0.5:
        del container[key]
    else:
        container.insert(chance.randrange(len(container) + 1), container[key])


def _another(value: Any, chance: random.Random) -> Any:
    """Another value of its kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return chance.choice(
            (value + 1, value - 1, value ^ 1 << chance.randrange(64), value << 1, chance.choice(NUMBERS))
        )
    if isinstance(value, str):
        return _another_text(value, chance)
    if isinstance(value, list):
        return chance.sample(value, len(value)) if chance.random() < 0.5 else value * 2
    return _stranger(chance)


def _another_text(value: str, chance: random.Random) -> str:
    try:
        raw = bytearray(b64decode(value, validate=True))
    except (Error, ValueError):
        raw = bytearray()
    if not raw:
        return chance.choice((value + "x", value[:-1], value[::-1], value.upper(), ""))
    kind = chance.random()
    if kind < 0.6:
        raw[chance.randrange(len(raw))] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
    elif kind < 0.75:
        at = chance.randrange(len(raw))
        raw[at : at + 8] = chance.randbytes(min(8, len(raw) - at))
    elif kind < 0.9:
        del raw[chance.randrange(len(raw)) :]
    else:
        raw += chance.randbytes(chance.choice((1, 8, 4096)))
    return b64encode(raw).decode()
