"""A VM fd that records what it is told and fails when told to; fds and memory above it are real."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

from hvkvm.abi.kvm import KVM_CAP_HYPERV_EVENTFD, KVM_CAP_HYPERV_SYNIC2, KVM_IRQ_ROUTING_HV_SINT
from hvkvm.abi.kvm_structs import kvm_irq_routing_entry, kvm_regs, kvm_run, kvm_sregs
from hvkvm.errors import KvmIoctlError


class FakeVm:
    """`log` is every call in order; `fail` maps a call's name to the errno it ends with."""

    closed = False

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.fail: dict[str, int] = {}
        self.caps = {KVM_CAP_HYPERV_SYNIC2: 1, KVM_CAP_HYPERV_EVENTFD: 1}
        self.connections: dict[int, int] = {}

    def _call(self, name: str, *detail: object) -> None:
        self.log.append((name, *detail))
        if name in self.fail:
            raise KvmIoctlError(self.fail[name], name, "vm")

    def check_extension(self, cap: int) -> int:
        return self.caps.get(cap, 0)

    memory_slots = 509

    def set_user_memory_region(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        self._call("slot", gpa, size)

    def set_gsi_routing(self, entries: Sequence[kvm_irq_routing_entry]) -> None:
        sints = [
            (e.gsi, e.u.hv_sint.vcpu, e.u.hv_sint.sint) for e in entries if e.type == KVM_IRQ_ROUTING_HV_SINT
        ]
        self._call("routing", *sints)

    def irqfd(self, fd: int, gsi: int, flags: int = 0, resamplefd: int = 0) -> None:
        self._call(("irqfd", "irqfd off", "irqfd resample")[flags], gsi)

    def hyperv_eventfd(self, conn_id: int, fd: int, deassign: bool = False) -> None:
        self._call("hyperv_eventfd off" if deassign else "hyperv_eventfd", conn_id)
        if deassign:
            if self.connections.pop(conn_id, None) is None:
                raise KvmIoctlError(errno.ENOENT, "KVM_HYPERV_EVENTFD", "vm")
        elif self.connections.setdefault(conn_id, fd) != fd:
            raise KvmIoctlError(errno.EEXIST, "KVM_HYPERV_EVENTFD", "vm")


class FakeVcpu:
    """A vCPU whose exits the test writes into `run`."""

    def __init__(self, vm: FakeVm, index: int) -> None:
        self.vm = vm
        self.index = index
        self.run = kvm_run()
        self.general = kvm_regs()
        self.special = kvm_sregs()
        self.msrs: list[tuple[int, int]] = []

    def enable_cap(self, cap: int, *args: int) -> None:
        self.vm._call("enable_cap", self.index, cap, *args)

    def set_msrs(self, values: Iterable[tuple[int, int]]) -> None:
        self.msrs += values

    def regs(self) -> kvm_regs:
        return self.general

    def sregs(self) -> kvm_sregs:
        return self.special


class FakeThread:
    """A vCPU's thread whose queue the test runs."""

    def __init__(self, vcpu: FakeVcpu) -> None:
        self.vcpu = vcpu
        self.queue: list[tuple[Callable[..., object], tuple[object, ...]]] = []

    def submit(
        self, fn: Callable[..., object], *args: object, cancelled: Callable[[], object] | None = None
    ) -> None:
        self.queue.append((fn, args))

    def run(self) -> int:
        taken, self.queue = self.queue, []
        for fn, args in taken:
            fn(*args)
        return len(taken)


class ManualReaders:
    """The I/O loop: readers and deferred calls run when the test says so."""

    def __init__(self) -> None:
        self.readers: dict[int, Callable[[], object]] = {}
        self.queue: list[tuple[Callable[..., object], tuple[object, ...]]] = []

    def add_reader(self, fd: int, callback: Callable[[], object], *, edge: bool = False) -> SimpleNamespace:
        if fd in self.readers:
            raise ValueError("watched already")

        def once_a_write() -> None:
            os.eventfd_read(fd)
            callback()

        self.readers[fd] = once_a_write if edge else callback

        def remove() -> None:
            os.fstat(fd)  # still open: a number that is closed may be another file's already
            self.readers.pop(fd, None)

        return SimpleNamespace(remove=remove)

    def call_soon(
        self, fn: Callable[..., object], *args: object, cancelled: Callable[[], object] | None = None
    ) -> None:
        self.queue.append((fn, args))

    def run(self) -> None:
        """Call the readers whose fd is ready, then what was deferred."""
        ready, _, _ = select.select(list(self.readers), [], [], 0)
        for fd in ready:
            self.readers[fd]()
        taken, self.queue = self.queue, []
        for fn, args in taken:
            fn(*args)
