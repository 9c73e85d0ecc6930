"""NBD servers of other people for tests: qemu-nbd and nbdkit."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

import pytest
from disk_asker import SECONDS


def answers(path: Path) -> bool:
    """Whether an NBD server greets at a socket; or a file of another kind is there.

    One that had only accepted once refused the connection right after (seen once, on a busy host).
    """
    if not path.is_socket():
        return path.exists()
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(SECONDS)
        return probe.connect_ex(str(path)) == 0 and probe.recv(8) == b"NBDMAGIC"


@contextmanager
def serving(command: list[str], path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server on the Unix socket `path`, there when this begins."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    path.unlink(missing_ok=True)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as child:
        try:
            end = monotonic() + SECONDS
            while not answers(path):
                assert child.poll() is None, "the server ended"
                assert monotonic() < end
                sleep(0.01)
            yield child
        finally:
            child.kill()


def qemu_nbd(file: Path, path: Path, *more: str, form: str = "raw") -> list[str]:
    return ["qemu-nbd", "-t", "-e", "4", "-f", form, "-k", str(path), "--discard=unmap", *more, str(file)]
