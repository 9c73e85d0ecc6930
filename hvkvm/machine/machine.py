"""The machine: wires the rooms below it and owns their lifetime.

`with Machine(config) as machine: outcome = machine.run()`. Building opens
/dev/kvm, makes RAM, vCPUs, interrupt chips, the SynIC and the port devices, and
loads the kernel; nothing runs until `start()`.

Threads: the caller's thread builds, waits and closes. A vCPU thread owns its
vCPU. The I/O loop owns eventfds, completions and resets. `finish()` may be
called from any thread; the first ending wins.
"""

from __future__ import annotations

import os
import select
import threading
from collections import Counter
from contextlib import ExitStack
from time import monotonic
from types import TracebackType

from hvkvm.errors import HvkvmError
from hvkvm.events import NULL_OBSERVER, GuestPanicked, Observer
from hvkvm.hyperv.features import FeatureSet
from hvkvm.hyperv.partition import Partition
from hvkvm.kvm.gsi import GsiTable
from hvkvm.kvm.irqfd import EventFd
from hvkvm.kvm.system import Kvm
from hvkvm.machine import build, exits
from hvkvm.machine.board import Board
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.outcome import (
    EXIT_MACHINE_FAULT,
    EXIT_PANIC,
    EXIT_TIMEOUT,
    Ending,
    Outcome,
)
from hvkvm.machine.reset import PowerOnState
from hvkvm.runtime.io_loop import IoLoop
from hvkvm.runtime.vcpu_thread import VcpuThread
from hvkvm.runtime.vcpus import VcpuGroup

STOP_SECONDS = 10.0
"""How long shutdown waits for a thread before it says which one is stuck."""


