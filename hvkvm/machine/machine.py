"""The machine: puts the parts together and owns their lifetime.

`with Machine(config) as machine: outcome = machine.run()`. Building opens
/dev/kvm, makes RAM, vCPUs, interrupt chips, the SynIC and the devices, and
loads the kernel; nothing runs until `start()`. What happens from then on is
`lifecycle`'s.

Threads: the caller's thread builds, waits and closes; `Lifecycle` says what else
may be called from where.

A machine is the process's that made it. A forked child has copies of fds, and
memory, that it shares with it, but none of the threads: closing the machine there
lets the copies go and changes nothing for the one that runs.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from hvkvm.errors import HvkvmError, exhausted
from hvkvm.events import NULL_OBSERVER, Observer, limited
from hvkvm.hyperv.partition import Partition
from hvkvm.kvm.gsi import GsiTable
from hvkvm.kvm.system import Kvm
from hvkvm.machine import build, exits, hyperv, saving
from hvkvm.machine.board import Board
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.guest_image import GuestImage
from hvkvm.machine.host_limits import make_room_for_files, named_when_exhausted
from hvkvm.machine.lifecycle import Lifecycle
from hvkvm.machine.outcome import EXIT_MACHINE_FAULT, Ending, Outcome
from hvkvm.machine.part import Part
from hvkvm.machine.parts import Parts
from hvkvm.machine.platform import Platform
from hvkvm.machine.processors import Processors
from hvkvm.machine.vcpus import create_vcpus
from hvkvm.memory.guest import GuestMemory
from hvkvm.runtime.io_loop import IoLoop
from hvkvm.runtime.vcpu_thread import VcpuThread
from hvkvm.runtime.vcpus import VcpuGroup
from hvkvm.state.file import Saved

if TYPE_CHECKING:
    from hvkvm.machine.disks import Disks

STOP_SECONDS = 10.0
"""How long shutdown waits for a thread before it says which one is stuck."""


class Machine:
    """One guest and everything that carries it. Raises HvkvmError's kinds when it cannot be built."""

    def __init__(self, config: MachineConfig, *, observer: Observer = NULL_OBSERVER) -> None:
        self.config = config.validate()
        self.name = config.name or f"hvkvm-{os.getpid()}"
        self._closed = False
        with named_when_exhausted(), ExitStack() as stack:
            file = self.config.saved
            saved = None if file is None else stack.enter_context(Saved(file))
            if saved is not None:
                self.config = saving.restored_config(saved, config)
            if self.config.cloud_init is not None:
                from hvkvm.machine.cloud_init import with_seed

                self.config = with_seed(self.config)
            self.boot_note = ""
            """Why it starts in firmware that nobody named, for its user; mostly nothing."""
            if self.config.kernel is None and self.config.starts_firmware:
                from hvkvm.machine.boot_choice import choose

                self.config, self.boot_note = choose(self.config)
            self.root_note = ""
            """What was found out about the guest's root file system, for its user; mostly nothing."""
            if self.config.disks:
                from hvkvm.machine.root import find_root

                self.config, self.root_note = find_root(self.config)
            make_room_for_files(self.config.cpus)
            self.parts = self._build(saved, limited(observer), stack)
            self._stack = stack.pop_all()

    def _build(self, saved: Saved | None, observer: Observer, stack: ExitStack) -> Parts:
        config = self.config
        image = GuestImage(config, self.name, None if saved is None else saved.manifest.config.boot)
        kvm = stack.enter_context(Kvm(config.kvm_path))
        offered = hyperv.choose(kvm, config)
        handlers: exits.Handlers = {}
        self.platform = platform = self._platform(kvm, offered, handlers, saved, observer, stack)
        self.lifecycle = lifecycle = Lifecycle(
            platform, reboot=config.reboot, why_no_reset=image.why_not_again
        )
        stack.callback(lifecycle.close)
        self.board = board = Board(platform, lifecycle, stack)
        self.hyperv = interface = build.create_hyperv(platform, offered, lifecycle, board.ports, stack)
        handlers |= exits.handlers(board, lifecycle, platform.memory, config.append) | interface.handlers()
        board.add_optional_devices(config.devices, interface)
        self.bus = build.create_bus(platform, interface, stack)
        self.nics = build.create_nics(platform, self.bus, self.name, stack, saved)
        self.pci = build.create_pci(platform, board, stack)
        self.disk_shelf = build.create_disks(platform, self.bus, self.pci, stack)
        self.firmware = build.create_firmware(
            platform, board, self.pci, self.disk_shelf, image, self.name, stack
        )
        if self.firmware is not None:
            lifecycle.at_end(self.firmware.end)
        if self.disk_shelf is not None:
            lifecycle.at_end(self.disk_shelf.end)
        if config.record:
            from hvkvm.machine.recording import record

            record(platform, interface, self.bus, stack)
        if config.timeline is not None:
            from hvkvm.machine.recording import draw, moved

            so_far = partial(moved, self.disk_shelf, self.nics)
            draw(platform, board, self.bus, config.timeline, stack, so_far)
        processors = Processors(platform, image)
        optional = (self.nics, self.bus, self.firmware, self.pci)
        order: list[Part] = [board, *(part for part in optional if part is not None), interface, processors]
        lifecycle.govern(order, board)
        if saved is None:
            processors.boot()
        else:
            saving.load(saved, order, self.disk_shelf)
        board.renew_generation(tell=saved is not None)
        self.orders = orders = build.create_orders(platform, board, stack)
        saver = saving.Saver(
            self.name,
            platform,
            lifecycle,
            interface,
            order,
            self.disk_shelf,
            waits=lambda: orders is not None and orders.awaited,
            recipe=image.recipe,
        )
        stack.callback(saver.close)
        parts = Parts(
            self.name,
            platform,
            lifecycle,
            interface,
            board,
            self.bus,
            self.nics,
            self.disk_shelf,
            saver,
            self.pci,
            self.firmware,
        )
        self.control = build.create_control(parts, stack)
        return parts

    @property
    def disks(self) -> Disks | None:
        """Its disks and DVD drives; None while it has had none."""
        return None if self.disk_shelf is None else self.disk_shelf.disks

    def _platform(
        self,
        kvm: Kvm,
        offered: hyperv.Enlightenments,
        handlers: exits.Handlers,
        saved: Saved | None,
        observer: Observer,
        stack: ExitStack,
    ) -> Platform:
        config = self.config
        vm = build.create_vm(kvm, config, stack)
        memory = build.create_memory(vm, config, saved, stack)
        vcpus = create_vcpus(kvm, vm, config, offered.features)
        io = IoLoop(on_fault=self._loop_fault)
        stack.callback(io.stop)
        threads = [
            VcpuThread(vcpu, handlers, on_fault=self._vcpu_fault, name=f"vcpu{vcpu.index}") for vcpu in vcpus
        ]
        group = VcpuGroup(threads)
        return Platform(config, kvm, vm, memory, vcpus, threads, group, GsiTable(vm), io, observer)

    def _vcpu_fault(self, thread: VcpuThread, error: BaseException) -> None:
        self._end_by(error, f"{thread.name}: {error}")

    def _loop_fault(self, error: BaseException) -> None:
        self._end_by(error, f"I/O loop: {type(error).__name__}: {error}")

    def _end_by(self, error: BaseException, detail: str) -> None:
        """Name the end that an error on a thread of the machine's makes: the host's want, or a fault."""
        what = exhausted(error)
        if what is None:
            self.finish(Ending.KVM_ERROR, EXIT_MACHINE_FAULT, detail)
        else:
            self.finish(Ending.HOST_EXHAUSTED, EXIT_MACHINE_FAULT, what)

    # Running it.

    def start(self) -> None:
        """Start the I/O loop and every vCPU. Once only; HvkvmError else."""
        if self.orders is not None and self.lifecycle.started_at is None:
            self.orders.start()
        self.lifecycle.start()

    def wait(self, timeout: float | None = None) -> Outcome | None:
        """Wait up to `timeout` seconds (None: without limit) for the end; None if it has not come."""
        return self.lifecycle.wait(timeout)

    def run(self) -> Outcome:
        """Start, wait for the end or `config.timeout` seconds, stop every thread, return the outcome."""
        self.start()
        if self.wait(self.config.timeout) is None:
            self.expire()
        self.stop()
        if self.outcome is None:
            raise HvkvmError("the run was stopped and has no outcome")
        return self.outcome

    def expire(self) -> None:
        """End the run because its time is over. Any thread."""
        self.lifecycle.expire(self.config.timeout)

    def finish(self, ending: Ending, status: int, detail: str = "") -> None:
        """End the run, and name the end; the first ending wins. Wakes `wait()`. Any thread."""
        self.lifecycle.finish(ending, status, detail)

    def request_reset(self, reason: str) -> None:
        """Reset the machine soon, or end the run if the configuration says so. Any thread."""
        self.lifecycle.request_reset(reason)

    def save(self, path: Path, *, end: bool = False, compress: bool = False) -> int:
        """Write the machine to `path`, from where `MachineConfig.restore` goes on; the file's size in bytes.

        The guest stands still meanwhile, and goes on then; with `end` the run ends. `compress` makes the
        file small (zstd), for keeping. Any thread but a vCPU's and the I/O loop's. HvkvmError when it
        cannot be, or the run ends first.
        """
        return self.parts.saver.save_and_wait(path, end=end, compress=compress)

    def pause(self) -> None:
        """Take every vCPU out of KVM_RUN with its pending exit completed. Any thread but a vCPU's."""
        self.platform.group.pause_all()

    def resume(self) -> None:
        """Undo one `pause()`."""
        self.platform.group.resume_all()

    def stop(self) -> None:
        """Stop and join every thread. Idempotent; raises HvkvmError naming a thread that does not stop."""
        self.lifecycle.stop(STOP_SECONDS)

    def close(self) -> None:
        """Stop, and release every fd and mapping, devices first. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self.lifecycle.is_copy:
            self._let_go()
            return
        try:
            self.stop()
        finally:
            self._stack.close()

    def _let_go(self) -> None:
        """A forked child's close: only what acts on this process alone, and nothing that takes a lock."""
        self.platform.vm.close()
        self.platform.memory.close()
        self.platform.kvm.close()

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Looking at it, and being its host.

    @property
    def outcome(self) -> Outcome | None:
        """How the run ended; None while it has not."""
        return self.lifecycle.outcome

    @property
    def resets(self) -> int:
        """How often the guest was reset."""
        return self.lifecycle.resets

    @property
    def memory(self) -> GuestMemory:
        """Guest RAM."""
        return self.platform.memory

    @property
    def partition(self) -> Partition | None:
        """The SynIC component: SINT routes and connections. None where `--hv` leaves it out."""
        return self.hyperv.partition

    def exit_counts(self) -> dict[str, int]:
        """Exits of all vCPUs so far, by the C name of the reason. Any thread."""
        from hvkvm.machine.inspect import exit_counts

        return exit_counts(self.platform)
