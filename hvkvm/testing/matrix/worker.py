"""What a worker of a Dask cluster does for a matrix: keeps parcels, runs cases, boots warm guests.

The functions are called by name on workers, which have this hvkvm installed. Their
guests are processes of the worker and end with it.
"""

from __future__ import annotations

import selectors
import socket
import tempfile
import threading
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import hvkvm
from hvkvm.machine.config import MachineConfig
from hvkvm.testing.matrix.cases import ERROR, Case, Result
from hvkvm.testing.matrix.local import copy_of
from hvkvm.testing.matrix.parcels import CHUNK_BYTES, Store, digest_of, names_of
from hvkvm.testing.matrix.process import GuestProcess

TURN_SECONDS = 0.5

_lock = threading.Lock()
_ended: set[str] = set()
"""Keys of matrices whose cases shall end."""


class Missing(NamedTuple):
    """A worker cannot begin: it has not these parcels."""

    digests: list[str]


class Booted(NamedTuple):
    """A warm guest is in the worker's store as `digest`, of `size` bytes; or why not."""

    digest: str
    size: int
    why: str = ""


def about() -> tuple[str, str]:
    """This worker's hvkvm, and its host."""
    return hvkvm.__version__, socket.gethostname()


def missing(digests: list[str]) -> list[str]:
    """Those parcels that this worker has not."""
    return Store().missing(digests)


def receive(digest: str, key: str, data: bytes, last: bool) -> None:
    """Take a part of a parcel."""
    Store().receive(digest, key, data, last)


def chunk(digest: str, offset: int) -> bytes:
    """A part of a parcel that this worker has."""
    with Store().path(digest).open("rb") as file:
        file.seek(offset)
        return file.read(CHUNK_BYTES)


def end(key: str) -> None:
    """End the cases of the matrix `key`, now and from now on."""
    with _lock:
        _ended.add(key)


def run_case(key: str, case: Case, warm: str) -> Missing | Result:
    """Run a packed case, in a copy of the warm guest of parcel `warm` if that is not empty."""
    store = Store()
    needed = names_of(case.config) + ([warm] if warm else [])
    if lacking := store.missing(needed):
        return Missing(lacking)
    config = store.unpacked(case.config)
    with tempfile.TemporaryDirectory(prefix="hvkvm-matrix-") as folder:
        if warm:
            copy = copy_of(config, store.path(warm))
            result = _run(key, copy, Path(folder)).result(case, warm=True)
            if result.verdict != ERROR:
                return _here(result)
        return _here(_run(key, config, Path(folder)).result(case, warm=False))


def boot(key: str, config: MachineConfig) -> Missing | Booted:
    """Boot the guest of a packed configuration, and keep it warm as a parcel of this worker."""
    store = Store()
    if lacking := store.missing(names_of(config)):
        return Missing(lacking)
    store.path("0" * 64).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="warm-", dir=store.path("0" * 64).parent) as folder:
        made = Path(folder) / "warm.state"
        process = _run(key, store.unpacked(config), Path(folder), made)
        errors = process.text("err")
        if process.close() != 0:
            return Booted("", 0, errors.strip().rpartition("\n")[2])
        digest, size = digest_of(made), made.stat().st_size
        made.replace(store.path(digest))
        return Booted(digest, size)


def _here(result: Result) -> Result:
    import distributed

    own: Any = distributed.get_worker
    return result._replace(where=str(own().address))


def _run(key: str, config: MachineConfig, folder: Path, output: Path | None = None) -> GuestProcess:
    """A process that has closed its streams, in time or ended by us."""
    process = GuestProcess(config, folder, output)
    with selectors.DefaultSelector() as selector:
        for fd in process.fds:
            selector.register(fd, selectors.EVENT_READ)
        while process.fds:
            for ready, _events in selector.select(TURN_SECONDS):
                process.read(ready.fd)
                if ready.fd not in process.fds:
                    selector.unregister(ready.fd)
            process.check(monotonic())
            with _lock:
                if key in _ended:
                    process.end()
                    break
    return process
