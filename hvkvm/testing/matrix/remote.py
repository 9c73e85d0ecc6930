"""Runs a matrix's cases on the workers of a Dask cluster, which somebody else has started.

Dask chooses the worker of a case, and runs it again elsewhere when that worker is lost. Files
go to a worker the first time that it lacks them, by the hash of their content. Owner: one
thread; what Dask runs besides is its own.
"""

from __future__ import annotations

import logging
import re
import tempfile
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from time import monotonic
from types import TracebackType
from typing import Any

import hvkvm
from hvkvm.errors import ConfigError, HvkvmError
from hvkvm.testing.matrix import worker
from hvkvm.testing.matrix.cases import ENDED, ERROR, Case, Result
from hvkvm.testing.matrix.parcels import Parcel, Sender

CONNECT_SECONDS = 10.0
TURN_SECONDS = 0.5
ALONE_SECONDS = 10.0
"""How long there may be no worker before that is said."""
MAX_SENDS = 50
"""How often a case may find a worker without its files."""
_GONE = "the scheduler is gone"
_DASKS = re.compile(r"(distributed|tornado)(\.|$)")

Told = Callable[[Case, Result], None]
Say = Callable[[str], object]


class _Group:
    """The warm guest of several cases."""

    def __init__(self) -> None:
        self.waiting: list[Case] = []
        self.digest = ""


