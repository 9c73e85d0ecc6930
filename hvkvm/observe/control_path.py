"""Where control sockets lie, who may use them, and which belong to a VM that lives.

`hvkvm run` puts its socket into a folder that only its user can enter, under
$XDG_RUNTIME_DIR or /tmp; `hvkvm ctl` looks for VMs there. A lock on the folder
keeps two starting VMs from taking each other's socket for a dead one's.

Used by `machine.control_door` and the `ctl` verb, on the main thread.
"""

from __future__ import annotations

import _socket  # of `socket`, which takes milliseconds to import: every run would have them at its start
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING

from hvkvm.errors import ConfigError

if TYPE_CHECKING:
    from socket import socket

SUFFIX = ".sock"
MAX_PATH = 107
"""Bytes of a Unix socket's path, the NUL not counted."""

BACKLOG = 16
LOCK_SECONDS = 3.0
"""Whoever starts or looks holds the lock for less than a millisecond."""


class FolderUnusable(ConfigError):
    """No folder for control sockets can be had; the text says why."""


class NameTaken(ConfigError):
    """Another VM listens at this path."""


def folders() -> list[Path]:
    """Where sockets may lie, the preferred first; they need not exist. $HVKVM_CONTROL_DIR is the only one."""
    if (only := os.environ.get("HVKVM_CONTROL_DIR", "")).startswith("/"):
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


def make_folder() -> Path:
    """The first folder that can be had, made if need be. FolderUnusable names the reason for each."""
    reasons = []
    for folder in folders():
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror}")
            continue
        if not (reason := why_not(folder)):
            return folder
        reasons.append(f"{folder}: {reason}")
    raise FolderUnusable("; ".join(reasons))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone in `folder`. OSError, also when another process keeps its lock, stopped in there say."""
    from fcntl import LOCK_EX, LOCK_NB, flock

    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        end = monotonic() + LOCK_SECONDS
        while True:
            try:
                flock(fd, LOCK_EX | LOCK_NB)
                break
            except BlockingIOError:
                if monotonic() > end:
                    raise OSError(errno.EBUSY, f"another process keeps {folder} locked") from None
                sleep(LOCK_SECONDS / 100)
        yield
    finally:
        os.close(fd)


def _dead(path: Path) -> bool:
    """Whether `path` is a socket that nobody listens at. OSError if it is not there."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    probe = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        probe.setblocking(False)
        return probe.connect_ex(str(path)) == errno.ECONNREFUSED
    finally:
        probe.close()


def listen(path: Path) -> socket:
    """`listen_fd` as a socket object."""
    from socket import socket

    return socket(fileno=listen_fd(path))


def listen_fd(path: Path) -> int:
    """A socket that listens at `path`, mode 0600, non-blocking; a dead VM's socket there is replaced.

    NameTaken, or OSError for a path that cannot be bound.
    """
    if len(os.fsencode(path)) > MAX_PATH:
        raise OSError(errno.ENAMETOOLONG, f"longer than the {MAX_PATH} bytes of a socket's path")
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        with _locked(path.parent):
            try:
                listener.bind(str(path))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                if not _dead(path):
                    raise NameTaken(f"{path} is another VM's, or no socket") from None
                path.unlink()
                listener.bind(str(path))
            # Nobody can connect before listen(), so nobody finds it with another mode.
            os.chmod(path, 0o600)
            listener.listen(BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener.detach()


def sockets() -> list[Path]:
    """The sockets of this user's VMs, by name; those of dead processes are removed on the way."""
    found: dict[str, Path] = {}
    for folder in folders():
        if why_not(folder):
            continue
        try:
            with _locked(folder):
                listed = _scan(folder, remove=True)
        except OSError:
            listed = _scan(folder, remove=False)  # without the lock a socket may only seem dead
        for path in listed:
            found.setdefault(path.stem, path)
    return [path for _name, path in sorted(found.items())]


def _scan(folder: Path, *, remove: bool) -> list[Path]:
    alive = []
    for path in folder.iterdir():
        try:
            if path.suffix != SUFFIX or not path.is_socket():
                continue
            if not _dead(path):
                alive.append(path)
            elif remove:
                path.unlink()
        except FileNotFoundError:
            continue
    return alive


def identity(path: Path) -> tuple[int, int] | None:
    """What tells our socket's file from a successor's, while our socket is open; None when there is none.

    Once it is closed, the file system may give its number to the successor.
    """
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def remove(path: Path, owned: tuple[int, int] | None) -> None:
    """Unlink our socket's file before closing it, unless another lies there by now. Raises nothing."""
    try:
        with _locked(path.parent):
            if owned is not None and identity(path) == owned:
                path.unlink()
    except OSError:
        return
