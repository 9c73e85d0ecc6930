"""Runs a matrix's cases on this host: as many side by side as its memory and processors bear.

One thread starts every process, reads all their streams and ends them. Cases that share
a warm guest wait for its boot, and boot by themselves where it comes to nothing. A host that has
no files, memory or processes for one more is asked again when one has ended.
"""

from __future__ import annotations

import errno
import os
import selectors
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from types import TracebackType

from hvkvm.errors import HostExhausted, exhausted
from hvkvm.machine.config import MachineConfig
from hvkvm.testing.matrix.cases import ENDED, ERROR, Case, Result
from hvkvm.testing.matrix.process import GuestProcess

OVERHEAD = 64 << 20
"""Bytes that a guest's process takes beside the guest's RAM."""
SHARE = 0.8
"""Of the memory that is free."""
TURN_SECONDS = 0.5

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})

Told = Callable[[Case, Result], None]


class _Group:
    """Cases of one machine: the warm guest that they are copies of, once it is there."""

    def __init__(self, path: Path, left: int) -> None:
        self.path = path
        self.left = left
        self.booting = False
        self.usable: bool | None = None
        """None: nobody has tried yet."""


class _Job:
    """A process that runs: a case's, or the boot of a warm guest."""

    def __init__(self, process: GuestProcess, folder: Path, config: MachineConfig) -> None:
        self.process = process
        self.folder = folder
        self.cpus = config.cpus
        self.memory = config.memory + OVERHEAD
        self.case: Case | None = None
        self.group: _Group | None = None


class LocalRun:
    """Runs `cases`, and tells `told` what became of each. A context manager: its end ends all of them.

    `jobs` is the most that run side by side; None: as many as there are processors for their vCPUs.
    Memory bounds both. Owner: one thread, the same from first to last. HostExhausted, of it and of `turn`.
    """

    def __init__(self, cases: Sequence[Case], told: Told, jobs: int | None = None) -> None:
        self._told = told
        self._jobs = jobs
        self._waiting = deque(cases)
        self._running: list[_Job] = []
        self._numbers = 0
        self._refused = False
        """The host had nothing for one more, and none has ended since."""
        self._cores = len(os.sched_getaffinity(0))
        try:
            self._memory = int(free_memory() * SHARE)
            self._selector = selectors.DefaultSelector()
            self._folder = Path(tempfile.mkdtemp(prefix="hvkvm-matrix-"))
        except OSError as error:
            raise HostExhausted(f"no guest can be started: {lacking(error)}") from error
        self._groups: dict[int, _Group] = {}
        for case in cases:
            if case.group:
                path = self._folder / f"warm-{case.group}.state"
                self._groups.setdefault(case.group, _Group(path, 0)).left += 1

    def turn(self) -> bool:
        """Start what there is room for, and see to what runs; whether anything is left to do."""
        while self._start_one():
            pass
        for key, _events in self._selector.select(TURN_SECONDS if self._running else 0):
            job: _Job = key.data
            job.process.read(key.fd)
            if key.fd not in job.process.fds:
                self._selector.unregister(key.fd)
        now = monotonic()
        for job in list(self._running):
            job.process.check(now)
            if not job.process.fds:
                self._finish(job)
        return bool(self._running or self._waiting)

    def _start_one(self) -> bool:
        if self._refused:
            return False
        for index, case in enumerate(self._waiting):
            group = self._groups.get(case.group)
            if group is not None and group.booting:
                continue
            if not self._has_room(case.config):
                return False  # in the file's order, so that nobody waits for ever
            if group is not None and group.usable is None:
                boot = case.config._replace(command=(), command_io="console", awaits=True, files=())
                group.booting = self._begin(boot, group.path, None, group)
                return group.booting
            config = case.config
            if group is not None and group.usable:
                config = copy_of(config, group.path)
            if not self._begin(config, None, case, group):
                return False
            del self._waiting[index]
            return True
        return False

    def _has_room(self, config: MachineConfig) -> bool:
        if not self._running:
            return True  # alone it may have all there is
        if sum(job.memory for job in self._running) + config.memory + OVERHEAD > self._memory:
            return False
        if self._jobs is not None:
            return len(self._running) < self._jobs
        return sum(job.cpus for job in self._running) + config.cpus <= self._cores

    def _begin(
        self, config: MachineConfig, output: Path | None, case: Case | None, group: _Group | None
    ) -> bool:
        """Start a process; False where the host may do so when another has ended. HostExhausted."""
        self._numbers += 1
        folder = self._folder / str(self._numbers)
        try:
            folder.mkdir()
            job = _Job(GuestProcess(config, folder, output), folder, config)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            if not self._running:  # else those that run well run on, whatever it is
                raise HostExhausted(f"no guest can be started: {lacking(error)}") from error
            self._refused = True
            return False
        job.case, job.group = case, group
        self._running.append(job)
        for fd in job.process.fds:
            self._selector.register(fd, selectors.EVENT_READ, job)
        return True

    def _finish(self, job: _Job) -> None:
        self._running.remove(job)
        self._refused = False
        for key in list(self._selector.get_map().values()):
            if key.data is job:
                self._selector.unregister(key.fd)
        try:
            if job.case is None:
                assert job.group is not None
                job.group.usable = job.process.close() == 0
                job.group.booting = False
            else:
                self._conclude(job, job.case)
        finally:
            shutil.rmtree(job.folder, ignore_errors=True)

    def _conclude(self, job: _Job, case: Case) -> None:
        group = job.group
        warm = group is not None and bool(group.usable)
        result = job.process.result(case, warm=warm)
        if group is not None:
            if warm and result.verdict == ERROR:
                group.usable = False  # the copy came to no run: boot it, and the others too
                self._waiting.appendleft(case)
                return
            group.left -= 1
            if not group.left:
                group.path.unlink(missing_ok=True)
        self._told(case, result)

    def close(self) -> None:
        """End what runs, tell it, and remove all that was made. Idempotent."""
        jobs, self._running = self._running, []
        for job in jobs:
            job.process.tell_to_end()
        for job in jobs:
            job.process.end()
            job.process.close()
            if job.case is not None:
                self._told(job.case, Result(ENDED, "ended before its end"))
        while self._waiting:
            self._told(self._waiting.popleft(), Result(ENDED, "did not begin"))
        self._selector.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> LocalRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def copy_of(config: MachineConfig, path: Path) -> MachineConfig:
    """The run of `config`'s command in a copy of the warm guest in `path`."""
    own = ("command", "command_io", "files", "control", "name", "timeout", "kvm_path", "signal_path")
    fields = {key: getattr(config, key) for key in own}
    return MachineConfig(kernel=path, warm=path, **fields)


def lacking(error: OSError) -> str:
    """What a host has no more of, or else does not allow, for the processes of a matrix; and the remedy."""
    if error.errno in _NO_SPACE:
        return f"{tempfile.gettempdir()}: {error.strerror}; make room there, or name another folder by TMPDIR"
    return exhausted(error) or f"{error}; mend that, and start the matrix again"


def free_memory() -> int:
    """Bytes that this process may still take: of the host, or of its control group."""
    with open("/proc/meminfo") as lines:
        found = next(
            (int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 1 << 30
        )
    try:
        own = Path("/proc/self/cgroup").read_text().splitlines()[-1].rpartition(":")[2]
        group = Path("/sys/fs/cgroup") / own.lstrip("/")
        most = (group / "memory.max").read_text().strip()
        if most != "max":
            found = min(found, int(most) - int((group / "memory.current").read_text()))
    except (OSError, ValueError, IndexError):
        pass  # no control group of version 2 that bounds it
    return max(found, 0)
