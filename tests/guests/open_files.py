"""What this process has open, for tests that hold it to closing that."""

from __future__ import annotations

import os


def open_files() -> dict[str, str]:
    """By fd: what it leads to."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the folder's own
    return found


def newly_open(before: dict[str, str]) -> dict[str, str]:
    """What is open now and was not `before`, by fd."""
    return {fd: to for fd, to in open_files().items() if before.get(fd) != to}
