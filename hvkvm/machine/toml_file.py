"""TOML that a user wrote, read or refused in one line: of a machine, a matrix, a disk's faults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hvkvm.errors import ConfigError

MAX_NUMBER = (1 << 63) - 1
"""TOML's own integers are of 64 bits; beyond 4300 digits Python does not even print one."""


def read_toml(path: Path, where: str) -> dict[str, Any]:
    """The tables of a file, which may be a pipe. ConfigError, which begins with `where`."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}; give a readable TOML file") from None
    return parse_toml(content, where)


def parse_toml(content: bytes | str, where: str) -> dict[str, Any]:
    """The tables in `content`. ConfigError, which begins with `where`."""
    import tomllib

    try:
        text = content if isinstance(content, str) else content.decode()
        tables = tomllib.loads(text)
        key = next(_too_large(tables), None)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{where}: {error}; give a readable TOML file") from None
    except ValueError:  # of int()
        raise ConfigError(f"{where}: a number has too many digits; write one of 64 bits") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deep; write flat tables and lists") from None
    if key is not None:
        raise ConfigError(f"{where}: {key[:60]}: a number that is too large; write one of 64 bits")
    return tables


def _too_large(value: object, key: str = "") -> Iterator[str]:
    """The keys of integers that no TOML file may have."""
    if isinstance(value, int):
        if abs(value) > MAX_NUMBER:
            yield key
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _too_large(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for item in value:
            yield from _too_large(item, key)