class RemoteRun:
    """As `local.LocalRun`, on the cluster whose scheduler is at `address`. ConfigError, HvkvmError.

    `say` gets a line for people when there is no worker.
    """

    def __init__(self, cases: Sequence[Case], told: Told, address: str, say: Say) -> None:
        self._told = told
        self._say = say
        self._key = uuid.uuid4().hex
        self._client = connect(address)
        self._folder = tempfile.TemporaryDirectory(prefix="hvkvm-matrix-")
        self._futures: dict[str, tuple[Any, Case | int]] = {}
        self._sends: dict[Case | int, int] = {}
        self._packed: dict[int, Case] = {}
        self._groups: dict[int, _Group] = {}
        self._boots: dict[int, Any] = {}
        self._left: dict[int, Case] = {case.number: case for case in cases}
        self._alone_since: float | None = None
        self._done: SimpleQueue[Any] = SimpleQueue()
        """Futures that are done, from a thread of Dask's."""
        try:
            self._check_workers()
            self._sender = Sender(Path(self._folder.name))
            for case in cases:
                self._packed[case.number] = case._replace(config=self._sender.packed(case.config))
            for case in cases:
                self._begin(case)
        except BaseException:
            self._close()
            raise

    def _check_workers(self) -> None:
        """All have this hvkvm. HvkvmError."""
        remedy = f"install hvkvm {hvkvm.__version__} there"
        for name, found in self._client.run(worker.about, on_error="return").items():
            if isinstance(found, BaseException):
                raise HvkvmError(f"--dask: the worker {name} cannot run hvkvm: {found}; {remedy}")
            if found[0] != hvkvm.__version__:
                raise HvkvmError(f"--dask: the worker {name} has hvkvm {found[0]}; {remedy}")

    def _begin(self, case: Case) -> None:
        if not case.group:
            self._submit(case, "")
            return
        group = self._groups.get(case.group)
        if group is None:
            group = self._groups[case.group] = _Group()
            config = self._packed[case.number].config
            self._boots[case.group] = config._replace(command=(), command_io="console", awaits=True, files=())
            self._submit_boot(case.group)
        group.waiting.append(case)

    def _submit_boot(self, group: int) -> None:
        self._note(self._client.submit(worker.boot, self._key, self._boots[group], pure=False), group)

    def _submit(self, case: Case, warm: str) -> None:
        packed = self._packed[case.number]
        self._note(self._client.submit(worker.run_case, self._key, packed, warm, pure=False), case)

    def _note(self, future: Any, what: Case | int) -> None:
        self._futures[future.key] = (future, what)
        future.add_done_callback(self._done.put)

    def turn(self) -> bool:
        """Wait a little for what ends, and go on with it; whether anything is left to do."""
        if not self._left:
            return False
        if self._client.status != "running":  # seen before, or behind, what that does to the futures
            for case in list(self._left.values()):
                self._lost(case, _GONE)
            return False
        self._look_for_workers()
        with suppress(Empty):
            self._take(self._done.get(timeout=TURN_SECONDS))
            while True:
                self._take(self._done.get_nowait())
        return bool(self._left)

    def _look_for_workers(self) -> None:
        if self._client.nthreads():
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = monotonic()
        elif self._alone_since and monotonic() > self._alone_since + ALONE_SECONDS:
            self._alone_since = 0.0  # said once
            self._say("hvkvm: --dask: there is no worker; start one by `dask worker ADDRESS --nthreads 1`")

    def _take(self, future: Any) -> None:
        _future, what = self._futures.pop(future.key, (None, None))
        if what is None:
            return
        status = future.status
        if status in ("pending", "lost"):  # its worker was lost with the answer: Dask runs it once more
            self._note(future, what)
            return
        if status != "finished":
            if status == "error":
                error = future.exception()
                self._lost(what, f"no worker could run it: {type(error).__name__}: {error}")
            else:
                self._lost(what, _GONE)
            return
        answer = future.result()
        if isinstance(answer, worker.Missing):
            self._sends[what] = self._sends.get(what, 0) + 1
            if self._sends[what] > MAX_SENDS:
                self._lost(what, "no worker keeps its files")
                return
            self._send(answer.digests)
            self._again(what)
        elif isinstance(answer, worker.Booted):
            assert isinstance(what, int)
            self._booted(what, answer)
        else:
            assert isinstance(what, Case)
            self._tell(what, answer)

    def _again(self, what: Case | int) -> None:
        if isinstance(what, int):
            self._submit_boot(what)
        else:
            group = self._groups.get(what.group)
            self._submit(what, "" if group is None else group.digest)

    def _lost(self, what: Case | int, why: str) -> None:
        if isinstance(what, int):
            self._booted(what, worker.Booted("", 0, why))
        else:
            self._tell(what, Result(ERROR, why.partition("\n")[0]))

    def _tell(self, case: Case, result: Result) -> None:
        if self._left.pop(case.number, None) is not None:
            self._told(case, result)

    def _booted(self, number: int, answer: worker.Booted) -> None:
        """Fetch a warm guest, so that every worker can have it; cases boot by themselves if there is none."""
        group = self._groups[number]
        if answer.digest and self._fetch(answer):
            group.digest = answer.digest
        cases, group.waiting = group.waiting, []
        for case in cases:
            self._submit(case, group.digest)

    def _fetch(self, answer: worker.Booted) -> bool:
        for name in self._workers():
            if self._run_on(name, worker.missing, [answer.digest]) == []:
                break
        else:
            return False  # that worker is lost
        path = Path(self._folder.name) / answer.digest
        with path.open("wb") as file:
            while file.tell() < answer.size:
                data = self._run_on(name, worker.chunk, answer.digest, file.tell())
                if not data:
                    path.unlink()
                    return False
                file.write(data)
        self._sender.parcels[answer.digest] = Parcel(answer.digest, path, answer.size)
        return True

    def _send(self, digests: list[str]) -> None:
        """Bring parcels to every worker that has them not; who is lost meanwhile needs none."""
        for name in self._workers():
            lacking = self._run_on(name, worker.missing, digests) or []
            for digest in lacking:
                sent = 0
                size = self._sender.parcels[digest].size
                for data in self._sender.chunks(digest) if size else [b""]:
                    sent += len(data)
                    self._run_on(name, worker.receive, digest, self._key, data, sent >= size)

    def _workers(self) -> list[str]:
        return list(self._client.nthreads())

    def _run_on(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """The call's result on a worker; None where that worker is lost or cannot."""
        try:
            found = self._client.run(call, *arguments, workers=[name], on_error="ignore")
        except (OSError, ValueError):
            return None
        return found.get(name)

    def close(self) -> None:
        """End what runs, on all workers, and tell it. Idempotent."""
        if self._left:
            with suppress(OSError, ValueError, TimeoutError):
                for future, _what in self._futures.values():
                    future.cancel()
                self._client.run(worker.end, self._key, on_error="ignore")
        for case in list(self._left.values()):
            self._tell(case, Result(ENDED, "ended before its end"))
        self._close()

    def _close(self) -> None:
        self._client.close(timeout=CONNECT_SECONDS)
        self._folder.cleanup()

    def __enter__(self) -> RemoteRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def connect(address: str) -> Any:
    """A client of the scheduler at `address`. ConfigError, HvkvmError."""
    try:
        from distributed import Client as _Client
    except ImportError:
        raise ConfigError("--dask: needs Dask's distributed; install it: pip install 'hvkvm[dask]'") from None
    client: Any = _Client
    # What matters of it is said by us, in a line each.
    for name in ("distributed", *filter(_DASKS.match, logging.root.manager.loggerDict)):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        return client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        remedy = "start one by `dask scheduler`, or check the address"
        raise HvkvmError(f"--dask {address}: no scheduler answers: {reason}; {remedy}") from None
