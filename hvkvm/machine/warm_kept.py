"""Warm guests that are kept between runs, by what they were made of.

Why: whoever runs many commands or tests wants the boot once, and another one as soon as
kernel, options, this package or the host's KVM is another. `hvkvm.machine.warm` makes them.

Any thread, any number of processes: a file appears whole or not at all; two that make
the same one at a time make it twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from hvkvm.boot import cache
from hvkvm.digest import sha256
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.config_fields import Field, fields_of
from hvkvm.machine.warm import warm

MOST = 8
"""Files that are kept: some 70 MiB each."""

_CPU_FACTS = ("vendor_id", "model name", "flags")


def find(config: MachineConfig) -> Path | None:
    """The file of a warm guest made of `config`, if one is kept."""
    path = _path(config)
    return path if os.path.exists(path) else None


def kept(config: MachineConfig, *, on_console: Callable[[bytes], object] | None = None) -> Path:
    """The file of a warm guest made of `config` as `warm` makes it; made now if it is not kept yet.

    It is under `boot.cache.root()`, in `warm`, of which the MOST that were made or used last stay, or fewer
    where the pytest plugin keeps its own there. `on_console` is as in `warm`. Raises what `warm` raises, and
    OSError where nothing can be written there.
    """
    path = _path(config)
    if not os.path.exists(path):
        with cache.filling(path.parent):
            warm(config, path, on_console=on_console)
        cache.forget_oldest(path.parent, "*.state", MOST)
    return path


def _path(config: MachineConfig) -> Path:
    return cache.root() / "warm" / f"{_key(config)}.state"


def _key(config: MachineConfig) -> str:
    """What decides about the guest: the configuration, the files in it, our code, and the host."""
    fields = fields_of(MachineConfig).items()
    made = [f"{key}={getattr(config, key)!r}" for key, field in fields if _shapes(key, field)]
    named = [config.kernel, config.initrd, config.busybox, config.modules_dir]
    files = [path for path in named if path is not None] + [path for _guest, path in config.files]
    own = sorted(Path(__file__).parents[1].rglob("*.py"))
    parts = [*made, *_marks(files), *_marks(own), *_host()]
    return sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()[:32]


def _shapes(key: str, field: Field) -> bool:
    return field.in_saved or field.boot_only or key in ("modules_dir", "busybox", "nets")


def _marks(paths: Iterable[Path]) -> list[str]:
    seen = ((path, path.stat()) for path in paths)
    return [f"{path} {mark.st_size} {mark.st_mtime_ns}" for path, mark in seen]


def _host() -> list[str]:
    """A guest goes on only where the CPU and KVM show it what it had."""
    with open("/proc/cpuinfo", errors="replace") as lines:
        first = [line for _number, line in zip(range(40), lines, strict=False)]
    facts = [line for line in first if line.partition("\t")[0].strip() in _CPU_FACTS]
    return [os.uname().release, *facts]
