"""Small immutable value classes without the cost of importing `dataclasses`.

Why: `dataclasses` imports `inspect`, and compiles several functions for every
class it makes; for the dozen records that a machine's start needs, that was a
quarter of all time before the guest ran. `@record` makes what
`@dataclass(frozen=True, slots=True)` makes, to type checkers too; its objects
are slower to construct, so it is for values that are made seldom.

Imports nothing of hvkvm; any room may use it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform, overload

_Class = TypeVar("_Class", bound=type)
_Record = TypeVar("_Record")
_set = object.__setattr__


@overload
@dataclass_transform(frozen_default=True)
def record(cls: _Class, /) -> _Class: ...
@overload
@dataclass_transform(frozen_default=True)
def record(*, kw_only: bool = False) -> Callable[[_Class], _Class]: ...
def record(cls: Any = None, /, *, kw_only: bool = False) -> Any:
    """Class decorator: the annotated names become fields, in order, those of a record base first.

    A value in the class body is the field's default, shared by all objects: so
    never a mutable one. Fields are compared, hashed and shown; none can be set
    or deleted afterwards (AttributeError).
    """
    if cls is None:
        return lambda made: _make(made, kw_only)
    return _make(cls, kw_only)


def fields(cls: type) -> tuple[str, ...]:
    """The names of a record class's fields. AttributeError for any other class."""
    names: tuple[str, ...] = cls.__match_args__  # type: ignore[attr-defined]
    return names


def replace(value: _Record, /, **changes: Any) -> _Record:
    """A copy of the record `value` with some fields changed. TypeError for a name that is no field."""
    kept = {name: getattr(value, name) for name in fields(type(value))}
    return type(value)(**{**kept, **changes})


def _make(cls: type, kw_only: bool) -> type:
    body = dict(cls.__dict__)
    own = tuple(body.get("__annotations__", ()))
    inherited = tuple(name for base in cls.__bases__ for name in getattr(base, "__match_args__", ()))
    names = tuple(dict.fromkeys(inherited + own))
    defaults: dict[str, Any] = {}
    for base in reversed(cls.__mro__[1:]):
        defaults.update(getattr(base, "_record_defaults", {}))
    defaults.update((name, body.pop(name)) for name in own if name in body)
    for name in ("__dict__", "__weakref__"):
        body.pop(name, None)

    def initialise(self: object, *values: Any, **named: Any) -> None:
        if len(values) > (0 if kw_only else len(names)):
            raise TypeError(f"{cls.__name__} takes {0 if kw_only else len(names)} positional values")
        for name, value in zip(names, values, strict=False):
            _set(self, name, value)
        for name in names[len(values) :]:
            if name in named:
                _set(self, name, named.pop(name))
            elif name in defaults:
                _set(self, name, defaults[name])
            else:
                raise TypeError(f"{cls.__name__} needs a value for {name}")
        if named:
            raise TypeError(f"{cls.__name__} does not take {', '.join(named)} (again)")

    body.update(
        __slots__=tuple(name for name in own if name not in inherited),
        __match_args__=names,
        _record_defaults=defaults,
        __init__=initialise,
        __setattr__=_refuse,
        __delattr__=_refuse,
        __eq__=_equal,
        __hash__=_hash,
        __reduce__=_reduce,
    )
    body.setdefault("__repr__", _show)
    return type(cls)(cls.__name__, cls.__bases__, body)


def _values(self: object) -> tuple[Any, ...]:
    return tuple(getattr(self, name) for name in fields(type(self)))


def _refuse(self: object, name: str, *_value: Any) -> None:
    raise AttributeError(f"{type(self).__name__}.{name} cannot be changed: make another one")


def _equal(self: object, other: object) -> bool:
    if type(other) is not type(self):
        return False
    return _values(self) == _values(other)


def _hash(self: object) -> int:
    return hash(_values(self))


def _show(self: object) -> str:
    shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in fields(type(self)))
    return f"{type(self).__name__}({shown})"


def _reduce(self: object) -> tuple[Any, ...]:
    return _restore, (type(self), dict(zip(fields(type(self)), _values(self), strict=True)))


def _restore(cls: type, values: dict[str, Any]) -> object:
    return cls(**values)
