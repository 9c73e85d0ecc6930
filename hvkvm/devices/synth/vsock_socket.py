"""The Unix sockets of a vsock: the one that it listens on, and those it connects to.

Why: names of "hybrid vsock" as other monitors have them. A host program
connects to PATH and says which port of the guest it wants; what the guest
connects to at port P is the host's socket PATH_P.

Owner: `vsock.Vsock`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path

from hvkvm.abi.hvsock import MAX_LISTEN_PORT
from hvkvm.errors import ConfigError

MAX_PATH_BYTES = 107
"""sun_path, less its final 0."""
_LONGEST_PORT = len(f"_{MAX_LISTEN_PORT}")

BACKLOG = 128


class ListeningSocket:
    """A listening Unix socket at `path`, which `close` removes again. ConfigError naming --vsock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._name = os.fsencode(path)
        if len(self._name) + _LONGEST_PORT > MAX_PATH_BYTES:
            most = MAX_PATH_BYTES - _LONGEST_PORT
            raise self._error(
                f"longer than the {most} bytes that leave room for _PORT", "choose a shorter path"
            )
        self._remove_stale()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self.socket.bind(self._name)
            self.socket.listen(BACKLOG)
        except OSError as error:
            self.socket.close()
            raise self._error(error.strerror or str(error), "name a socket that you may create") from None
        self._identity = self._stat()

    def _error(self, reason: str, remedy: str) -> ConfigError:
        return ConfigError(f"--vsock {self.path}: {reason}; {remedy}")

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            found = os.lstat(self._name)
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_mode

    def _remove_stale(self) -> None:
        parent = self.path.parent
        if not parent.is_dir():
            raise self._error(f"no folder {parent}", "create it, or name another")
        found = self._stat()
        if found is None:
            return
        if not stat.S_ISSOCK(found[2]):
            raise self._error("exists and is no socket", "remove it, or name another")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            try:
                probe.connect(self._name)
            except ConnectionRefusedError:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._name)
                return
            except FileNotFoundError:
                return
            except OSError:
                pass  # somebody is there, or what it is cannot be told
        raise self._error("another program listens there", "end it, or name another")

    def close(self) -> None:
        """Stop listening and remove the socket, if it is still ours. Idempotent."""
        self.socket.close()
        identity, self._identity = self._identity, None
        if identity is not None and identity == self._stat():
            with contextlib.suppress(OSError):
                os.unlink(self._name)


def connect(path: Path, port: int) -> socket.socket | None:
    """A non-blocking connection to PATH_`port`; None if nobody listens there.

    BlockingIOError while its queue is full, OSError when no socket can be had.
    """
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        found.connect(os.fsencode(path) + b"_%d" % port)
    except BlockingIOError:
        found.close()
        raise
    except OSError:
        found.close()
        return None
    return found
