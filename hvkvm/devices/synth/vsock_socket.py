"""The Unix sockets of a vsock: the one that it listens on, and those it connects to.

Why: names of "hybrid vsock" as other monitors have them. A host program
connects to PATH and says which port of the guest it wants; what the guest
connects to at port P is the host's socket PATH_P.

Owner: `vsock.Vsock`.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from hvkvm import given_file
from hvkvm.abi.hvsock import MAX_LISTEN_PORT
from hvkvm.errors import NO_FILE, ConfigError, HostExhausted, NameTaken, exhausted
from hvkvm.runtime.unix_listener import MAX_PATH, identity, listen_fd, remove

_LONGEST_PORT = len(f"_{MAX_LISTEN_PORT}")

BACKLOG = 128


class ListeningSocket:
    """A listening Unix socket at `path`, removed by `close`. ConfigError, HostExhausted naming --vsock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if len(os.fsencode(path)) + _LONGEST_PORT > MAX_PATH:
            most = MAX_PATH - _LONGEST_PORT
            raise self._error(
                f"longer than the {most} bytes that leave room for _PORT; choose a shorter path"
            )
        if why := given_file.why_no_folder(path.parent):
            raise self._error(why)
        try:
            self.socket = socket.socket(fileno=listen_fd(path, BACKLOG))
        except NameTaken as error:
            raise self._error(str(error)) from None
        except OSError as error:
            if error.errno in NO_FILE:
                raise HostExhausted(f"--vsock {path}: {exhausted(error)}") from None
            why = error.strerror or str(error)
            raise self._error(f"{why}; name a socket that you may create") from None
        self._owned = identity(path)

    def _error(self, why: str) -> ConfigError:
        return ConfigError(f"--vsock {self.path}: {why}")

    def close(self) -> None:
        """Remove the socket, if it is still ours, and stop listening. Idempotent."""
        owned, self._owned = self._owned, None
        if owned is not None:
            remove(self.path, owned)
        self.socket.close()


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
