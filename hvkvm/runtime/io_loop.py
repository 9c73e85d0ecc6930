"""The I/O loop: one thread that waits for eventfds and timers and runs what others deferred.

It owns eventfds, acks, completions and channel state; its callbacks must not
block. One round runs, in this order: the readers that poll found ready, the
calls that were queued when their turn began, the timers that were due when
theirs began; at most MAX_EVENTS, MAX_CALLS and MAX_TIMERS of them. What is left
waits for the next round, in the order in which it came.

Fairness. Whatever a guest or a peer does, nobody waits for longer than a few
rounds, and a round is short (the aim: 20 ms for all that wait at once). For
that, a callback is a *turn* of bounded work, stated by who has the callback in
packets, bytes or messages, and chosen to cost about a millisecond at most. What
a turn leaves undone is asked for with `call_soon`, and so comes behind all who
wait already. One source (a channel, a message stream, all sockets of a
service, all alarms) has one such request pending at a time and no other turn
meanwhile: a doorbell that rings then adds nothing. A device with many
connections shares its turn among them in rotation.

Removing is synchronous: when `Handle.remove()` or `Timer.cancel()` returns, the
callback is not running and never will again, so its owner may free what it uses
(S39, S19). From the loop itself they return at once, since a callback cannot
wait for itself. Do not call them while holding a lock that the callback takes.

A wake-up is not lost, for the reason told in `vcpu_thread`: whoever queues
something does so before it looks whether the loop polls, and the loop says that
it polls before it looks at what is queued.

Nor is one lost for want of reading. An eventfd watched `edge`-triggered is never
read: every write to it, by whomever, puts it on epoll's list anew, also while
epoll hands out the last one, and its counter, once it is not 0, says readable
for ever (it holds 2**64 - 2 writes). That saves a system call an event, and the
loop's own wake-ups are taken in the same way.

Threads: any thread may call anything here. The loop belongs to the process that
made it: a forked child shares epoll's list with it, and so leaves that alone.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any

from hvkvm.errors import Stopped, Stuck
from hvkvm.memory.atomics import FREE_THREADED, fence
from hvkvm.runtime.kick import block_signals
from hvkvm.runtime.thread_start import start_thread
from hvkvm.runtime.timers import MAX_WAIT, Timer, TimerHeap
from hvkvm.runtime.workqueue import Cancelled, WorkQueue

MAX_EVENTS = 64
"""Ready fds taken a round; the rest wait for the next one. epoll hands them out in rotation."""

MAX_CALLS = 64
"""Deferred calls run a round."""

MAX_TIMERS = 16
"""Timers run a round."""

STOP_SECONDS = 10.0

OnFault = Callable[[BaseException], object]


class Handle:
    """One watched fd, from `IoLoop.add_reader`."""

    __slots__ = ("_loop", "active", "callback", "events", "fd", "since")

    def __init__(self, loop: IoLoop, fd: int, callback: Callable[[], object], events: int) -> None:
        self._loop = loop
        self.fd = fd
        self.callback = callback
        self.events = events
        self.active = True
        self.since = loop.rounds
        """Whose poll had begun, and perhaps not come back, when this was made."""

    def remove(self) -> None:
        """Watch no more; synchronous (S39). Before closing the fd. Repeatable."""
        self.active = False
        self._loop._unwatch(self)
        self._loop._wait_until_not_running(self)


class IoLoop:
    """`on_fault(error)` hears what a callback raises, on the loop's thread; the loop goes on.

    Without it, errors go where Python sends those of any thread.
    """

    def __init__(self, *, on_fault: OnFault | None = None, name: str = "io") -> None:
        self.name = name
        self.on_fault: OnFault = on_fault if on_fault is not None else _to_excepthook
        self._queue = WorkQueue(name)
        self._timers = TimerHeap()
        self._waiting_timers = self._timers.entries
        self._handles: dict[int, Handle] = {}
        self._epoll = select.epoll()
        try:
            self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except BaseException:
            self._epoll.close()
            raise
        try:
            self._epoll.register(self._wake_fd, select.EPOLLIN | select.EPOLLET)
        except BaseException:
            self._epoll.close()
            os.close(self._wake_fd)
            raise
        self.rounds = 0
        """How many have begun. The loop's thread counts."""
        self._pid = os.getpid()
        self._polling = False
        self._stopping = False
        self._closed = False
        self._current: Handle | Timer | None = None
        self._lock = threading.RLock()  # handles, closing
        self._removers = 0
        self._ran = threading.Condition()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread. Once; RuntimeError else. HostExhausted; then the loop can only be stopped."""
        start_thread(self._thread)

    def stop(self, timeout: float = STOP_SECONDS) -> None:
        """End the loop and wait for it; what is queued is reported cancelled, timers are dropped. Repeatable.

        From the loop itself it only asks, in a forked child not even that. Stuck,
        naming what runs, if the loop has not ended in `timeout` seconds.
        """
        if self._is_copy:
            return
        self._stopping = True
        if self._thread.ident is None:
            self._close()
            return
        self._wake()
        if not self.in_loop():
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise Stuck(f"{self.name} not stopped within {timeout:g} s: it is {self.state}")

    def in_loop(self) -> bool:
        """Whether the caller runs on the loop's thread."""
        return threading.current_thread() is self._thread

    def add_reader(self, fd: int, callback: Callable[[], object], *, edge: bool = False) -> Handle:
        """Call `callback()` on the loop while `fd` is readable, hung up or in error.

        With `edge`, for eventfds: call it after every write, several of which may
        come as one call, and once if it is readable already; nobody reads it.
        ValueError if the fd is watched already, Stopped as in `call_later`.
        """
        with self._lock:
            if self._refuses:
                raise Stopped(f"{self.name} watches no more fds")
            if fd in self._handles:
                raise ValueError(f"fd {fd} is watched already")
            # Known first, then watched: a ready fd wakes the loop at once, and an edge comes only once.
            events = select.EPOLLIN | select.EPOLLET if edge else select.EPOLLIN
            handle = self._handles[fd] = Handle(self, fd, callback, events)
            try:
                self._epoll.register(fd, events)
            except BaseException:
                del self._handles[fd]
                raise
            return handle

    def call_soon(self, fn: Callable[..., object], *args: Any, cancelled: Cancelled | None = None) -> None:
        """Run `fn(*args)` on the loop in its next round: a bottom half. FIFO; Stopped after the loop ended.

        What was taken but cannot be run any more is reported by `cancelled()`.
        """
        self._queue.submit(fn, *args, cancelled=cancelled)
        if self._polling:
            self._wake()

    def call_later(self, seconds: float, fn: Callable[..., object], *args: Any) -> Timer:
        """Run `fn(*args)` on the loop once `seconds` have passed.

        Stopped after `stop()`, but not for what the loop runs just then, which cannot know of it: what
        that asks for is dropped with what waits.
        """
        if self._refuses:
            raise Stopped(f"{self.name} takes no more timers")
        timer = Timer(monotonic() + seconds, fn, args, self._timer_cancelled)
        if self._timers.add(timer) and self._polling:
            self._wake()
        return timer

    @property
    def _refuses(self) -> bool:
        """Whether the caller is too late to ask for a timer or to have an fd watched."""
        return self._closed or (self._stopping and not self.in_loop())

    @property
    def _is_copy(self) -> bool:
        """Whether this is a forked child, where a lock that was held at the fork stays held for ever."""
        return os.getpid() != self._pid

    @property
    def state(self) -> str:
        """What the loop is doing, for a dump."""
        if self._thread.ident is None:
            return "not started"
        if self._closed:
            return "ended"
        running: Any = self._current
        running = self._queue.running if running is None else running.callback
        if running is not None:
            return f"running {_name_of(running)}"
        return "waiting" if self._polling else "between callbacks"

    # The loop's thread.

    def _main(self) -> None:
        block_signals()
        try:
            while not self._stopping:
                self._round()
        except BaseException as error:
            self.on_fault(error)
        finally:
            self._close()

    def _round(self) -> None:
        """The hot path of every event: what is empty is not even asked."""
        self._polling = True
        if FREE_THREADED:
            fence()
        if self._queue.items or self._stopping:
            timeout: float | None = 0.0
        else:
            timeout = self._seconds_to_wait() if self._waiting_timers else None
        self.rounds = number = self.rounds + 1
        events = self._epoll.poll(timeout, MAX_EVENTS)
        self._polling = False
        # Looked up before any callback runs: a callback may remove a handle and watch a new fd that got the
        # same number, and this round's event is not the new one's.
        handles = self._handles
        if len(events) == 1:
            ready: Sequence[Handle | None] = (handles.get(events[0][0]),)
        else:
            ready = [handles.get(fd) for fd, _mask in events]
        for handle in ready:
            if handle is None:
                continue  # the wake-up, or removed meanwhile
            # As in _run(), written out: a call less for each event.
            self._current = handle
            try:
                if handle.since == number:
                    self._ask_again(handle)
                elif handle.active:
                    handle.callback()
            except BaseException as error:
                self._fault(error, _name_of(handle.callback))
            finally:
                self._current = None
                if self._removers:
                    self._tell_removers()
        if self._queue.items:
            try:
                self._queue.drain(MAX_CALLS)
            except BaseException as error:
                self._fault(error, "a deferred call")
        first = self._waiting_timers[:1]  # one step, whoever adds or cancels meanwhile
        if first and first[0][0] <= monotonic():
            for timer in self._timers.take_due(monotonic(), MAX_TIMERS):
                self._run(timer)

    def _ask_again(self, handle: Handle) -> None:
        """Have the next poll tell of this handle, if it is ready.

        It was made while the poll was under way, so that its event may be that of
        an older one, removed by another thread, whose fd had the same number. If
        it is its own, and perhaps an edge, it must not be lost: epoll looks at the
        fd anew when it is told to watch it as it does.
        """
        with self._lock:
            if self._handles.get(handle.fd) is handle:
                with suppress(OSError):  # closed before it was removed
                    self._epoll.modify(handle.fd, handle.events)

    def _seconds_to_wait(self) -> float | None:
        due = self._timers.next_due()
        return None if due is None else min(MAX_WAIT, max(0.0, due - monotonic()))

    def _run(self, source: Timer) -> None:
        self._current = source
        try:
            source.run()
        except BaseException as error:
            self._fault(error, _name_of(source.callback))
        finally:
            self._current = None
            # A remover counts itself before it looks at _current: either it is seen here or it sees None.
            if self._removers:
                self._tell_removers()

    def _tell_removers(self) -> None:
        with self._ran:
            self._ran.notify_all()

    def _fault(self, error: BaseException, where: str) -> None:
        error.add_note(f"in {where}, on {self.name}")
        self.on_fault(error)

    def _close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._epoll.close()
            os.close(self._wake_fd)
            self._handles.clear()
        self._timers.clear()
        try:
            self._queue.close()
        except Exception as error:
            self._fault(error, "cancelling deferred calls")

    # Any thread.

    def _wake(self) -> None:
        with self._lock:  # or the fd's number could be another file's by now
            if not self._closed:
                os.eventfd_write(self._wake_fd, 1)

    def _unwatch(self, handle: Handle) -> None:
        if self._is_copy:
            return
        with self._lock:
            if self._handles.get(handle.fd) is not handle:
                return
            del self._handles[handle.fd]
            try:
                self._epoll.unregister(handle.fd)
            except OSError:
                return  # closed before it was removed: epoll has forgotten it by itself

    def _timer_cancelled(self, timer: Timer) -> None:
        if self._is_copy:
            return
        self._timers.discard(timer)
        self._wait_until_not_running(timer)

    def _wait_until_not_running(self, source: Handle | Timer) -> None:
        if self.in_loop() or self._is_copy:
            return
        with self._ran:
            self._removers += 1
            try:
                while self._current is source:
                    self._ran.wait()
            finally:
                self._removers -= 1


def _name_of(fn: Callable[..., object]) -> str:
    return getattr(fn, "__qualname__", None) or repr(fn)


def _to_excepthook(error: BaseException) -> None:
    threading.excepthook(
        threading.ExceptHookArgs((type(error), error, error.__traceback__, threading.current_thread()))
    )
