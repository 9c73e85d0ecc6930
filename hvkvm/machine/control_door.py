"""The control socket of a machine: listens from the start, and imports what answers at the first client.

Why: every `hvkvm run` has a control socket, and few are ever asked. So a run pays
for the socket at its start, and the first client for all the rest.

Owner: the I/O loop; opened on the main thread before it runs, closed behind it in two steps.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from hvkvm.errors import NO_FILE, ConfigError, FolderUnusable, HostExhausted, NameTaken, exhausted
from hvkvm.events import Warned
from hvkvm.observe import control_path
from hvkvm.runtime import unix_listener
from hvkvm.runtime.acceptor import ACCEPT_PAUSE

if TYPE_CHECKING:
    from hvkvm.machine.control import Control
    from hvkvm.machine.parts import Parts
    from hvkvm.runtime.io_loop import Handle


class ControlDoor:
    """Owns the socket's file, and its fd until the first client comes."""

    def __init__(self, parts: Parts, fd: int, path: Path) -> None:
        self.path = path
        self._parts = parts
        self._fd = fd
        self._owned = unix_listener.identity(path)
        self._closed = False
        self._told = False
        self._control: Control | None = None
        self._reader: Handle | None = parts.platform.io.add_reader(fd, self._open)

    def _open(self) -> None:
        if self._reader is not None:
            self._reader.remove()
            self._reader = None
        try:
            from hvkvm.machine.control import Control  # which opens files, too

            self._control = Control(self._parts, self._fd)
        except (OSError, ImportError) as error:
            if getattr(error, "errno", None) not in NO_FILE and not self._told:
                self._told = True
                text = f"the control socket does not answer: {error}"
                self._parts.platform.observer.event(Warned("control", text))
            # Out of fds or memory, say: whoever connects waits, the guest does not.
            self._parts.platform.io.call_later(ACCEPT_PAUSE, self._watch)

    def _watch(self) -> None:
        if self._closed:
            return
        try:
            self._reader = self._parts.platform.io.add_reader(self._fd, self._open)
        except OSError:
            self._parts.platform.io.call_later(ACCEPT_PAUSE, self._watch)

    def close(self) -> None:
        """Take the name away. The I/O loop has ended, and the machine is about to be released."""
        self._closed = True
        unix_listener.remove(self.path, self._owned)
        if self._control is not None:
            self._control.close()
        elif self._reader is not None:
            self._reader.remove()

    def tell_the_end(self) -> None:
        """Tell who waits how it ended, when all is released: they may start another VM with its files."""
        if self._control is not None:
            self._control.tell_the_end()
        else:
            os.close(self._fd)


def open_door(parts: Parts, stack: ExitStack, last: ExitStack) -> ControlDoor | None:
    """Listen where `parts.platform.config` says. `last` is closed behind all else of the machine.

    ConfigError, HostExhausted; in "auto" only ConfigError, for a name that is taken or a relative folder.
    """
    choice = parts.platform.config.control
    if choice == "off":
        return None
    automatic = choice == "auto"
    path = Path(choice)
    try:
        fd, path = control_path.listen_as(parts.name) if automatic else (control_path.listen_fd(path), path)
    except NameTaken as error:
        if not automatic:
            raise ConfigError(f"--control {path}: {error}") from None
        if parts.platform.config.name:
            raise ConfigError(f"--name {parts.name}: {error.reason}; choose another name") from None
        _go_without(parts, f"{error.reason}; --control names another path")
        return None
    except (OSError, FolderUnusable) as error:
        reason = (error.strerror if isinstance(error, OSError) else "") or str(error)
        no_file = exhausted(error) if isinstance(error, OSError) and error.errno in NO_FILE else None
        if automatic:
            _go_without(parts, no_file or f"{reason}; --control names another path")
            return None
        if no_file is not None:
            raise HostExhausted(f"--control {path}: {no_file}") from None
        raise ConfigError(f"--control {path}: {reason}; name a new file in a folder of yours") from None
    try:
        door = ControlDoor(parts, fd, path)
    except BaseException:
        unix_listener.remove(path, unix_listener.identity(path))
        os.close(fd)
        raise
    last.callback(door.tell_the_end)
    stack.callback(door.close)
    return door


def _go_without(parts: Parts, reason: str) -> None:
    parts.platform.observer.event(Warned("control", f"no control socket: {reason}"))
