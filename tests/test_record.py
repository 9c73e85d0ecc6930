"""Records behave as frozen dataclasses do, wherever hvkvm relies on it."""

from __future__ import annotations

import copy
import pickle

import pytest

from hvkvm.record import fields, record, replace


@record
class Point:
    """A point."""

    x: int
    y: int = 5

    @property
    def sum(self) -> int:
        return self.x + self.y


@record
class Named(Point):
    name: str = "p"


@record(kw_only=True)
class Options:
    size: int
    text: str = ""


def test_values_come_by_position_by_name_and_by_default() -> None:
    assert (Point(1).x, Point(1).y, Point(1, y=2).y, Point(y=3, x=4).sum) == (1, 5, 2, 7)
    assert Options(size=3).text == ""


@pytest.mark.parametrize("call", [Point, lambda: Point(1, 2, 3), lambda: Point(1, x=1), lambda: Options(3)])  # type: ignore[call-arg,misc,arg-type]
def test_wrong_values_are_type_errors(call: object) -> None:
    with pytest.raises(TypeError):
        call()  # type: ignore[operator]


def test_a_record_cannot_be_changed() -> None:
    point = Point(1)
    with pytest.raises(AttributeError):
        point.x = 2  # type: ignore[misc]
    with pytest.raises(AttributeError):
        point.other = 2  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        del point.x
    assert not hasattr(point, "__dict__")


def test_equal_values_are_equal_and_hash_alike_and_other_classes_are_not() -> None:
    assert Point(1) == Point(1, 5)
    assert hash(Point(1)) == hash(Point(1, 5))
    assert Point(1) != Point(2)
    assert Point(1) != Named(1)
    assert Point(1) != (1, 5)


def test_a_derived_record_has_its_base_s_fields_first() -> None:
    assert fields(Named) == ("x", "y", "name")
    assert repr(Named(1, name="q")) == "Named(x=1, y=5, name='q')"
    assert isinstance(Named(1), Point)


def test_replace_copy_and_pickle() -> None:
    assert replace(Named(1), y=9) == Named(1, 9)
    with pytest.raises(TypeError):
        replace(Point(1), z=1)
    options = Options(size=1, text="t")
    assert copy.copy(options) == options == pickle.loads(pickle.dumps(options))


def test_a_match_statement_sees_the_fields() -> None:
    match Point(1, 2):
        case Point(x, y):
            assert (x, y) == (1, 2)
