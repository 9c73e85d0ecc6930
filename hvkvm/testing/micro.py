"""A micro guest: some lines of assembly on a machine of their own, and what they found.

It needs no kernel and no operating system, starts in milliseconds and runs on any
KVM. It hands numbers to the test by ports (`result`), text by its serial console
(`print`), and a status by `exit`; see docs/testing.md for all it may use.

Owner: the test's thread.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hvkvm.testing.guest import Guest, GuestFailure
from hvkvm.testing.micro_image import micro_image

if TYPE_CHECKING:
    from hvkvm.machine.outcome import Outcome

RESULT_PORT = 0x5C0
"""Eight bytes, as two of four: the second completes a number."""
FAULT_PORT = 0x5C8
MAX_RESULTS = 100_000
"""Numbers beyond these are not kept."""

MIB = 1 << 20


class Fault(NamedTuple):
    """An exception that the guest did not catch."""

    vector: int
    code: int
    rip: int
    cr2: int

    def __str__(self) -> str:
        return f"exception {self.vector}, error code {self.code:#x}, rip {self.rip:#x}, cr2 {self.cr2:#x}"


class MicroResult(NamedTuple):
    """What a micro guest's run came to."""

    status: int
    """What it gave to `exit`, 0 at the end of its text; that of the run otherwise."""
    results: tuple[int, ...]
    """Its `result`s, in order; those of several CPUs as they came."""
    console: str
    outcome: Outcome


class _ResultPort:
    """A device: numbers in two halves, one vCPU's never mixed with another's."""

    def __init__(self) -> None:
        self._came: list[tuple[int, int]] = []  # the number, and the thread of its vCPU
        self._low: dict[int, int] = {}
        self._lock = threading.Lock()

    @property
    def results(self) -> tuple[int, ...]:
        """The numbers so far. Any thread."""
        return tuple(number for number, _thread in list(self._came))

    def read(self, offset: int, size: int) -> int:
        """Nothing to read."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """A half of a number. The vCPU's thread."""
        me = threading.get_ident()
        if offset == 0:
            self._low[me] = value
        elif offset == 4 and len(self._came) < MAX_RESULTS:
            with self._lock:
                self._came.append((value << 32 | self._low.get(me, 0), me))

    def take_last(self, count: int) -> list[int]:
        """The last numbers of this vCPU, which are results no more; [] if there are fewer. Its thread."""
        me = threading.get_ident()
        with self._lock:
            places = [place for place, (_number, thread) in enumerate(self._came) if thread == me][-count:]
            if len(places) < count:
                return []
            return [self._came.pop(place)[0] for place in reversed(places)][::-1]


class _FaultPort:
    """A device: the last four results were an exception's, and the guest is over."""

    def __init__(self, guest: MicroGuest) -> None:
        self._guest = guest

    def read(self, offset: int, size: int) -> int:
        """Nothing to read."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """The vCPU's thread."""
        self._guest.faulted()


class MicroGuest(Guest):
    """A guest made of `source`, not started. AssemblyError, and what a machine's building raises.

    `config` are fields of MachineConfig: `cpus`, `hv`, `synic`, `devices`, `vmbus`
    ...; memory is 16 MiB and `hv` is "none" unless said otherwise.
    """

    def __init__(self, source: str | Path, *, seconds: float = 30.0, **config: Any) -> None:
        from hvkvm.machine.config import MachineConfig

        image = micro_image(source.read_text() if isinstance(source, Path) else source)
        settings: dict[str, Any] = {
            "kernel": image,
            "memory": 16 * MIB,
            "hv": "none",
            "acpi": False,
            "reboot": False,
        }
        super().__init__(MachineConfig(**(settings | config)), seconds=seconds)
        self._port = _ResultPort()
        self.fault: Fault | None = None
        """The exception that ended it, if one did."""
        ports = self.machine.board.ports
        ports.add(RESULT_PORT, 8, self._port)
        ports.add(FAULT_PORT, 1, _FaultPort(self))

    @property
    def results(self) -> tuple[int, ...]:
        """The numbers that came so far."""
        return self._port.results

    def faulted(self) -> None:
        """The guest reports an exception. The vCPU's thread."""
        from hvkvm.machine.outcome import EXIT_MACHINE_FAULT, Ending

        found = self._port.take_last(len(Fault._fields)) if self.fault is None else []
        if found:
            self.fault = Fault(*found)
        self.machine.finish(Ending.TRIPLE_FAULT, EXIT_MACHINE_FAULT, str(self.fault))

    def run(self, seconds: float | None = None) -> MicroResult:
        """Run it to its end. GuestFailure if it takes an exception or does not end within `seconds`."""
        __tracebackhide__ = True
        outcome = self.wait_for_end(seconds)
        if self.fault is not None:
            raise GuestFailure(f"the micro guest took {self.fault}")
        return MicroResult(outcome.status, self.results, self.console, outcome)
