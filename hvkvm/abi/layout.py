"""Layouts as tables, from which both our texts about bytes and the Wireshark dissector are made.

A layout is a sequence of little-endian fields; what comes behind them is another
layout, chosen by the value of any field that was read before, or always the same.
`decode` takes hostile bytes: it raises nothing, and its work is bounded by the
layouts' own depth and MAX_REPEATS. No I/O and no state; anyone may import it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from struct import Struct

from hvkvm.tuples import NamedTuple

MAX_REPEATS = 64
"""Of a layout that is repeated to the end of the bytes."""

_CODE = re.compile(r"(\d*)([a-zA-Z])")
_SIZES = {"B": 1, "H": 2, "I": 4, "Q": 8, "b": 1}

Names = Mapping[int, str]
"""What values of a field are called."""


class Field(NamedTuple):
    """One field: `code` is struct's; "16s" and the like are bytes."""

    name: str
    code: str
    offset: int
    size: int
    names: Names = {}
    volatile: bool = False
    """Whether its value is another at every run: a time, an address of the guest's."""


class Layout(NamedTuple):
    """One row. `switch` names the field by which `cases` choose what follows; else `then` does, if any."""

    name: str
    fields: tuple[Field, ...]
    size: int
    switch: str = ""
    cases: Mapping[int, Layout] = {}
    then: Layout | None = None
    repeats: bool = False
    """Whether it comes again and again up to the end."""
    optional: bool = False
    """Whether it may be missing at the end, in whole or in part: older versions have not got it."""


class Value(NamedTuple):
    """A field as it was found: an int or bytes, at `offset` in the whole."""

    layout: str
    field: Field
    value: int | bytes
    offset: int


class Decoded(NamedTuple):
    """What bytes hold. `rest` begins behind the last field; `short` says which layout was cut off."""

    values: tuple[Value, ...]
    rest: int
    short: str


def layout(
    name: str,
    text: str = "",
    *,
    switch: str = "",
    cases: Mapping[int, Layout] | None = None,
    then: Layout | None = None,
    repeats: bool = False,
    names: Mapping[str, Names] | None = None,
    volatile: tuple[str, ...] = (),
) -> Layout:
    """A row of "field:code ...": `_` is padding. ValueError for a mistake in it."""
    fields, at = [], 0
    for word in text.split():
        field, _, code = word.partition(":")
        found = _CODE.fullmatch(code)
        if not found:
            raise ValueError(f"{name}: {word}")
        count, kind = found.groups()
        size = int(count or 1) if kind in "sx" else _SIZES[kind]
        if kind != "x":
            fields.append(Field(field, code, at, size, (names or {}).get(field, {}), field in volatile))
        at += size
    if unknown := (set(names or {}) | set(volatile)) - {field.name for field in fields}:
        raise ValueError(f"{name}: no field {', '.join(unknown)}")
    return Layout(name, tuple(fields), at, switch, cases or {}, then, repeats)


def of_struct(
    name: str,
    names: tuple[str, ...],
    struct: Struct,
    then: Layout | None = None,
    *,
    optional: bool = False,
) -> Layout:
    """The row of a Struct whose values are called `names`, in order; padding has none."""
    left = iter(names)
    words = [
        f"{'_' if kind == 'x' else next(left)}:{count}{kind}" for count, kind in _CODE.findall(struct.format)
    ]
    return layout(name, " ".join(words), then=then)._replace(optional=optional)


def decode(data: bytes, first: Layout | None) -> Decoded:
    """Read `data` by `first` and what it leads to."""
    values: list[Value] = []
    known: dict[str, int] = {}
    at, row, repeats = 0, first, 0
    while row is not None:
        if at + row.size > len(data):
            ends_here = row.optional or (row.repeats and at == len(data))
            return Decoded(tuple(values), at, "" if ends_here else row.name)
        for field in row.fields:
            raw = data[at + field.offset : at + field.offset + field.size]
            value: int | bytes = raw
            if field.code[-1] != "s":
                value = known[field.name] = int.from_bytes(raw, "little", signed=field.code == "b")
            values.append(Value(row.name, field, value, at + field.offset))
        at += row.size
        if row.repeats:
            repeats += 1
            if at >= len(data) or repeats >= MAX_REPEATS or not row.size:
                break
        elif row.switch:
            row = row.cases.get(known.get(row.switch, -1))
        else:
            row = row.then
    return Decoded(tuple(values), at, "")


def every(first: Layout) -> list[Layout]:
    """`first` and all that it leads to, each once."""
    found: list[Layout] = []
    waiting = [first]
    while waiting:
        row = waiting.pop(0)
        if not any(row is seen for seen in found):
            found.append(row)
            waiting += [*row.cases.values(), *([] if row.then is None else [row.then])]
    return found
