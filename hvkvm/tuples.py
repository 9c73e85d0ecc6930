"""`NamedTuple` as typing's is, made quickly.

Why: a run makes fifty of these classes as it starts, and one with VMBus, a disk and a network 150. typing
compiles their annotations, and a method of each, which is a tenth of what all imports cost and more. So what
machines are made of takes it from here. To type checkers it is typing's own, and so are its rules: annotated
fields, those with defaults last, methods and properties beside them. Pure; any thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import NamedTuple as NamedTuple
else:
    from collections import _tuplegetter as getter
    from functools import cache
    from types import CodeType, FunctionType

    @cache
    def _code(count: int) -> CodeType:
        """Of a `__new__` with so many fields: compiled once, and given to each class with its own names."""
        names = "".join(f", _{index}" for index in range(count))
        code: CodeType = eval(f"lambda _cls{names}: _new(_cls, ({names[2:]}{','[:count]}))").__code__
        return code.replace(co_name="__new__")

    class _Named(tuple):
        """What all of them have."""

        __slots__ = ()

        @classmethod
        def _make(cls, values: Any) -> Any:
            made = tuple.__new__(cls, values)
            if len(made) != len(cls._fields):
                raise TypeError(
                    f"{cls.__name__} has {len(cls._fields)} fields, and these are {len(made)} values"
                )
            return made

        def _asdict(self) -> dict[str, Any]:
            return dict(zip(self._fields, self, strict=True))

        def _replace(self, **changes: Any) -> Any:
            made = tuple.__new__(type(self), map(changes.pop, self._fields, self))
            if changes:
                raise TypeError(f"{type(self).__name__} has no field {', '.join(changes)}")
            return made

        def __repr__(self) -> str:
            values = (f"{name}={value!r}" for name, value in zip(self._fields, self, strict=True))
            return f"{type(self).__name__}({', '.join(values)})"

        def __getnewargs__(self) -> tuple[Any, ...]:
            """For copy and pickle."""
            return tuple(self)

    class _Maker(type):
        """Of `NamedTuple`: a class derived from it is a tuple, and no instance of this one."""

        def __new__(cls, name: str, _bases: tuple[type, ...], space: dict[str, Any]) -> type:
            made = type(name, (_Named,), {"__slots__": (), **space})
            fields = tuple(made.__annotations__)
            defaults = {field: space[field] for field in fields if field in space}
            if tuple(defaults) != fields[len(fields) - len(defaults) :]:
                raise TypeError(f"{name}: a field without a default stands behind one that has it")
            made._fields = made.__match_args__ = fields
            made._field_defaults = defaults
            for index, field in enumerate(fields):
                setattr(made, field, getter(index, None))
            code = _code(len(fields)).replace(co_varnames=("_cls", *fields), co_qualname=f"{name}.__new__")
            new = FunctionType(code, {"_new": tuple.__new__}, "__new__", tuple(defaults.values()))
            new.__module__ = made.__module__
            made.__new__ = new
            return made

    NamedTuple = type.__new__(_Maker, "NamedTuple", (), {})
