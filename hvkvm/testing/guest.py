"""A guest under test: its machine, what its console said, and waiting for things without hanging.

`micro.MicroGuest` and `linux.LinuxGuest` are made of this. Owner: the test's
thread, for every method; what `call` runs is on the machine's I/O loop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, TypeVar

from hvkvm.errors import HvkvmError, Stopped
from hvkvm.runtime.guard import is_callers_module

if TYPE_CHECKING:
    from hvkvm.hyperv.partition import Partition
    from hvkvm.machine.bus import Bus
    from hvkvm.machine.config import MachineConfig
    from hvkvm.machine.machine import Machine
    from hvkvm.machine.outcome import Outcome
    from hvkvm.runtime.timers import Timer
    from hvkvm.testing.flight import FlightRecorder
    from hvkvm.vmbus.host import VmbusHost

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)

MAX_CONSOLE_BYTES = 16 << 20
"""What a guest prints beyond this is not kept."""


class GuestFailure(AssertionError):
    """A guest did not do what a test waits for: it ended first, or the time was over."""


class Guest:
    """A machine built from `config`, which has not started. HvkvmError's kinds when it cannot be built.

    `seconds` bounds every wait for it. `machine` is the whole machine, for what has
    no method here.
    """

    def __init__(self, config: MachineConfig, *, seconds: float) -> None:
        from hvkvm.machine.machine import Machine
        from hvkvm.testing.flight import FlightRecorder

        self.seconds = seconds
        self._output = bytearray()
        self.machine: Machine = Machine(config)
        self.flight: FlightRecorder | None = None
        """The last messages and packets of its VMBus; None without one."""
        if self.machine.bus is not None:
            self.flight = FlightRecorder()
            self.machine.bus.host.listen(self.flight)
        self.machine.board.attach_sink(self._take)

    def _take(self, data: bytes) -> None:
        if len(self._output) < MAX_CONSOLE_BYTES:
            self._output.extend(data)

    @property
    def console(self) -> str:
        """All that came from its serial console so far, with plain line ends."""
        return bytes(self._output).decode(errors="replace").replace("\r\n", "\n")

    @property
    def partition(self) -> Partition:
        """The SynIC component: routes to the guest, connections from it. HvkvmError without a SynIC."""
        if self.machine.partition is None:
            raise HvkvmError(f"this guest has no SynIC: --hv {self.machine.config.hv}")
        return self.machine.partition

    @property
    def bus(self) -> Bus:
        """Its VMBus. HvkvmError without one."""
        if self.machine.bus is None:
            raise HvkvmError('this guest has no VMBus; ask for it by vmbus="on"')
        return self.machine.bus

    @property
    def host(self) -> VmbusHost:
        """The host of its VMBus. HvkvmError without one."""
        return self.bus.host

    def later(self, seconds: float, fn: Callable[..., object], *args: Any) -> Timer:
        """Call `fn(*args)` on the I/O loop after so many seconds."""
        return self.machine.platform.io.call_later(seconds, fn, *args)

    @property
    def started(self) -> bool:
        """Whether it was started."""
        return self.machine.lifecycle.started_at is not None

    @property
    def ended(self) -> Outcome | None:
        """How its run ended; None while it has not."""
        return self.machine.outcome

    def start(self) -> None:
        """Run it while the test goes on. Once."""
        self.machine.start()

    def wait_until(self, happened: Callable[[], T | None], what: str, seconds: float | None = None) -> T:
        """What `happened()` returned once that was true; GuestFailure if the guest ends or time is over.

        What the guest's callbacks raise is raised here, as by each of the methods that wait.
        """
        __tracebackhide__ = True
        limit = self.seconds if seconds is None else seconds
        end = monotonic() + limit
        pause = 0.001
        while True:
            # Asked before: what happens last before a guest's end has happened.
            outcome = self.machine.outcome
            if outcome is not None:
                self.raise_error()
                self._take_rest(outcome)
            found = happened()
            if found:
                return found
            if outcome is not None:
                raise GuestFailure(f"the guest ended before {what}: {outcome}")
            if monotonic() > end:
                hint = "" if self.started else "; the guest was not started: call start()"
                raise GuestFailure(f"no {what} within {limit:g} s{hint}")
            sleep(pause)
            pause = min(2 * pause, 0.02)

    def wait_for(self, text: str, *, count: int = 1, seconds: float | None = None) -> str:
        """The console, once `text` has come on it `count` times. GuestFailure."""

        __tracebackhide__ = True

        def printed() -> str | None:
            console = self.console
            return console if console.count(text) >= count else None

        return self.wait_until(printed, f"{text!r} on the console", seconds)

    def wait_for_end(self, seconds: float | None = None) -> Outcome:
        """Start it if need be, wait for its end and stop it. GuestFailure when it does not end in time."""
        __tracebackhide__ = True
        if not self.started:
            self.start()
        limit = self.seconds if seconds is None else seconds
        outcome = self.machine.wait(limit)
        if outcome is None:
            raise GuestFailure(f"the guest has not ended within {limit:g} s")
        error = self.machine.lifecycle.take_error()
        self._finish(outcome)
        if error is not None:
            raise _without_our_frames(error)
        return outcome

    def raise_error(self) -> None:
        """Raise what a callback of the guest's has raised, such as a handler's assertion; once."""
        __tracebackhide__ = True
        error = self.machine.lifecycle.take_error()
        if error is not None:
            raise _without_our_frames(error)

    def _take_rest(self, outcome: Outcome) -> None:
        """Take what the guest has said last, which is still on its way when it has ended. Repeatable."""
        self.call(self.machine.board.flush)

    def _finish(self, outcome: Outcome) -> None:
        self.machine.stop()

    def call(self, fn: Callable[..., T], *args: Any) -> T:
        """`fn(*args)` on the machine's I/O loop, which owns its devices: what it returned or raised.

        Before `start`, when the machine has stopped, and on that loop, it runs right here.
        """
        if not self.started or self.machine.platform.io.in_loop():
            return fn(*args)
        done = threading.Event()
        result: list[T] = []
        error: list[BaseException] = []

        def run() -> None:
            try:
                result.append(fn(*args))
            except BaseException as caught:
                error.append(caught)
            done.set()

        try:
            self.machine.platform.io.call_soon(run)
        except Stopped:
            return fn(*args)
        if not done.wait(self.seconds):
            raise GuestFailure(f"{fn} has not run on the I/O loop within {self.seconds:g} s")
        if error:
            raise error[0]
        return result[0]

    def plug(self, nic: str, connected: bool) -> None:
        """Put the cable of a NIC such as "net0" in, or pull it out. HvkvmError for one that is not there."""
        nics = self.machine.nics
        found = None if nics is None else nics.nics.get(nic)
        if found is None:
            raise HvkvmError(
                f"{nic}: no such NIC; there are {', '.join(nics.nics if nics else ()) or 'none'}"
            )
        self.call(found.wire.plug, connected)

    def set_faults(self, disk: str, faults: str) -> None:
        """Have a disk such as "disk0", made with faults, fail as this TOML text says from now on.

        Counts begin anew; an empty text ends all faults. ConfigError for a mistake in it, HvkvmError
        for a disk that is not there or was made without faults.
        """
        from hvkvm.devices.scsi.faulty import FaultyDisk
        from hvkvm.machine.fault_file import plan_of
        from hvkvm.machine.toml_file import parse_toml

        shelf = self.machine.disk_shelf
        found = {} if shelf is None else shelf.attached
        if disk not in found:
            raise HvkvmError(f"{disk}: no such disk; there are {', '.join(found) or 'none'}")
        unit = found[disk].unit
        if not isinstance(unit, FaultyDisk):
            why = "no disk of the VMBus that was made with faults"
            raise HvkvmError(f'{disk}: {why}; give its disk(...) some, such as faults="# none yet"')
        where = f"faults of {disk}"
        plan = plan_of(parse_toml(faults, where), where)

        def exchange() -> None:
            unit.plan = plan

        self.call(exchange)

    def type(self, text: str) -> None:
        """Send `text` to its serial console, as fast as the guest takes it. GuestFailure."""
        data = text.encode()

        def feed() -> bool:
            nonlocal data
            data = data[self.call(self.machine.board.serial.feed, data) :]
            return not data

        self.wait_until(feed, "room for what is typed on the console")

    def close(self) -> None:
        """End it and let go of everything. Idempotent."""
        self.machine.close()


def _without_our_frames(error: E) -> E:
    """`error` with the traceback from the callback on, without the calls of ours that led there."""
    trace = error.__traceback__
    while trace is not None and not is_callers_module(trace.tb_frame.f_globals.get("__name__")):
        trace = trace.tb_next
    return error if trace is None else error.with_traceback(trace)