class Machine:
    """One guest and everything that carries it. Raises HvkvmError's kinds when it cannot be built."""

    def __init__(self, config: MachineConfig, *, observer: Observer = NULL_OBSERVER) -> None:
        self.config = config.validate()
        self.observer = observer
        self.outcome: Outcome | None = None
        self.started_at: float | None = None
        self.resets = 0
        self.name = config.name or f"hvkvm-{os.getpid()}"
        # An eventfd, not a threading.Event: finish() is called by signal handlers, which may find the
        # main thread inside wait(), and an Event's lock would then be waited for by its own holder.
        self._ended = EventFd()
        self._ending_lock = threading.RLock()
        self._reset_pending = False
        self._closed = False
        with ExitStack() as stack:
            stack.callback(self._ended.close)
            self._build(stack)
            self._stack = stack.pop_all()

    def _build(self, stack: ExitStack) -> None:
        config = self.config
        self._image = build.GuestImage(config)
        self.kvm = stack.enter_context(Kvm(config.kvm_path))
        self.synic_choice = build.choose_synic(self.kvm, config)
        self.features: FeatureSet = build.resolve_features(self.synic_choice, config)
        self.vm = build.create_vm(self.kvm, config, stack)
        self.memory = build.create_memory(self.vm, config, stack)
        self.vcpus = build.create_vcpus(self.kvm, self.vm, config, self.features)
        self.gsi = GsiTable(self.vm)
        self.io = IoLoop(on_fault=self._loop_fault)
        stack.callback(self.io.stop)
        self.board = Board(self, stack)
        handlers = exits.handlers(self)
        self.threads = [
            VcpuThread(vcpu, handlers, on_fault=self._vcpu_fault, name=f"vcpu{vcpu.index}")
            for vcpu in self.vcpus
        ]
        self.group = VcpuGroup(self.threads)
        self.user_hyperv = build.create_user_hyperv(self, stack)
        self.partition: Partition | None = build.create_partition(self, stack)
        if self.user_hyperv is not None:
            exits.add_user_hyperv_handlers(handlers, self.user_hyperv)
        elif self.partition is not None:
            exits.add_hyperv_handlers(handlers, self.partition)
        self.board.add_optional_devices(config.devices)
        self.bus = build.create_bus(self, stack)
        build.reset_enlightenments(self)
        self._power_on = PowerOnState(self.kvm, self.vm, self.vcpus)
        self._image.load(self.memory, self.vcpus[0])
        self.control = build.create_control(self, stack)

    def start(self) -> None:
        """Start the I/O loop and every vCPU. Once only."""
        if self.started_at is not None:
            raise HvkvmError("this machine was started already; build another one")
        self.started_at = monotonic()
        self.io.start()
        try:
            self.group.start_all()
        except HvkvmError:
            if self.outcome is None:  # else a vCPU that ran already has ended the machine
                raise

    @property
    def ended_fd(self) -> int:
        """Becomes readable when the run has ended, for callers that wait for more than that."""
        return self._ended.fd

    def wait(self, timeout: float | None = None) -> Outcome | None:
        """Wait up to `timeout` seconds (None: without limit) for the end; None if it has not come."""
        poller = select.poll()
        poller.register(self._ended.fd, select.POLLIN)
        poller.poll(None if timeout is None else timeout * 1000)
        return self.outcome

    def run(self) -> Outcome:
        """Start, wait for the end or `config.timeout` seconds, stop every thread, return the outcome."""
        self.start()
        if self.wait(self.config.timeout) is None:
            self.expire()
        self.stop()
        assert self.outcome is not None
        return self.outcome

    def expire(self) -> None:
        """End the run because its time is over; a guest that hangs in its panic has ended by that."""
        panic = self.board.console_panic()
        if panic is not None:
            self.finish(Ending.PANIC, EXIT_PANIC, panic)
        self.finish(
            Ending.TIMEOUT, EXIT_TIMEOUT, f"the guest had not finished after {self.config.timeout:g} s"
        )

    def finish(self, ending: Ending, status: int, detail: str = "") -> None:
        """Name the end of the run, once; wakes `wait()`. Any thread."""
        with self._ending_lock:
            if self.outcome is None:
                self.outcome = Outcome(ending, status, detail)
        for thread in self.threads:
            thread.stop()
        self._ended.signal()

    def pause(self) -> None:
        """Take every vCPU out of KVM_RUN with its pending exit completed. Any thread but a vCPU's."""
        self.group.pause_all()

    def resume(self) -> None:
        """Undo one `pause()`."""
        self.group.resume_all()

    def reference_time(self) -> int:
        """What the guest's HV_X64_MSR_TIME_REF_COUNT counts, in 100 ns units. Any thread."""
        if self.user_hyperv is not None:
            return self.user_hyperv.clock.now()
        # KVM's register counts the VM's clock.
        return int(self.vm.get_clock().clock) // 100

    def request_reset(self, reason: str) -> None:
        """Reset the machine soon, or end the run if the configuration says so. Any thread."""
        with self._ending_lock:
            if self._reset_pending or self.outcome is not None:
                return
            self._reset_pending = True
        self.io.call_soon(self._reset, reason)

    def _reset(self, reason: str) -> None:
        """Devices first, SynIC last (S7), then the vCPUs' power-on state and a fresh image. I/O loop."""
        self.board.flush()
        panic = self.board.console_panic()
        if panic is not None:
            # A panicking kernel told to reboot would loop for ever; its panic is the end.
            self.finish(Ending.PANIC, EXIT_PANIC, panic)
            return
        if not self.config.reboot:
            self.finish(Ending.RESET, 0, reason)
            return
        with self.group.paused():
            if self.outcome is not None:
                return
            self.board.reset()
            if self.bus is not None:
                self.bus.host.reset()
            if self.partition is not None:
                self.partition.reset()
            build.reset_enlightenments(self)
            self._power_on.restore()
            self._image.load(self.memory, self.vcpus[0])
            self.resets += 1
            self._reset_pending = False

    def guest_panicked(self, text: str) -> None:
        """The guest reported a crash; ends the run with its text. Any thread."""
        self.observer.event(GuestPanicked(text))
        self.io.call_soon(self._end_of_panic, text)

    def _end_of_panic(self, text: str) -> None:
        """What the console says is for people; the crash registers come after it. I/O loop."""
        self.board.flush()
        seen = self.board.console_panic()
        self.finish(Ending.PANIC, EXIT_PANIC, f"{seen}; {text}" if seen else text)

    def exit_counts(self) -> dict[str, int]:
        """Exits of all vCPUs so far, by the C name of the reason without KVM_EXIT_. Any thread."""
        from hvkvm.kvm.exits import exit_name

        total: Counter[str] = Counter()
        for thread in self.threads:
            total.update({exit_name(reason): count for reason, count in list(thread.exit_counts.items())})
        return dict(total)

    def _vcpu_fault(self, thread: VcpuThread, error: BaseException) -> None:
        self.finish(Ending.KVM_ERROR, EXIT_MACHINE_FAULT, f"{thread.name}: {error}")

    def _loop_fault(self, error: BaseException) -> None:
        self.finish(Ending.KVM_ERROR, EXIT_MACHINE_FAULT, f"I/O loop: {type(error).__name__}: {error}")

    def stop(self) -> None:
        """Stop and join every thread. Idempotent; raises HvkvmError naming a thread that does not stop."""
        if self.outcome is None:
            self.finish(Ending.QUIT, 0, "stopped by the host")
        if self.started_at is not None:
            self.group.stop_all(STOP_SECONDS)
            self.board.flush()
            self.io.stop()

    def close(self) -> None:
        """Stop, and release every fd and mapping, devices first. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            self.stop()
        finally:
            self._stack.close()

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
