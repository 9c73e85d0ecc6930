"""The life of a machine: it runs, comes to rest and goes on, and ends once.

Whatever needs a machine at rest (a reset, saving it) takes one path on the I/O loop:

    RUNNING -> PAUSING   every vCPU leaves the guest, its pending exit completed
            -> STOPPING  the parts come to rest one after the other, and each says when
            -> AT_REST   what was asked for happens
            -> RUNNING   the parts start, last to first; the vCPUs go on

Nothing in it blocks the loop. An end of the run that comes meanwhile wins: the
parts then stay as they are, and the vCPUs' threads end instead of going on.

Threads: `finish`, `request_reset`, `panicked` and `wait` may be called from any
thread, also behind the end; `finish` from a signal handler too. `stop` may be called
from any but the machine's own. All else says its own.
"""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from enum import Enum
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING

from hvkvm.errors import BootError, HvkvmError, Stopped, Stuck, exhausted
from hvkvm.events import GuestPanicked, Warned
from hvkvm.kvm.irqfd import EventFd
from hvkvm.machine.outcome import (
    EXIT_MACHINE_FAULT,
    EXIT_PANIC,
    EXIT_TIMEOUT,
    Ending,
    Outcome,
    is_mistake,
    of_fault,
)
from hvkvm.machine.part import GuestConsole, Part
from hvkvm.machine.platform import Platform
from hvkvm.runtime.awake import overslept, wait_awake
from hvkvm.runtime.timers import MAX_WAIT

if TYPE_CHECKING:
    from hvkvm.runtime.timers import Timer

END_SECONDS = 60.0
"""How long disks may take at the end of a run: what lies in the host's page cache has to reach its disk."""

REST_SECONDS = 30.0
"""How long vCPUs and parts may take to come to rest before the one that does not is named."""


class Phase(Enum):
    """Where a machine is; the value is for people."""

    BUILT = "not started"
    RUNNING = "running"
    PAUSING = "waiting for its vCPUs to pause"
    STOPPING = "waiting for its parts to stop"
    AT_REST = "at rest"
    ENDED = "ended"


