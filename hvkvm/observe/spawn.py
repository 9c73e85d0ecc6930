"""A child process that waits before its exec, so that a tracer can seize it first.

Used by `ioctl_trace` alone, on its thread. Plain fork and exec: `subprocess` waits
for the exec, and a seized child's exec waits for its tracer.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Sequence
from typing import NoReturn

from hvkvm.errors import ConfigError


class Command:
    """A forked child. `go` lets it exec; `abandon` ends it."""

    def __init__(self, argv: Sequence[str]) -> None:
        path = _program(argv[0])
        self._name = argv[0]
        wait_fd, self._go_fd = os.pipe2(os.O_CLOEXEC)
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._go_fd)
            _child(wait_fd, path, argv)
        os.close(wait_fd)

    def go(self) -> None:
        """Let the child exec. What goes wrong from here on is its own exit status, 126 or 127."""
        os.write(self._go_fd, b"g")
        os.close(self._go_fd)

    def abandon(self) -> None:
        """End the child before it ran anything."""
        os.close(self._go_fd)  # it reads an end of file, and exits
        os.waitpid(self.pid, 0)


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is not None:
        return path
    if os.path.exists(name) and "/" in name:
        raise ConfigError(f"{name}: cannot be executed; name a program, or chmod +x it")
    raise ConfigError(f"{name}: no such command; check the name and PATH")


def _child(wait_fd: int, path: str, argv: Sequence[str]) -> NoReturn:
    try:
        if os.read(wait_fd, 1):
            # As Python found them: it ignores these two, and a mask outlives an exec.
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            os.execv(path, list(argv))
    except OSError as error:
        os.write(2, os.fsencode(f"hvkvm: {path}: {error.strerror}\n"))
    finally:
        os._exit(126)
