"""Reading `--hv LIST|host-model|windows|passthrough|none` into a `FeatureRequest`.

Everything that can be wrong without knowing the host is found here: unknown and
contradicting flags, values out of range, requirements that a list lacks. Names
are QEMU's, with or without "hv-"; `-name`, `name=off` take away, `name`,
`+name`, `name=on` add. Pure; any thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from hvkvm.abi.tlfs import HV_SPINLOCK_RETRY_NEVER
from hvkvm.errors import ConfigError
from hvkvm.hyperv.enlightenments import ALIASES, BY_NAME, ENLIGHTENMENTS, VERSION_FIELDS
from hvkvm.tuples import NamedTuple

Base = Literal["list", "host-model", "windows", "passthrough", "none"]

_BASES: dict[str, Base] = {
    "host-model": "host-model",
    "windows": "windows",
    "passthrough": "passthrough",
    "none": "none",
}
_MIN_SPINLOCKS = 0xFFF  # QEMU's lower bound
_VENDOR_LENGTH = 12


class FeatureRequest(NamedTuple):
    """What the user asked for; names without "hv-", consistent in itself."""

    base: Base
    on: tuple[str, ...] = ()
    off: frozenset[str] = frozenset()
    auto: frozenset[str] = frozenset()
    """To be on exactly if the host reports it."""
    spinlocks: int | None = None
    vendor_id: str | None = None
    version: Mapping[str, int] = MappingProxyType({})
    """Fields of `enlightenments.Version` that were given."""


class _Reader:
    """Collects the items of one text."""

    def __init__(self) -> None:
        self.base: Base = "list"
        self.on: dict[str, None] = {}
        self.off: set[str] = set()
        self.auto: set[str] = set()
        self.settings: dict[str, str] = {}
        self.spinlocks: int | None = None
        self.vendor_id: str | None = None
        self.version: dict[str, int] = {}

    def item(self, text: str) -> None:
        sign = text[0] if text[0] in "+-" else ""
        name, equals, value = text[len(sign) :].partition("=")
        name = name.strip().lower().replace("_", "-").removeprefix("hv-")
        name = ALIASES.get(name, name)
        value = value.strip()
        if sign and equals:
            raise ConfigError(f"--hv {text}: a sign and a value contradict; use one of them")
        if name in _BASES:
            self._base(name, text, sign, value)
        elif name == "vendor-id":
            self._setting(name, text, sign, value)
            if not value.isascii() or not value.isprintable() or not 0 < len(value) <= _VENDOR_LENGTH:
                raise ConfigError(f"--hv {text}: not 1 to {_VENDOR_LENGTH} ASCII characters; shorten it")
            self.vendor_id = value
        elif name in VERSION_FIELDS:
            self._setting(name, text, sign, value)
            which, most = VERSION_FIELDS[name]
            self.version[which] = _number(text, value, 0, most)
        elif name in BY_NAME:
            self._feature(name, text, sign, value)
        else:
            raise ConfigError(f"--hv {text}: no such enlightenment; {_nearest(name)}")

    def _base(self, name: str, text: str, sign: str, value: str) -> None:
        if sign or value not in ("", "on"):
            raise ConfigError(f"--hv {text}: {name} cannot be taken away; leave it out")
        if self.base != "list" and self.base != name:
            raise ConfigError(f"--hv {text}: contradicts {self.base}; choose one")
        self.base = _BASES[name]

    def _setting(self, name: str, text: str, sign: str, value: str) -> None:
        if sign or not value:
            raise ConfigError(f"--hv {text}: hv-{name} wants a value; write {name}=VALUE, or leave it out")
        if self.settings.setdefault(name, value) != value:
            raise ConfigError(f"--hv {text}: contradicts {name}={self.settings[name]}; choose one")

    def _feature(self, name: str, text: str, sign: str, value: str) -> None:
        row = BY_NAME[name]
        lowered = value.lower()
        if sign == "-" or lowered == "off":
            state = "off"
        elif row.value == "tristate" and lowered == "auto":
            state = "auto"
        elif row.value == "number":
            if not value:
                raise ConfigError(
                    f"--hv {text}: hv-{name} wants a number; write {name}=0x1fff, or {name}=never"
                )
            never = lowered == "never"
            self.spinlocks = (
                HV_SPINLOCK_RETRY_NEVER if never else _number(text, value, _MIN_SPINLOCKS, 0xFFFFFFFF)
            )
            state = hex(self.spinlocks)
        elif lowered in ("", "on"):
            state = "on"
        else:
            choices = "on, off or auto" if row.value == "tristate" else "on or off"
            raise ConfigError(f"--hv {text}: hv-{name} is {choices}; leave the value out")
        before = self.settings.setdefault(name, state)
        if before != state:
            raise ConfigError(f"--hv {text}: hv-{name} is both {before} and {state}; choose one")
        if state == "off":
            self.off.add(name)
        elif state == "auto":
            self.auto.add(name)
        else:
            self.on[name] = None

    def request(self) -> FeatureRequest:
        if self.base == "none" and (self.on or self.auto or self.vendor_id is not None or self.version):
            raise ConfigError("--hv none: contradicts the features named with it; leave out one or the other")
        for name in self.on:
            # host-model and its like add what is not taken away; a list must name it.
            lacking = [
                f"hv-{n}"
                for n in BY_NAME[name].requires
                if n in self.off or (self.base == "list" and n not in self.on)
            ]
            if lacking:
                verb = "keep" if self.off.intersection(BY_NAME[name].requires) else "add"
                raise ConfigError(
                    f"--hv: hv-{name} requires {' and '.join(lacking)}; {verb} {', '.join(lacking)}"
                    f" or leave hv-{name} out"
                )
        return FeatureRequest(
            self.base,
            tuple(self.on),
            frozenset(self.off),
            frozenset(self.auto),
            self.spinlocks,
            self.vendor_id,
            self.version,
        )


def parse_features(text: str) -> FeatureRequest:
    """Read the value of `--hv`. Raises ConfigError: the flag, the reason, the remedy."""
    items = [item.strip() for item in text.split(",")]
    if not any(items):
        raise ConfigError(
            "--hv: nothing named; give host-model, windows, passthrough, none or a list of hv-* names"
        )
    reader = _Reader()
    for item in items:
        if not item.strip("+-"):
            raise ConfigError(f"--hv {text}: an empty name; remove the stray comma or sign")
        reader.item(item)
    return reader.request()


def _number(text: str, value: str, least: int, most: int) -> int:
    try:
        number = int(value, 0)
    except ValueError:
        number = -1
    if not least <= number <= most:
        raise ConfigError(f"--hv {text}: not a number from {least:#x} to {most:#x}; correct it")
    return number


def _nearest(name: str) -> str:
    from difflib import get_close_matches  # only on this way out

    known = [row.name for row in ENLIGHTENMENTS] + list(_BASES) + ["vendor-id", *VERSION_FIELDS, *ALIASES]
    if near := get_close_matches(name, known, 1, 0.5):
        return f"did you mean hv-{near[0]}?" if near[0] not in _BASES else f"did you mean {near[0]}?"
    return f"there are {', '.join(row.name for row in ENLIGHTENMENTS)}"
