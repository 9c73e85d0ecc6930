"""Fixtures of the port device tests: a loop that runs only when told, a line that counts its pulses."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hvkvm.errors import Stopped
from hvkvm.events import Event, Observer

# A module for tests, not part of the package.
sys.path.insert(0, str(Path(__file__).parent))


def _taken(waiting: list[Any]) -> list[Any]:
    """What waits, taken off the list itself: another thread may be about to add to this very list."""
    return [waiting.pop(0) for _ in range(len(waiting))]


class ManualLoop:
    """IoLoop's part that devices use; the test says when it turns."""

    def __init__(self) -> None:
        self.soon: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
        self.later: list[tuple[float, Callable[..., object], tuple[Any, ...]]] = []
        self.readers: dict[int, Callable[[], object]] = {}
        self.stopped = False

    def add_reader(self, fd: int, callback: Callable[[], object], *, edge: bool = False) -> SimpleNamespace:
        def once_a_write() -> None:
            os.eventfd_read(fd)
            callback()

        self.readers[fd] = once_a_write if edge else callback
        return SimpleNamespace(remove=lambda: self.readers.pop(fd, None))

    def call_soon(
        self, fn: Callable[..., object], *args: Any, cancelled: Callable[[], object] | None = None
    ) -> None:
        if self.stopped:
            raise Stopped("the loop has stopped")
        self.soon.append((fn, args))

    def call_later(self, seconds: float, fn: Callable[..., object], *args: Any) -> None:
        if self.stopped:
            raise Stopped("the loop has stopped")
        self.later.append((seconds, fn, args))

    def run_soon(self) -> int:
        ready = select.select(list(self.readers), [], [], 0)[0]
        for fd in ready:
            self.readers[fd]()
        batch = _taken(self.soon)
        for fn, args in batch:
            fn(*args)
        return len(batch) + len(ready)

    def run_later(self) -> int:
        batch = _taken(self.later)
        for _seconds, fn, args in batch:
            fn(*args)
        return len(batch)

    def settle(self) -> None:
        """Run everything until nothing is left."""
        while self.run_soon() + self.run_later():
            pass


class CountingLine:
    """An IrqLine."""

    def __init__(self) -> None:
        self.pulses = 0

    def pulse(self) -> None:
        self.pulses += 1

    def taken(self) -> int:
        count, self.pulses = self.pulses, 0
        return count


class Recorder(Observer):
    """Keeps the events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def event(self, event: Event) -> None:
        self.events.append(event)


@pytest.fixture
def loop() -> ManualLoop:
    return ManualLoop()


@pytest.fixture
def line() -> CountingLine:
    return CountingLine()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="session")
def new_loop() -> type[ManualLoop]:
    """For properties, which need a fresh one for each example."""
    return ManualLoop


@pytest.fixture(scope="session")
def new_line() -> type[CountingLine]:
    return CountingLine


class TinyGuest:
    """One vCPU in real mode at 0x1000 with 1 MiB of RAM, run by the test's own thread through a PortBus."""

    def __init__(self, kvm: Any) -> None:
        from hvkvm.devices.port.bus import PortBus
        from hvkvm.memory.guest import GuestMemory

        self.vm = kvm.create_vm()
        self.memory = GuestMemory(self.vm, 1 << 20)
        self.vcpu = self.vm.create_vcpu(0)
        self.bus = PortBus()
        self.exits = 0
        sregs = self.vcpu.sregs()
        sregs.cs.base = sregs.cs.selector = 0
        self.vcpu.set_sregs(sregs)

    def load(self, code: bytes, *, data: bytes = b"", **registers: int) -> None:
        """Put `code` at 0x1000 and `data` at 0x2000; the guest starts at the code."""
        self.memory.write(0x1000, code)
        self.memory.write(0x2000, data)
        regs = self.vcpu.regs()
        regs.rip, regs.rflags, regs.rsp = 0x1000, 2, 0x8000
        for name, value in registers.items():
            setattr(regs, name, value)
        self.vcpu.set_regs(regs)

    def run(self, limit: int = 1_000_000) -> None:
        """Run until HLT (there is no irqchip, so that exits)."""
        from hvkvm.abi.kvm import KVM_EXIT_HLT, KVM_EXIT_IO

        for _ in range(limit):
            reason = self.vcpu.enter()
            if reason == KVM_EXIT_HLT:
                return
            assert reason == KVM_EXIT_IO
            self.exits += 1
            self.bus.handle_io(self.vcpu)
        pytest.fail(f"no HLT after {limit} exits")

    def close(self) -> None:
        self.bus.forget(self.vcpu)
        self.vcpu.close()
        self.memory.close()
        self.vm.close()


@pytest.fixture
def tiny(kvm: Any) -> Iterator[TinyGuest]:
    guest = TinyGuest(kvm)
    yield guest
    guest.close()
