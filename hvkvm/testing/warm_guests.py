"""Warm Linux guests for tests: each sort is booted once, kept in the cache, and copied for every test.

What a guest is booted with names its file, and with it this hvkvm's own code and the host's
CPU and kernel; a file that fits no more is never asked for again. A few are kept. Any
process: one boots, the others wait for it.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvkvm import given_file
from hvkvm.boot import cache
from hvkvm.errors import ConfigError

OF_THE_RUN = frozenset({"command", "command_io", "files", "control", "name", "vsock", "timeout"})
"""Fields of a configuration that a copy has of its own."""
NOT_WARM = ("initrd", "disks", "cdroms", "nets", "record", "timeline", "firmware", "restore")
"""Fields of guests that are not kept: what they stand on is the test's own, or shows their boot."""
MAX_KEPT = 6
"""Files; each has the RAM that a boot has touched."""


def copy_of(settings: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """The settings of a copy of the warm guest that `settings` ask for, which is booted if there is none.

    ConfigError for what no warm guest has, and where another process neither makes it nor lets us; what
    `hvkvm.warm` raises.
    """
    for key in NOT_WARM:
        if settings.get(key):
            raise ConfigError(f"warm=True: a warm guest has no {key}; leave one of them out")
    boot = {key: value for key, value in settings.items() if key not in OF_THE_RUN}
    path = cache.root() / "warm" / f"{_digest(boot)}.state"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        # Who has it boots for as long as we might, and one before him may have failed.
        if not given_file.lock_in_time(lock.fileno(), fcntl.LOCK_EX, 2 * seconds):
            raise ConfigError(f"warm=True: another process keeps {lock.name} locked; end it")
        if not path.exists():
            _make(boot, path, seconds)
        os.utime(path)
    own = {key: value for key, value in settings.items() if key in OF_THE_RUN}
    return {**own, "kernel": path, "warm": path}


def _make(boot: Mapping[str, Any], path: Path, seconds: float) -> None:
    from hvkvm.machine.config import MachineConfig
    from hvkvm.machine.warm import warm

    cache.forget_oldest(path.parent, "*.state", MAX_KEPT - 1)
    with cache.filling(path.parent):
        warm(MachineConfig(**boot, timeout=seconds), path)


def _digest(boot: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for key in sorted(boot):
        value = boot[key]
        digest.update(f"{key}={value!r}\n".encode())
        if isinstance(value, Path):
            seen = os.stat(value)
            digest.update(f"{seen.st_size} {seen.st_mtime_ns}\n".encode())
    digest.update(_here().encode())
    return digest.hexdigest()[:32]


@functools.cache
def _here() -> str:
    """This hvkvm's code as it was when the process began, the host's kernel and its CPU."""
    code = Path(__file__).parents[1]
    seen = [(str(file), os.stat(file)) for file in sorted(code.rglob("*.py"))]
    files = " ".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in seen)
    return f"{files} {os.uname().release} {_cpu()}"


def _cpu() -> str:
    """What says which CPU this is; saved guests are tied to it."""
    try:
        text = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return ""
    return "\n".join(line for line in text.splitlines() if line.startswith(("model", "flags", "stepping")))
