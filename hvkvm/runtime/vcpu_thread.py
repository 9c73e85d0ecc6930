"""A vCPU's thread: enter the guest, handle the exit, do what others asked for, again.

The thread owns its vCPU's fd, its kvm_run page and whatever belongs to that VP
(the SynIC pages above all, S25). Others `submit()`.

Why no wake-up is lost, and when no kick is needed. The GIL puts all of the
steps below into one total order. Without one (free-threaded Python) a full fence
does that on each side, between the store and the load behind it: s1 has it in
the queue's lock, v1 by `fence`.

    submitter                        vCPU thread
    s1 append the item               v1 phase = ENTERED
    s2 read phase                    v2 look at the queue; not empty: clear
    s3 if ENTERED: kick                 immediate_exit, drain, back to v1
       (immediate_exit = 1, signal)  v3 KVM_RUN
                                     v4 phase = the exit's reason

If s2 reads anything but ENTERED, it comes before some v1 that is yet to come,
so s1 < s2 < v1 < v2: the item is seen there, and no kick is needed. If s2 reads
ENTERED, the kick is sent. Either it lands before the clearing in a v2, and then
the drain that follows the clearing sees the item, which is older than the kick;
or no clearing follows it before v3, and KVM_RUN ends at once or by the signal,
after which v2 comes again. A kick that comes too late costs one KVM_RUN that
returns at once. A pause or a stop is a flag that v2 reads together with the
queue, so the same holds for them. The thread's own submissions find phase at
an exit's reason, so they kick nobody.

Threads: `start()` belongs to the owner of the machine; everything else may be
called from any thread, unless it says otherwise.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from time import clock_gettime_ns, pthread_getcpuclockid
from typing import Any, TypeVar

from hvkvm.abi.kvm import KVM_EXIT_INTR
from hvkvm.errors import HvkvmError, UnhandledExit
from hvkvm.kvm.vcpu import Vcpu
from hvkvm.memory.atomics import FREE_THREADED, fence
from hvkvm.runtime.call import Call
from hvkvm.runtime.guard import fault_text
from hvkvm.runtime.kick import Kicker
from hvkvm.runtime.thread_start import start_thread
from hvkvm.runtime.workqueue import Cancelled, WorkQueue

# What the thread is doing; a number from 0 is the exit reason it is handling.
_NEW, _ENTERED, _DRAINING, _PARKED, _ENDED = -1, -2, -3, -4, -5

T = TypeVar("T")

LAST_EXITS = 16
"""How many exit reasons are remembered for a state dump."""

Handler = Callable[[Vcpu], object]


class VcpuThread:
    """Runs `vcpu`. `handlers` maps KVM_EXIT_* to what handles it, on this thread; it is read at `start()`.

    A handler must not block. What a handler, a submitted call or KVM raises goes
    to `on_fault(thread, error)`, on this thread, and ends the thread; so does an
    exit without a handler (UnhandledExit).
    """

    def __init__(
        self,
        vcpu: Vcpu,
        handlers: Mapping[int, Handler],
        *,
        on_fault: Callable[[VcpuThread, BaseException], None],
        name: str | None = None,
    ) -> None:
        self.vcpu = vcpu
        self.name = name if name is not None else f"vcpu{vcpu.index}"
        self.fault: BaseException | None = None
        """What ended the thread, if it did not end by `stop()`."""
        self.exit_counts: dict[int, int] = defaultdict(int)
        """Exits so far by reason; KVM_EXIT_INTR counts kicks and other interruptions."""
        self._last_exits: deque[int] = deque(maxlen=LAST_EXITS)
        self._handlers = handlers
        self._on_fault = on_fault
        self._queue = WorkQueue(self.name)
        self._kicker = Kicker()
        self._phase = _NEW
        self._attention = False  # a pause or a stop is wanted: read at v2
        self._stopping = False
        self._quiesced = False
        self._pausers: list[int] = []  # thread idents, one entry for each pause() not yet resumed
        self._when_paused: list[Callable[[], object]] = []
        # Guards the five above, save the loop's own peeks. Reentrant: signal handlers stop machines.
        self._changed = threading.Condition(threading.RLock())
        self._thread = threading.Thread(target=self._main, name=self.name, daemon=True)

    def start(self) -> None:
        """Start running the guest. HvkvmError if it was started or stopped before; HostExhausted."""
        with self._changed:
            if self._phase != _NEW:
                raise HvkvmError(f"{self.name} cannot start: it is {self.state}")
            self._phase = _DRAINING
        try:
            start_thread(self._thread)
        except BaseException:
            self.stop()
            if self._thread.ident is None:
                self._end()
            # else it runs, and only the wait for that was interrupted, by Ctrl-C: its end is its own
            raise

    def stop(self) -> None:
        """Ask the thread to end, soon. What is queued runs or is reported cancelled. Repeatable."""
        with self._changed:
            never_ran = self._phase == _NEW
            if never_ran:
                self._phase = _ENDED
            self._stopping = self._attention = True
            self._changed.notify_all()
        if never_ran:
            self._queue.close()
        elif self._phase == _ENTERED:
            self._kicker.kick()

    def join(self, timeout: float | None = None) -> bool:
        """Wait up to `timeout` seconds for the end; whether it has ended (or never began)."""
        if self._thread.ident is None:
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def submit(self, fn: Callable[..., object], *args: Any, cancelled: Cancelled | None = None) -> None:
        """Run `fn(*args)` on this thread, outside KVM_RUN, soon (S25). Stopped when it takes no more.

        FIFO; run once, or reported by `cancelled()` once (S31). The last exit may
        not be completed then: registers mean something only under a pause. A
        paused vCPU's queue waits for the resume. The guest runs when the queue is
        empty: work that submits itself again keeps it out, though no pause or stop.
        """
        self._queue.submit(fn, *args, cancelled=cancelled)
        if self._phase == _ENTERED:
            self._kicker.kick()

    def call(self, fn: Callable[..., T], *args: Any, timeout: float | None = None) -> T:
        """Run `fn(*args)` on this thread and give back its result or raise what it raised.

        On the thread itself, and on one that has this vCPU paused (and so owns
        its state), it runs right here. Raises Stopped when cancelled,
        TimeoutError after `timeout` seconds (see `Call.wait`).
        """
        if self.is_current() or (self._quiesced and threading.get_ident() in self._pausers):
            return fn(*args)
        call = Call(fn, args)
        self.submit(call.run, cancelled=call.cancel)
        return call.wait(timeout)

    def cpu_time_ns(self) -> int:
        """CPU time that this thread has taken so far; 0 when it does not run. Not while it may end."""
        ident = self._thread.ident
        if ident is None or not self._thread.is_alive():
            return 0
        return clock_gettime_ns(pthread_getcpuclockid(ident))

    def is_current(self) -> bool:
        """Whether the caller runs on this thread."""
        return threading.current_thread() is self._thread

    def request_pause(self, when_paused: Callable[[], object] | None = None) -> None:
        """Ask the thread to leave the guest and wait; pauses nest. RuntimeError on the thread itself.

        `when_paused()` is called once, when the vCPU is quiescent (see `wait_paused`):
        on its thread, or right here if it is already. A resume that comes first
        forgets it.
        """
        if self.is_current():
            raise RuntimeError(f"{self.name} cannot pause itself")
        with self._changed:
            self._pausers.append(threading.get_ident())
            self._attention = True
            if when_paused is not None and not self._at_rest():
                self._when_paused.append(when_paused)
                when_paused = None
        if when_paused is not None:
            when_paused()
        if self._phase == _ENTERED:
            self._kicker.kick()

    def wait_paused(self, timeout: float | None = None) -> bool:
        """Wait until the vCPU is quiescent: outside KVM_RUN, its last exit completed, its thread waiting.

        From then until the resume the pauser owns the vCPU. False after
        `timeout` seconds. A thread that has not started or has ended is quiescent.
        """
        with self._changed:
            return self._changed.wait_for(self._at_rest, timeout)

    @property
    def quiescent(self) -> bool:
        """Whether it is at rest (see `wait_paused`) until a resume. Any thread."""
        return self._quiesced

    def _at_rest(self) -> bool:
        return self._quiesced or self._phase in (_NEW, _ENDED)

    def _tell_paused(self) -> None:
        """On this thread, at rest. Not under the lock: who is told may take locks of its own."""
        with self._changed:
            waiting, self._when_paused = self._when_paused, []
        for when_paused in waiting:
            when_paused()

    def resume(self) -> None:
        """Undo one `request_pause()`: one of the caller's, if it made any. RuntimeError if there is none."""
        with self._changed:
            if not self._pausers:
                raise RuntimeError(f"{self.name} is not paused")
            me = threading.get_ident()
            self._pausers.remove(me if me in self._pausers else self._pausers[-1])
            if not self._pausers:
                self._attention = self._stopping
                self._when_paused.clear()
                self._changed.notify_all()

    @property
    def last_exits(self) -> tuple[int, ...]:
        """The last few exit reasons, oldest first."""
        return tuple(self._last_exits)

    @property
    def state(self) -> str:
        """What the thread is doing, for a dump."""
        phase = self._phase
        if phase >= 0:
            from hvkvm.kvm.exit_names import exit_name

            return f"handling {exit_name(phase)}"
        if phase == _DRAINING:
            running = self._queue.running
            name = "its queue" if running is None else getattr(running, "__qualname__", repr(running))
            return f"draining {name}"
        if phase == _ENDED:
            return "ended" if self.fault is None else f"ended by {fault_text(self.fault)}"
        return {_NEW: "not started", _ENTERED: "running guest", _PARKED: "waiting paused"}[phase]

    def _main(self) -> None:
        try:
            self._kicker.bind(self.vcpu.run)
            self._loop()
        except BaseException as error:
            self._report(error)
        finally:
            self._kicker.unbind()
            self._end()

    def _end(self) -> None:
        """Nothing runs here any more, and nobody waits for it. The thread, or who could not start it."""
        with self._changed:
            self._phase = _ENDED
            self._changed.notify_all()
        self._tell_paused()
        try:
            self._queue.close()
        except Exception as error:
            self._report(error)

    def _report(self, error: BaseException) -> None:
        self.fault = error
        self._on_fault(self, error)

    def _loop(self) -> None:
        vcpu, enter, items = self.vcpu, self.vcpu.enter, self._queue.items
        counts, remember = self.exit_counts, self._last_exits.append
        table = dict(self._handlers)
        run = vcpu.run
        while True:
            self._phase = _ENTERED
            if FREE_THREADED:
                fence()
            if items or self._attention:
                if not self._attend(table):
                    return
                continue
            reason = enter()
            self._phase = reason
            counts[reason] += 1
            remember(reason)
            if reason == KVM_EXIT_INTR:
                run.immediate_exit = 0
                continue
            try:
                handler = table[reason]
            except KeyError:
                raise self._unhandled(reason) from None
            handler(vcpu)

    def _attend(self, table: Mapping[int, Handler]) -> bool:
        """What v2 found: run the queue, wait while paused. False when it is time to end."""
        self._phase = _DRAINING
        self.vcpu.run.immediate_exit = 0
        self._queue.drain()
        if self._pausers and not self._stopping:
            self._complete_exits(table)
            with self._changed:
                self._phase = _PARKED
                self._quiesced = True
                self._changed.notify_all()
            self._tell_paused()
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or not self._pausers)
                self._quiesced = False
                self._phase = _DRAINING
        return not self._stopping

    def _complete_exits(self, table: Mapping[int, Handler]) -> None:
        """Let KVM finish the last exit, running no guest code, so that the vCPU's state is whole.

        KVM applies what a handler answered (IN, MMIO or RDMSR data, a hypercall
        result) when KVM_RUN begins; with immediate_exit it does that and returns
        EINTR. An access in several parts comes back with its next part instead,
        and that is handled like any exit.
        """
        if not self._last_exits:
            return  # never entered
        vcpu = self.vcpu
        reason = self._last_exits[-1]
        while reason != KVM_EXIT_INTR and not self._stopping:
            vcpu.run.immediate_exit = 1
            self._phase = _DRAINING
            reason = self._phase = vcpu.enter()
            self.exit_counts[reason] += 1
            self._last_exits.append(reason)
            if reason != KVM_EXIT_INTR:
                handler = table.get(reason)
                if handler is None:
                    raise self._unhandled(reason)
                handler(vcpu)
        vcpu.run.immediate_exit = 0

    def _unhandled(self, reason: int) -> UnhandledExit:
        from hvkvm.kvm.exits import decode

        return UnhandledExit(self.vcpu.index, reason, str(decode(self.vcpu.run)))
