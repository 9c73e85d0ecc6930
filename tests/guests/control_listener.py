"""A control socket that a test serves itself."""

from __future__ import annotations

import socket
from pathlib import Path

from hvkvm.observe import control_path


def listen(path: Path) -> socket.socket:
    """`control_path.listen_fd` as a socket object."""
    return socket.socket(fileno=control_path.listen_fd(path))