class Lifecycle:
    """Of one machine. `reboot` says whether a reset starts the guest anew or ends the run.

    `why_no_reset()`, on the I/O loop, says why it cannot this time, and so ends the run; mostly "".

    Until `govern` is called there are no parts; that comes once, before `start`.
    """

    def __init__(
        self, platform: Platform, *, reboot: bool, why_no_reset: Callable[[], str] = lambda: ""
    ) -> None:
        self.outcome: Outcome | None = None
        """How the run ended; None while it has not."""
        self.started_at: float | None = None
        """On the monotonic clock, in seconds."""
        self.resets = 0
        self.phase = Phase.BUILT
        self._platform = platform
        self._pid = os.getpid()
        self._reboot = reboot
        self._why_no_reset = why_no_reset
        # An eventfd, not a threading.Event: finish() is called by signal handlers, which may find the
        # main thread inside wait(), and an Event's lock would then be waited for by its own holder.
        self._ended = EventFd()
        self._lock = threading.RLock()  # outcome, _reset_pending, _panic, and that _ended is open
        self._stop_lock = threading.RLock()  # held by who stops it
        self._reset_pending = False
        self._panic = ""  # what the guest has told of its crash
        self._parts: tuple[Part, ...] = ()
        self._console: GuestConsole | None = None
        # The rest is the loop's own.
        self._waiting: deque[Callable[[Callable[[], object]], object]] = deque()
        self._patient = False
        self._deadline: Timer | None = None
        self.stopping: Part | None = None
        """The part that was asked to stop last. Any thread may look."""
        self._unheard: BaseException | None = None  # what `stop` raises
        self._enders: list[Callable[[Callable[[], object]], object]] = []

    @property
    def phase(self) -> Phase:
        """Where it is. Any thread."""
        return self._phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self._phase, self.phase_since = phase, monotonic()

    def at_end(self, ender: Callable[[Callable[[], object]], object]) -> None:
        """At the end of the run, with every vCPU's thread ended, call `ender(done)` before the parts stop.

        It has END_SECONDS to call `done()`. Before `start`.
        """
        self._enders.append(ender)

    def govern(self, parts: Sequence[Part], console: GuestConsole) -> None:
        """Take the machine's parts, in the order in which they stop and reset; they start in reverse.

        That order is: who uses something before what it uses (S7: devices before the SynIC).
        """
        self._parts = tuple(parts)
        self._console = console

    # The beginning and the end.

    def start(self) -> None:
        """Start the parts, the I/O loop and every vCPU. Once; HvkvmError else. Main thread."""
        if self.started_at is not None:
            raise HvkvmError("this machine was started already; build another one")
        self.started_at = monotonic()
        try:
            for part in reversed(self._parts):
                part.start()
            self.phase = Phase.RUNNING
            self._platform.io.start()
        except BaseException:
            self._platform.io.stop()  # else `stop` would wait for a loop that never ran
            raise
        try:
            self._platform.group.start_all()
        except HvkvmError:
            if self.outcome is None:  # else a vCPU that ran already has ended the machine
                raise

    @property
    def is_copy(self) -> bool:
        """Whether this is a forked child, without the threads: it shares what it may not touch.

        A lock that another thread held at the fork stays held there for ever.
        """
        return os.getpid() != self._pid

    @property
    def ended_fd(self) -> int:
        """Becomes readable when the run has ended, for callers that wait for more than that."""
        return self._ended.fd

    def wait(self, timeout: float | None = None) -> Outcome | None:
        """Wait up to `timeout` seconds (None: without limit) for the end; None if it has not come."""
        fd = self._ended.fd
        if fd < 0:
            return self.outcome  # closed
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        end = monotonic() + (float("inf") if timeout is None else timeout)
        while not poller.poll(min(MAX_WAIT, left := max(0.0, end - monotonic())) * 1000) and left > 0:
            pass
        return self.outcome

    def finish(self, ending: Ending, status: int, detail: str = "") -> None:
        """Name the end of the run, once; wakes `wait()`. Nothing in a forked child.

        A guest that has told of its crash has ended by that, whatever it or its host does next.
        """
        if self.is_copy:
            return
        with self._lock:
            if self.outcome is None:
                if self._panic and ending is not Ending.PANIC:
                    ending, status, detail = Ending.PANIC, EXIT_PANIC, self._panic
                self.outcome = Outcome(ending, status, detail)
        for thread in self._platform.threads:
            thread.stop()
        with self._lock:
            if self._ended.fd >= 0:  # else it is closed, and nobody waits
                self._ended.signal()

    def failed(self, error: BaseException, detail: str) -> None:
        """End the run by a thread's error. `stop` raises the first that is a mistake in code. Any thread."""
        if self.outcome is None:
            if is_mistake(error):
                self._unheard = self._unheard or error
            self.finish(*of_fault(error, detail))
        elif not isinstance(error, Stopped) and exhausted(error) is None:
            self._unheard = self._unheard or error  # behind the end, which has its name already

    def take_error(self) -> BaseException | None:
        """The error that `stop` would raise, which is the caller's to tell then. Any thread."""
        if self.is_copy:
            return None  # its parent hears it
        with self._lock:
            error, self._unheard = self._unheard, None
        return error

    def expire(self, seconds: float | None) -> None:
        """End the run because its `seconds` are over; a guest that hangs in its panic has ended by that."""
        if self._console is not None and (panic := self._console.console_panic(hung=True)) is not None:
            self.finish(Ending.PANIC, EXIT_PANIC, panic)
        when = "in time" if seconds is None else f"after {seconds:g} s"
        self.finish(Ending.TIMEOUT, EXIT_TIMEOUT, f"the guest had not finished {when}")

    def stop(self, seconds: float) -> None:
        """End every vCPU's thread, stop the parts, end the I/O loop. Idempotent; who comes second waits.

        Raises Stuck, naming who has not come to rest within `seconds` a step; once, with all stopped, the
        first error of code that the threads ran; and as `check_thread` does.
        """
        self.check_thread("stop")
        if self.outcome is None:
            self.finish(Ending.QUIT, 0, "stopped by the host")
        if self.started_at is None or self.is_copy:
            return
        with self._stop_lock:
            self._platform.group.stop_all(seconds)
            self._stop_parts_from_outside(seconds)
            self.phase = Phase.ENDED
            self._platform.io.stop()
        if (error := self.take_error()) is not None:
            raise error

    def check_thread(self, what: str) -> None:
        """Raise RuntimeError on the I/O loop and on a vCPU's thread, for which `what` would wait."""
        if self._platform.io.in_loop() or any(thread.is_current() for thread in self._platform.threads):
            me = threading.current_thread().name
            raise RuntimeError(f"{what}() waits for the thread {me}; on it, finish() is what ends the run")

    def _stop_parts_from_outside(self, seconds: float) -> None:
        stopped = threading.Event()
        ended = threading.Event()
        try:
            self._platform.io.call_soon(self._end_all, iter(self._enders), ended.set)
            limit, what = (END_SECONDS, "disks have not been flushed and closed")
            if not self._enders:
                limit, what = (seconds, "I/O loop has not answered")
            if not wait_awake(ended.wait, limit):
                raise Stuck(f"the {what} within {limit:g} s: the loop is {self._platform.io.state}")
            self._platform.io.call_soon(self._stop_parts, iter(self._parts), stopped.set)
        except Stopped:
            return  # the loop has ended: nothing is in flight any more
        if not wait_awake(stopped.wait, seconds) and self.stopping is not None:
            raise Stuck(f"the {self.stopping.name} has not stopped within {seconds:g} s")

    def _end_all(self, left: Iterator[Callable[..., object]], done: Callable[[], object]) -> None:
        ender = next(left, None)
        if ender is None:
            done()
        else:
            ender(partial(self._soon, self._end_all, left, done))

    # What the guest asks for.

    def panicked(self, text: str) -> None:
        """The guest reported a crash; ends the run with its text."""
        with self._lock:
            self._panic = self._panic or text
        self._platform.observer.event(GuestPanicked(text))
        self._soon(self._end_of_panic, text)

    def _end_of_panic(self, text: str) -> None:
        """What the console says is for people; the crash registers come after it. I/O loop."""
        seen = None
        if self._console is not None:
            self._console.flush()
            seen = self._console.console_panic_report()
        self.finish(Ending.PANIC, EXIT_PANIC, f"{seen}; {text}" if seen else text)

    def _panic_before_reset(self) -> str | None:
        if self._console is None:
            return None
        self._console.flush()
        return self._console.console_panic()

    def request_reset(self, reason: str) -> None:
        """Reset the machine soon, or end the run if that is what a reset does here. Nothing in a child."""
        if self.is_copy:
            return
        with self._lock:
            if self._reset_pending or self.outcome is not None:
                return
            self._reset_pending = True
        self._platform.io.call_soon(self._reset, reason)

    @property
    def reset_pending(self) -> bool:
        """Whether a reset was asked for that has not been made. Any thread."""
        return self._reset_pending

    def _reset(self, reason: str) -> None:
        if (panic := self._panic_before_reset()) is not None:
            # A panicking kernel told to reboot would loop for ever; its panic is the end.
            self.finish(Ending.PANIC, EXIT_PANIC, panic)
        elif not self._reboot:
            self.finish(Ending.RESET, 0, reason)
        elif why := self._why_no_reset():
            why = f"{reason}; it is not started again: {why}"
            self._platform.observer.event(Warned("reset", why))  # its end alone is one like any other
            self.finish(Ending.RESET, 0, why)
        else:
            self.at_rest(self._reset_parts)

    def _reset_parts(self, go_on: Callable[[], object]) -> None:
        try:
            for part in self._parts:
                part.reset()
        except BootError as error:  # its kernel has gone, or was exchanged, since it was started
            self.finish(Ending.RESET, EXIT_MACHINE_FAULT, f"it is not started again: {error}")
            return
        with self._lock:  # who sees it counted may ask for the next one
            self._reset_pending = False
            self.resets += 1
        go_on()

    # The path to rest and back. I/O loop.

    def at_rest(self, work: Callable[[Callable[[], object]], object], *, patient: bool = False) -> None:
        """Run `work(go_on)` soon, while vCPUs and parts are at rest; not if the run ends first.

        The machine stays at rest until the work calls `go_on()`, on any thread, once. Who is not at rest in
        time ends the run, unless all that wait for that are `patient`.
        """
        self._waiting.append(work)
        self._patient = patient and (self._patient or self.phase is Phase.RUNNING)
        if self.phase is Phase.RUNNING:
            self._pause()

    def _pause(self) -> None:
        self.phase = Phase.PAUSING
        self._deadline = self._platform.io.call_later(REST_SECONDS, self._too_late)
        self._platform.group.request_pause(self._paused)

    def _paused(self) -> None:
        """Called on whichever thread saw the last vCPU come to rest."""
        self._soon(self._stop_all)

    def _stop_all(self) -> None:
        if self.outcome is None:
            self.phase = Phase.STOPPING
            self._stop_parts(iter(self._parts), self._rested)

    def _stop_parts(self, left: Iterator[Part], done: Callable[[], object]) -> None:
        part = self.stopping = next(left, None)
        if part is None:
            done()
        else:
            # By way of the loop's queue: many parts make no deep stack, and who else waits gets a turn.
            stopped = partial(self._soon, self._stop_parts, left, done)
            try:
                part.stop(stopped)
            except BaseException as error:
                if self.outcome is None:
                    raise  # which ends the run
                self._unheard = self._unheard or error
                stopped()

    def _rested(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        if self.outcome is not None:
            return  # its vCPUs' threads end; `stop` does the rest
        self.phase = Phase.AT_REST
        self._work()

    def _work(self) -> None:
        if self.outcome is not None:
            return
        if self._waiting:
            self._waiting.popleft()(partial(self._soon, self._work))
            return
        for part in reversed(self._parts):
            part.start()
        self.phase = Phase.RUNNING
        self._platform.group.resume_all()

    def _too_late(self) -> None:
        what = f"the {self.stopping.name}" if self.stopping is not None else self._platform.group.describe()
        detail = f"no rest within {REST_SECONDS:g} s: {self.phase.value}: {what}"
        asleep = self._deadline is not None and overslept(self._deadline.due)  # they had no time of it
        if asleep or self._patient:
            self._deadline = self._platform.io.call_later(REST_SECONDS, self._too_late)
            self._platform.observer.event(Warned("rest", f"{detail}; it is waited for"))
            return
        self.finish(Ending.STUCK, EXIT_MACHINE_FAULT, detail)

    def _soon(self, fn: Callable[..., object], *args: object) -> None:
        with suppress(Stopped):  # the loop has ended, and with it what was to follow
            self._platform.io.call_soon(fn, *args)

    def close(self) -> None:
        """Let the eventfd go. Nobody waits any more. Idempotent."""
        with self._lock:
            self._ended.close()
