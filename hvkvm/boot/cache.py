"""Where boot material that is costly to make is kept between runs.

Why: taking a vmlinux out of a bzImage or decompressing modules costs more than
the boot that follows, so the result is kept by a key of its source. Called by
`boot.vmlinux`, `boot.initramfs` and the scripts. Any thread, any number of
processes: a file appears complete (rename) or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def root() -> Path:
    """The cache folder: `$HVKVM_CACHE`, or `~/.cache/hvkvm`. It need not exist yet.

    A variable that is empty counts as one that is not set.
    """
    if chosen := os.environ.get("HVKVM_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("HOME") or _home(), ".cache/hvkvm")


def _home() -> str:
    """The user's home without $HOME: `expanduser` takes it from the system then, but not for an empty one."""
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return "~"


def publish(path: Path, chunks: Iterable[bytes]) -> None:
    """Write `chunks` to `path` so that readers see the whole file or the one before it.

    Raises OSError (full or read-only disk); nothing half-written stays behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps two writers apart; both write the same bytes, so the last rename is harmless.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as out:
            for chunk in chunks:
                out.write(chunk)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
