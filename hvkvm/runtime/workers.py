"""Worker threads: they make the calls that may block, so that the I/O loop need not.

A worker touches what its job hands it, nothing else. What a job gave comes back to the I/O loop as
`done(item, outcome)`, one wake-up for as many as have finished by then.

The promise: a `submit()` that returns means that `done` is called once for that item. On the loop, with
what the job returned or the exception it raised; with Stopped if the job was taken back or the workers
closed before it began; by the thread that calls `close()` if the loop has ended by then.

Threads are few and shared. A queue has at most `width` of them at once, so that one disk that hangs leaves
workers to the others; a thread that finds nothing for `idle_seconds` ends.

Threads: any thread may call anything here.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any

from hvkvm.errors import Stopped, Stuck
from hvkvm.runtime.kick import block_signals
from hvkvm.runtime.protocols import Deferrer
from hvkvm.runtime.worker_queue import WorkerQueue
from hvkvm.tuples import NamedTuple

LIMIT = 16
IDLE_SECONDS = 5.0
CLOSE_SECONDS = 10.0

_tuple = tuple.__new__
"""Makes a NamedTuple in a third of the time that calling its class takes."""

BURST = 8
"""So many jobs of one queue a worker runs before it looks whether another queue waits."""

NARROW_BURST = 32
"""As BURST, where the queue is narrow: its jobs are quick."""


class Running(NamedTuple):
    """A job that a worker is in: of which queue, what it works on, since when (time.monotonic)."""

    queue: str
    item: object
    since: float


class Workers:
    """At most `limit` threads. `close()` before the I/O loop `io` is stopped, or completions wait for it."""

    def __init__(
        self, io: Deferrer, *, limit: int = LIMIT, idle_seconds: float = IDLE_SECONDS, name: str = "worker"
    ) -> None:
        if limit < 1:
            raise ValueError(f"{limit} workers: at least one is needed")
        self.name = name
        self.limit = limit
        self._io = io
        self._idle_seconds = idle_seconds
        self._ready: SimpleQueue[WorkerQueue | None] = SimpleQueue()
        self._lock = threading.Lock()
        # Threads that wait for work or are about to, less the queues that wait for a thread.
        self._surplus = 0
        self._threads: dict[threading.Thread, Running | None] = {}
        self._leaving: list[threading.Thread] = []  # no longer among those, and not ended yet
        self._queues: list[WorkerQueue] = []
        self._made = 0
        self.closed = False
        """Whether it takes no more jobs."""
        self._finished: deque[tuple[Callable[[Any, Any], object], Any, Any]] = deque()
        self._scheduled = False

    def queue(self, width: int, name: str) -> WorkerQueue:
        """A FIFO of jobs that at most `width` workers serve at once. Stopped after `close()`."""
        queue = WorkerQueue(self, width, name)
        with self._lock:
            if self.closed:
                raise Stopped(f"{self.name}: no more queues")
            self._queues.append(queue)
        return queue

    @property
    def threads(self) -> int:
        """How many threads there are just now."""
        return len(self._threads)

    def running(self) -> list[Running]:
        """What the workers are in just now, oldest first."""
        with self._lock:
            return sorted((one for one in self._threads.values() if one), key=lambda one: one.since)

    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        """Take no more jobs, give those not begun back with Stopped, wait for those that run. Repeatable.

        Stuck, naming the jobs, if some have not ended in `timeout` seconds: their threads are
        daemons, so that the process can end. What they give comes if the loop still runs then.
        """
        with self._lock:
            self.closed = True
            threads = [*self._threads, *self._leaving]
            queues = list(self._queues)
            for _ in self._threads:
                self._ready.put(None)
        for queue in queues:
            queue.take_back()
        until = monotonic() + timeout
        for thread in threads:
            thread.join(max(0.0, until - monotonic()))
        running = self.running()
        if not self._schedule():
            self._deliver()
        if running:
            names = ", ".join(f"{one.queue} ({monotonic() - one.since:.0f} s)" for one in running)
            raise Stuck(f"{self.name}: {len(running)} jobs have not ended within {timeout:g} s: {names}")

    # Used by WorkerQueue and the threads.

    def offer(self, queue: WorkerQueue) -> None:
        """A worker is wanted for `queue`; a thread is made if none is free."""
        with self._lock:
            if self._surplus <= 0 and len(self._threads) < self.limit and not self.closed:
                self._made += 1
                thread = threading.Thread(target=self._main, name=f"{self.name}-{self._made}", daemon=True)
                self._threads[thread] = None
                self._surplus += 1
                try:
                    thread.start()
                except RuntimeError:  # no thread to be had; those there are must do, and one there must be
                    del self._threads[thread]
                    self._surplus -= 1
                    if not self._threads:
                        raise
            self._surplus -= 1
            self._ready.put(queue)

    def _main(self) -> None:
        block_signals()
        me = threading.current_thread()
        while True:
            try:
                queue = self._ready.get(timeout=self._idle_seconds)
            except Empty:
                with self._lock:
                    if self._surplus <= 0:
                        continue  # a queue is on its way to this thread
                    self._surplus -= 1
                    self._leave(me)
                    return
            if queue is None:
                with self._lock:
                    self._leave(me)
                return
            self._serve(queue, me)
            with self._lock:
                self._surplus += 1

    def _leave(self, me: threading.Thread) -> None:
        del self._threads[me]
        self._leaving = [thread for thread in self._leaving if thread.is_alive()]
        self._leaving.append(me)  # `close()` waits for its end, too

    def _serve(self, queue: WorkerQueue, me: threading.Thread) -> None:
        threads, finished = self._threads, self._finished
        ended = 0.0
        for _ in range(NARROW_BURST if queue.narrow else BURST):
            job = queue.take()
            if job is None:
                break
            work, item, done, long = job
            if long and finished and not self._scheduled:
                self._schedule()
            began = monotonic()
            threads[me] = _tuple(Running, (queue.name, item, began))
            try:
                outcome: object = work(item)
            except BaseException as error:
                outcome = error
            threads[me] = None
            finished.append((done, item, outcome))
            now = monotonic()
            if ended:
                queue.took(now - began, began - ended)
            ended = now
            if not queue.narrow and not self._scheduled:
                self._schedule()
        else:
            with self._lock:
                self._surplus -= 1
                self._ready.put(queue)
        # Put first, then look whether somebody will come for it: `_deliver` clears the mark before it looks.
        if finished and not self._scheduled:
            self._schedule()

    def finish(self, done: Callable[[Any, Any], object], item: object, outcome: object) -> None:
        """Have `done(item, outcome)` called on the loop."""
        self._finished.append((done, item, outcome))
        if not self._scheduled:
            self._schedule()

    def _schedule(self) -> bool:
        """Have the loop deliver; False if it has ended, and `close()` must."""
        self._scheduled = True
        try:
            self._io.call_soon(self._deliver, cancelled=self._deliver)
        except Stopped:
            self._scheduled = False
            return False
        return True

    def deliver_now(self) -> None:
        """On the loop: deliver what a worker has finished and keeps for the end of its burst."""
        if self._finished and not self._scheduled:
            self._deliver()

    def _deliver(self) -> None:
        self._scheduled = False
        finished = self._finished
        try:
            for _ in range(len(finished)):
                try:
                    done, item, outcome = finished.popleft()
                except IndexError:
                    break
                done(item, outcome)
        finally:
            if finished and not self._scheduled:
                self._schedule()
