"""Where control sockets lie, who may use them, and which belong to a VM that lives.

`hvkvm run` puts its socket into a folder that only its user can enter, under
$XDG_RUNTIME_DIR or /tmp; `hvkvm ctl` looks for VMs there. How a name is taken
and given back is `runtime.unix_listener`.

Used by `machine.control_door` and the `ctl` verb, on the main thread.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from hvkvm.errors import NO_FILE, ConfigError, FolderUnusable, NameTaken
from hvkvm.runtime import unix_listener
from hvkvm.runtime.unix_listener import dead, locked

SUFFIX = ".sock"
BACKLOG = 16


def folders() -> list[Path]:
    """Where sockets may lie, the preferred first; they need not exist. $HVKVM_CONTROL_DIR is the only one.

    ConfigError where that is relative: `hvkvm ctl` in another folder would look for the VM elsewhere.
    """
    if only := os.environ.get("HVKVM_CONTROL_DIR", ""):
        if not only.startswith("/"):
            raise ConfigError(f"HVKVM_CONTROL_DIR={only}: not an absolute path; write one that begins with /")
        return [Path(only)]
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    found = [Path(runtime, "hvkvm")] if runtime.startswith("/") else []
    return [*found, Path(f"/tmp/hvkvm-{os.geteuid()}")]


def why_not(folder: Path) -> str:
    """Why `folder` cannot be trusted with a socket: not ours, open to others, no folder. Empty: it can."""
    try:
        found = os.lstat(folder)
    except OSError as error:
        return error.strerror or str(error)
    if not stat.S_ISDIR(found.st_mode):
        return "not a folder"
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid}"
    if found.st_mode & 0o077:
        return f"open to others (mode {stat.S_IMODE(found.st_mode):o}); chmod 700 it"
    return ""


def make_folder(among: Sequence[Path] = ()) -> Path:
    """The first folder of `among`, else of all, that can be had, made if need be.

    FolderUnusable names the reason for each.
    """
    reasons = []
    for folder in among or folders():
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror}")
            continue
        if not (reason := why_not(folder)):
            return folder
        reasons.append(f"{folder}: {reason}")
    raise FolderUnusable("; ".join(reasons))


def listen_fd(path: Path) -> int:
    """A socket that listens at `path`, mode 0600. Raises as `unix_listener.listen_fd`."""
    return unix_listener.listen_fd(path, BACKLOG, 0o600)


def listen_as(name: str) -> tuple[int, Path]:
    """A socket as of `listen_fd` for the VM `name`, and its path: in the first folder that takes one.

    FolderUnusable names the reason for each that does not. NameTaken, and OSError where this host has
    no more files: another folder would not help.
    """
    reasons = []
    for folder in folders():
        path = folder / f"{name}{SUFFIX}"
        try:
            make_folder([folder])
            return listen_fd(path), path
        except NameTaken as error:
            raise NameTaken(f"{path}: {error.reason}", "choose another name") from None
        except FolderUnusable as error:
            reasons.append(str(error))
        except OSError as error:
            if error.errno in NO_FILE:
                raise
            reasons.append(f"{path}: {error.strerror or error}")
    raise FolderUnusable("; ".join(reasons))


def sockets() -> list[Path]:
    """The sockets of this user's VMs, by name; those of dead processes are removed on the way."""
    found: dict[str, Path] = {}
    for folder in folders():
        if why_not(folder):
            continue
        try:
            with locked(folder):
                listed = _scan(folder, remove=True)
        except OSError:
            listed = _scan(folder, remove=False)  # without the lock a socket may only seem dead
        for path in listed:
            found.setdefault(path.stem, path)
    return [path for _name, path in sorted(found.items())]


def _scan(folder: Path, *, remove: bool) -> list[Path]:
    alive = []
    try:
        listed = list(folder.iterdir())
    except OSError:  # one without its user's own permissions, say
        return []
    for path in listed:
        try:
            if path.suffix != SUFFIX or not path.is_socket():
                continue
            if not dead(path):
                alive.append(path)
            elif remove:
                path.unlink()
        except OSError:
            continue
    return alive
