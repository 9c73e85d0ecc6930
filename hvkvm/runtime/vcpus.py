"""All vCPU threads of a machine together: started, paused, resumed, stopped.

Callable from any thread but a vCPU's own, which could not wait for itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic

from hvkvm.errors import Stuck
from hvkvm.runtime.vcpu_thread import VcpuThread

PAUSE_SECONDS = 30.0
"""How long a pause waits before it says which vCPU does not come to rest."""


class Countdown:
    """Calls `done()` on the thread that reports the last of `count` things done. Any thread."""

    def __init__(self, count: int, done: Callable[[], object]) -> None:
        self._left = count
        self._done = done
        self._lock = threading.Lock()

    def one_done(self) -> None:
        """One of them is done."""
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            self._done()


class VcpuGroup:
    """`threads` in vp_index order. Every vCPU fd exists before any of them starts."""

    def __init__(self, threads: Sequence[VcpuThread]) -> None:
        self.threads = tuple(threads)

    def start_all(self) -> None:
        """Start every thread. HvkvmError at the first that was started or stopped before."""
        for thread in self.threads:
            thread.start()

    def pause_all(self, timeout: float = PAUSE_SECONDS) -> None:
        """Bring every vCPU to rest: outside KVM_RUN, its pending exit completed, its thread waiting.

        Pauses nest: each needs its `resume_all()`. Stuck after `timeout`
        seconds, naming the threads that did not come to rest; the pause is undone
        then. RuntimeError on a vCPU's own thread.
        """
        me = threading.current_thread().name
        if any(thread.is_current() for thread in self.threads):
            raise RuntimeError(f"{me} is a vCPU thread and cannot wait for itself to pause")
        for thread in self.threads:
            thread.request_pause()
        late: list[VcpuThread] = []
        try:
            end = monotonic() + timeout
            late += [thread for thread in self.threads if not thread.wait_paused(max(0.0, end - monotonic()))]
        except BaseException:
            self.resume_all()
            raise
        if late:
            stuck = _describe(late)
            self.resume_all()
            raise Stuck(f"no rest within {timeout:g} s: {stuck}")

    def request_pause(self, when_paused: Callable[[], object]) -> None:
        """Ask every vCPU to come to rest; `when_paused()` is called once, when the last of them has.

        Like `pause_all`, without the wait: on the thread of that vCPU, or right
        here. It needs its `resume_all()` too, which makes the call not come if it
        has not yet. RuntimeError on a vCPU's own thread.
        """
        left = Countdown(len(self.threads), when_paused)
        for thread in self.threads:
            thread.request_pause(left.one_done)

    def resume_all(self) -> None:
        """Undo one `pause_all()` or `request_pause()`."""
        for thread in self.threads:
            thread.resume()

    @contextmanager
    def paused(self, timeout: float = PAUSE_SECONDS) -> Iterator[None]:
        """`pause_all()` for the length of a with block."""
        self.pause_all(timeout)
        try:
            yield
        finally:
            self.resume_all()

    def stop_all(self, timeout: float) -> None:
        """Stop and join every thread, within `timeout` seconds in all.

        Stuck naming each thread that has not ended and what it is doing;
        it may still end later. Repeatable.
        """
        for thread in self.threads:
            thread.stop()
        end = monotonic() + timeout
        stuck = [thread for thread in self.threads if not thread.join(max(0.0, end - monotonic()))]
        if stuck:
            raise Stuck(f"not stopped within {timeout:g} s: {_describe(stuck)}")

    def describe(self) -> str:
        """What each thread is doing, one line each, for a dump."""
        return "\n".join(f"{thread.name}: {thread.state}" for thread in self.threads)


def _describe(threads: Sequence[VcpuThread]) -> str:
    return ", ".join(f"{thread.name} is {thread.state}" for thread in threads)
