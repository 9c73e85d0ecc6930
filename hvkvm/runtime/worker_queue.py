"""Jobs that wait for worker threads (`runtime.workers`), and how many of these are worth their while.

Several threads help only where jobs wait for the host. Where they mostly hold the GIL (the page cache
answers), each further thread costs switches and gains nothing: such a queue is *narrow*, one worker takes
all that `submit_all` brings, and what it has finished is delivered together. Which of both it is follows
from how long its jobs take beside what handing them out takes, so that it holds on a slow host, too.

Threads: any thread may call anything here.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from hvkvm.errors import Stopped
from hvkvm.tuples import NamedTuple

_WAITS = 8.0
"""A job that takes so many times as long as what is between two jobs waits for the host."""

_tuple = tuple.__new__
"""Makes a NamedTuple in a third of the time that calling its class takes."""

_SURE = 8
"""So many jobs in a row make a queue narrow, at most so many make it wide again."""


class Job(NamedTuple):
    """`done(item, work(item))`, with the exception in its place if it raised one."""

    work: Callable[[Any], object]
    item: Any
    done: Callable[[Any, Any], object]
    long: bool
    """Whether it may take long, so that nobody should wait for it."""


class Crew(Protocol):
    """What a queue needs of `workers.Workers`."""

    @property
    def closed(self) -> bool: ...
    def offer(self, queue: WorkerQueue) -> None: ...
    def finish(self, done: Callable[[Any, Any], object], item: object, outcome: object) -> None: ...
    def deliver_now(self) -> None: ...


class WorkerQueue:
    """Jobs of one owner, begun in the order of their submission; from `Workers.queue`."""

    def __init__(self, workers: Crew, width: int, name: str) -> None:
        if width < 1:
            raise ValueError(f"a width of {width}: at least one worker is needed")
        self.name = name
        self.width = width
        self.narrow = False
        """Whether its jobs are quick, so that one worker does them sooner than several."""
        self._workers = workers
        self._waiting: deque[Job] = deque()
        self._serving = 0
        self._quick = 0
        self._begun = self._seen = 0
        self._lock = threading.Lock()

    def submit(self, work: Callable[[Any], object], item: object, done: Callable[[Any, Any], object]) -> None:
        """Run `work(item)` on a worker, then `done(item, outcome)` on the loop. It may take long.

        Stopped after `close()`, and when the host has no thread to give and there is none yet.
        """
        self._submit([Job(work, item, done, True)], 1)

    def submit_all(
        self, work: Callable[[Any], object], items: Sequence[object], done: Callable[[Any, Any], object]
    ) -> None:
        """As `submit`, for each of `items`: of all or, with Stopped, of none."""
        jobs = [_tuple(Job, (work, item, done, False)) for item in items]
        self._submit(jobs, 0 if self.narrow and self._serving else 1 if self.narrow else len(jobs))

    def _submit(self, jobs: list[Job], workers: int) -> None:
        with self._lock:
            if self._workers.closed:
                raise Stopped(f"{self.name} takes no more work")
            self._waiting.extend(jobs)
            if not self._serving and not workers:
                workers = 1
            workers = min(workers, self.width - self._serving)
            self._serving += workers
        for left in range(workers, 0, -1):
            try:
                self._workers.offer(self)
            except RuntimeError as error:
                with self._lock:
                    self._serving -= left
                    if self._serving:
                        return  # the host has no more threads; those there are do it
                    try:
                        for job in jobs:
                            self._waiting.remove(job)  # there is no thread that could have taken it
                    except ValueError:
                        return  # the workers closed meanwhile, and have answered them all
                raise Stopped(f"{self.name}: {error}") from None

    def look(self) -> bool:
        """Deliver what is finished; whether workers are at it still. On the loop, some ms after `submit_all`.

        A narrow queue's worker may have met a job that hangs: if none was begun since the last look, another
        worker comes, up to the width.
        """
        self._workers.deliver_now()
        if self._waiting and self._begun == self._seen:
            self._more(1)
        self._seen = self._begun
        return self._serving > 0

    def take_back(self) -> int:
        """Give what has not begun back, each with Stopped; how many."""
        jobs = []
        # Under the lock: who has seen that the workers are not closed has put its jobs there, too.
        with self._lock, suppress(IndexError):
            while True:
                jobs.append(self._waiting.popleft())
        for job in jobs:
            self._workers.finish(job.done, job.item, Stopped(f"{self.name} stops"))
        return len(jobs)

    def __len__(self) -> int:
        """How many jobs wait for a worker."""
        return len(self._waiting)

    def _more(self, workers: int) -> None:
        """Have so many more workers, if there may be; no matter if there are none to be had."""
        with suppress(Stopped):
            self._submit([], workers)

    # For the workers.

    def take(self) -> Job | None:
        """The next job; None if there is none, and then the worker serves this queue no more."""
        try:
            job = self._waiting.popleft()
        except IndexError:
            with self._lock:  # who submits meanwhile finds either this worker or the room that it leaves
                if not self._waiting:
                    self._serving -= 1
                    return None
            return self.take()
        self._begun += 1  # a count that is only compared: threads may lose one
        return job

    def took(self, seconds: float, between: float) -> None:
        """Learn from a job, and what passed before it; several threads may, and none need be exact."""
        if self.width == 1:
            return
        if seconds <= _WAITS * between:
            self._quick = min(self._quick + 1, _SURE)
            if self._quick == _SURE:
                self.narrow = True
        elif self._quick:
            self._quick = max(self._quick - 2, 0)
            if not self._quick and self.narrow:
                self.narrow = False
                self._more(len(self._waiting))
