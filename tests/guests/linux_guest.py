"""A stock Linux guest for tests: boots a script, tells its console, runs host code on the I/O loop.

`with linux_guest(script) as guest:` builds the machine; `start()` or `finish()`
runs it. Waiting ends with the console's text when the guest ends first or the
time is over. Owner: the test's thread.
"""

from __future__ import annotations

import os
import threading
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any, TypeVar

from guest_artifacts import artifact
from running_vm import whole_lines

from hvkvm.errors import Stopped
from hvkvm.machine.bus import Bus
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.machine import Machine
from hvkvm.machine.outcome import Outcome
from hvkvm.machine.warm_kept import kept

SECONDS = 600.0
"""How long a test waits for anything: an emulated host is slow, and may be busy."""

KERNELS = {
    "stable": ("HVKVM_GUEST_KERNEL", "HVKVM_GUEST_MODULES"),
    "newer": ("HVKVM_NEWER_KERNEL", "HVKVM_NEWER_MODULES"),
}
"""Those that every test of a stock guest boots."""
MAIN_KERNELS = tuple(KERNELS) if os.environ.get("HVKVM_SOAK") else ("newer",)
"""For tests of minutes; all of them in a soak."""
NEWEST = {"newest": ("HVKVM_NEWEST_KERNEL", "HVKVM_NEWEST_MODULES")}
"""For the few tests that a boot more is worth."""
T = TypeVar("T")


class LinuxGuest:
    """The machine and what its console said."""

    def __init__(self, machine: Machine, output: bytearray | None = None) -> None:
        self.machine = machine
        self.output = bytearray() if output is None else output
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._text, self._taken = "", 0
        self._printed = threading.Event()
        self.attach()

    def attach(self) -> None:
        """Hear the console of the machine, which may be another one than before."""
        self.machine.board.attach_sink(self._hear)

    def _hear(self, data: bytes) -> None:
        self.output.extend(data)
        self._printed.set()

    @property
    def text(self) -> str:
        """The console so far, with plain line ends.

        It is asked for at each look, so each byte is decoded once: all of them each time took two thirds of a
        lab's processor where a guest printed 18 KiB.
        """
        new = bytes(self.output[self._taken :])
        if new.endswith(b"\r"):
            new = new[:-1]  # half of a line's end, perhaps
        self._taken += len(new)
        self._text += self._decoder.decode(new).replace("\r\n", "\n")
        return self._text

    @property
    def bus(self) -> Bus:
        """The machine's bus."""
        assert self.machine.bus is not None
        return self.machine.bus

    def start(self) -> None:
        """Run the guest while the test goes on."""
        self.machine.start()

    def wait_until(
        self,
        happened: Callable[[], T | None],
        what: str,
        seconds: float = SECONDS,
        news: threading.Event | None = None,
    ) -> T:
        """What `happened()` returned once that was true; AssertionError with the console else.

        It looks when the console has said something, or `news` is set, and now and then.
        """
        end = monotonic() + seconds
        while True:
            ended = self.machine.outcome is not None
            if ended:
                self._hear_the_rest()
            found = happened()  # asked after that: a guest may do it and end at once
            if found:
                return found
            assert not ended, f"{what}: {self.machine.outcome}\n{self.report()}"
            assert monotonic() < end, f"{what}: not within {seconds:g} s\n{self.report()}"
            # A lab has one processor, so looking often would slow the guest down: not at each character.
            if (news or self._printed).wait(0.05):
                if news is None:
                    sleep(0.01)
                self._printed.clear()

    def _hear_the_rest(self) -> None:
        """What the guest printed before its end may still be under way to the loop."""
        heard = threading.Event()
        with suppress(Stopped):  # else the loop has ended, and the board has given all
            self.machine.platform.io.call_soon(self.machine.board.flush)
            self.machine.platform.io.call_soon(heard.set)
            assert heard.wait(SECONDS), self.machine.platform.io.state

    def wait_for(self, marker: str, *, count: int = 1, seconds: float = SECONDS) -> str:
        """The console's whole lines, once `marker` stands in them `count` times."""

        def printed() -> str | None:
            lines = whole_lines(self.text)
            return lines if lines.count(marker) >= count else None

        return self.wait_until(printed, f"waiting for {marker!r}", seconds)

    def call(self, fn: Callable[..., T], *args: Any) -> T:
        """`fn(*args)` on the I/O loop, and what it returned or raised."""
        done = threading.Event()
        result: list[T] = []
        error: list[BaseException] = []

        def run() -> None:
            try:
                result.append(fn(*args))
            except BaseException as caught:
                error.append(caught)
            done.set()

        self.machine.platform.io.call_soon(run)
        self.wait_until(done.is_set, f"{fn} on the I/O loop", news=done)
        if error:
            raise error[0]
        return result[0]

    def type(self, line: str) -> None:
        """Send a line to the guest's serial console."""
        self.press(f"{line}\n".encode())

    def press(self, data: bytes) -> None:
        """Send keys to the guest's serial console, as fast as it takes them."""
        while data:
            taken = self.call(self.machine.board.serial.feed, data)
            data = data[taken:]
            if data:
                sleep(0.01)

    def finish(self, seconds: float = SECONDS) -> Outcome:
        """The outcome of the run; starts it if need be."""
        if self.machine.lifecycle.started_at is None:
            self.start()
        outcome = self.machine.wait(seconds)
        assert outcome is not None, f"the guest does not end\n{self.report()}"
        self.machine.stop()
        return outcome

    def report(self) -> str:
        """Console and machine, for a failure's text."""
        from hvkvm.machine.dump import describe

        return f"{self.text[-6000:]}\n{describe(self.machine.parts)}"


@contextmanager
def warm_linux_guest(script: str, **config: Any) -> Iterator[LinuxGuest]:
    """As `linux_guest`, but a copy of one that is booted once for all tests that ask for it, without VMBus.

    For tests of what a Linux does that runs: not of its boot, nor of what its console says of it.
    """
    made = MachineConfig(
        kernel=artifact("HVKVM_GUEST_KERNEL"),
        busybox=artifact("HVKVM_GUEST_BUSYBOX"),
        append="quiet",
        synic="kernel",
        timeout=SECONDS,
    )
    file = kept(made)
    command = ("sh", "-c", script)
    settings: dict[str, Any] = {"kernel": file, "warm": file, "timeout": 3 * SECONDS, "command": command}
    with Machine(MachineConfig(**settings | config)) as machine:
        yield LinuxGuest(machine)


@contextmanager
def linux_guest(
    script: str,
    *,
    kernel: str = "stable",
    synic: str | None = None,
    modules: Sequence[str] = ("hv_vmbus", "hv_utils"),
    files: Mapping[str, Path] | None = None,
    **config: Any,
) -> Iterator[LinuxGuest]:
    """A guest with a bus whose shell runs `script`. HVKVM_SYNIC chooses the SynIC if `synic` does not."""
    image, modules_dir = (KERNELS | NEWEST)[kernel]
    settings: dict[str, Any] = {
        "kernel": artifact(image),
        "busybox": artifact("HVKVM_GUEST_BUSYBOX"),
        "modules_dir": artifact(modules_dir),
        "modules": tuple(modules),
        "append": "quiet",
        "synic": synic or os.environ.get("HVKVM_SYNIC") or "kernel",
        "vmbus": "on",
        "timeout": 3 * SECONDS,  # the whole life of a guest that one test does much with
        "command": ("sh", "-c", script),
        "files": tuple((files or {}).items()),
    }
    with Machine(MachineConfig(**settings | config)) as machine:
        yield LinuxGuest(machine)
