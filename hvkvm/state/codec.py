"""A part's state as JSON and back: NamedTuples in, plain values out, and every value checked on the way in.

A state is a NamedTuple whose fields are int, bool, float, str, bytes, None,
tuples, dicts by str or int, and other states. A field that is `Any` comes back
as the plain value that it was made, for whoever knows its kind to give to
`restored`. What comes back was perhaps
damaged or made up, so nothing of it is believed: a missing or unknown field, a
wrong type, a number that no register holds is a StateError that names the field.
What a value means is for the part that loads it to check.

Pure; any thread.
"""

from __future__ import annotations

import binascii
import math
import types
from base64 import b64decode, b64encode
from functools import cache
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from hvkvm.errors import StateError

T = TypeVar("T")

_LEAST, _MOST = -(1 << 63), (1 << 64) - 1
"""Every register, counter and address fits; JSON would take a number of any length."""


def plain(value: Any) -> Any:
    """`value` as what JSON can hold. TypeError for a type that no state may have."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes):
        return b64encode(value).decode()
    if _is_state(type(value)):
        return {field: plain(getattr(value, field)) for field in value._fields}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    raise TypeError(f"{type(value).__name__} cannot be saved")


def restored(kind: type[T], value: Any, where: str) -> T:
    """The `kind` that `plain` made `value` of. StateError naming `where`, and the field in it."""
    found: T = _restored(kind, value, where)
    return found


def _is_state(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def _restored(kind: Any, value: Any, where: str) -> Any:
    if kind is None or kind is type(None):
        return value if value is None else _refuse(where, value, "nothing")
    if kind is Any:
        return value
    if kind is bytes:
        return _bytes(value, where)
    if kind is int:
        if type(value) is not int or not _LEAST <= value <= _MOST:
            _refuse(where, value, "a number of at most 64 bits")
        return value
    if kind is float:
        return _float(value, where)
    if kind in (bool, str):
        return value if type(value) is kind else _refuse(where, value, f"a {kind.__name__}")
    if _is_state(kind):
        return _state(kind, value, where)
    return _generic(get_origin(kind), get_args(kind), value, where)


def _generic(origin: Any, arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if origin in (Union, types.UnionType):
        (other,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else _restored(other, value, where)
    if origin is tuple:
        if type(value) is not list:
            _refuse(where, value, "a list")
        if len(arguments) == 2 and arguments[1] is ...:
            return tuple(_restored(arguments[0], item, f"{where}[{n}]") for n, item in enumerate(value))
        if len(value) != len(arguments):
            _refuse(where, value, f"{len(arguments)} values")
        pairs = enumerate(zip(arguments, value, strict=True))
        return tuple(_restored(kind, item, f"{where}[{n}]") for n, (kind, item) in pairs)
    if origin is dict:
        if type(value) is not dict:
            _refuse(where, value, "a table")
        keys, kind = arguments
        # Shown as Python writes it: a key of a made-up file may hold anything, a newline too.
        placed = ((key, item, f"{where}[{key[:40]!r}]") for key, item in value.items())
        return {_key(keys, key, where): _restored(kind, item, place) for key, item, place in placed}
    raise TypeError(f"{origin} cannot be saved")


def _key(kind: Any, key: str, where: str) -> Any:
    if kind is str:
        return key
    try:
        return _restored(int, int(key, 10) if len(key) <= 20 else None, where)
    except ValueError:
        _refuse(where, key, "a number for a key")


def _float(value: Any, where: str) -> float:
    """JSON's NaN and Infinity are none: they pass or fail every check that was not written for them."""
    try:
        found = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        found = math.inf
    return found if math.isfinite(found) else _refuse(where, value, "a number, or too large a one")


def _bytes(value: Any, where: str) -> bytes:
    try:
        return b64decode(value, validate=True) if type(value) is str else _refuse(where, value, "bytes")
    except (binascii.Error, ValueError):
        _refuse(where, value, "bytes in base64")


def _state(kind: Any, value: Any, where: str) -> Any:
    if type(value) is not dict:
        _refuse(where, value, f"a {kind.__name__}")
    hints = _hints(kind)
    if unknown := sorted(set(value) - set(hints)):
        raise StateError(f"{where}: {unknown[0][:40]!r} is no field of it")
    if missing := sorted(set(hints) - set(value)):
        raise StateError(f"{where}: its {missing[0]} is missing")
    return kind(**{name: _restored(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _refuse(where: str, value: Any, wanted: str) -> NoReturn:
    try:
        shown = repr(value)
    except (ValueError, RecursionError):  # an int of more digits than Python prints; what is nested too deep
        shown = f"a {type(value).__name__}"
    raise StateError(f"{where}: {shown[:40]}{'...' * (len(shown) > 40)} is not {wanted}")
