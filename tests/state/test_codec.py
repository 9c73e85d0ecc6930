"""Parts' states as plain values: what goes in comes out, and nothing else is taken."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.errors import StateError
from hvkvm.state.codec import plain, restored

NUMBERS = st.integers(-(1 << 63), (1 << 64) - 1)


class Inner(NamedTuple):
    register: int
    name: str


class Outer(NamedTuple):
    on: bool
    page: bytes
    rate: float
    maybe: int | None
    pair: tuple[int, str]
    many: tuple[Inner, ...]
    by_number: dict[int, bytes]
    by_name: dict[str, Inner]
    inner: Inner


INNER = st.builds(Inner, NUMBERS, st.text())
OUTER = st.builds(
    Outer,
    st.booleans(),
    st.binary(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.none() | NUMBERS,
    st.tuples(NUMBERS, st.text()),
    st.lists(INNER, max_size=3).map(tuple),
    st.dictionaries(NUMBERS, st.binary(), max_size=3),
    st.dictionaries(st.text(), INNER, max_size=3),
    INNER,
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=20,
)


@given(OUTER)
def test_what_is_saved_comes_back_through_json(state: Outer) -> None:
    assert restored(Outer, json.loads(json.dumps(plain(state))), "it") == state


@given(ANYTHING)
def test_anything_else_is_refused_in_one_line(value: Any) -> None:
    with pytest.raises(StateError) as caught:
        restored(Outer, value, "vCPUs")
    assert str(caught.value).startswith("vCPUs")
    assert "\n" not in str(caught.value)


@given(OUTER, st.data())
def test_a_changed_value_is_the_same_type_or_refused(state: Outer, data: st.DataObject) -> None:
    """Whatever JSON says in one place, what comes out has the types of the state, or nothing does."""
    tree = json.loads(json.dumps(plain(state)))
    at: Any = tree
    while True:
        keys = list(at) if isinstance(at, dict) else range(len(at))
        if not keys:
            return
        key = data.draw(st.sampled_from(list(keys)))
        if not isinstance(at[key], dict | list) or data.draw(st.booleans()):
            break
        at = at[key]
    at[key] = data.draw(ANYTHING)
    try:
        found = restored(Outer, tree, "it")
    except StateError as error:
        assert "\n" not in str(error)
    else:
        assert json.loads(json.dumps(plain(found))) == json.loads(json.dumps(tree))


def nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tree: tree.pop("inner"), "it: its inner is missing"),
        (lambda tree: tree.update(extra=1), "it: 'extra' is no field of it"),
        (lambda tree: tree.update(on=1), "it.on: 1 is not a bool"),
        (lambda tree: tree.update(maybe=True), "it.maybe: True is not a number"),
        (lambda tree: tree.update(maybe=1 << 64), "it.maybe: 18446744073709551616 is not a number"),
        (
            lambda tree: tree.update(rate=10**400),
            "it.rate: 1000000000000000000000000000000000000000... is not",
        ),
        (lambda tree: tree.update(rate=math.nan), "it.rate: nan is not a number"),
        (lambda tree: tree.update(rate=-math.inf), "it.rate: -inf is not a number"),
        (lambda tree: tree.update(maybe=10**5000), "it.maybe: a int is not a number of at most 64 bits"),
        (lambda tree: tree.update(maybe=nested(5000)), "it.maybe: a list is not a number"),
        (lambda tree: tree.update(page="=x"), "it.page: '=x' is not bytes in base64"),
        (lambda tree: tree["pair"].append(1), "it.pair: [1, 'a', 1] is not 2 values"),
        (lambda tree: tree["many"].append(7), "it.many[0]: 7 is not a Inner"),
        (lambda tree: tree["by_name"].update({"a\nb": 1}), "it.by_name['a\\nb']: 1 is not a Inner"),
        (lambda tree: tree["by_number"].update(x="AA=="), "it.by_number: 'x' is not a number for a key"),
    ],
)
def test_the_field_is_named(change: Any, words: str) -> None:
    inner = Inner(1, "x")
    tree = plain(Outer(True, b"p", 1.0, None, (1, "a"), (), {}, {}, inner))
    change(tree)
    with pytest.raises(StateError) as caught:
        restored(Outer, tree, "it")
    assert str(caught.value).startswith(words)


def test_only_what_can_come_back_is_saved() -> None:
    with pytest.raises(TypeError, match="bytearray"):
        plain(bytearray(b"x"))
