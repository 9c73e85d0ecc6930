"""What the SynIC in user space stands on, by hand: no KVM, no threads, no time that passes by itself."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from hvkvm.abi.kvm_structs import kvm_run
from hvkvm.errors import KvmIoctlError, Stopped


class Vcpu:
    """A vCPU whose exits the test writes into `run`; its TSC stands."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.run = kvm_run()
        self.told: list[tuple[int, int]] = []

    def tsc_khz(self) -> int:
        return 2_000_000

    def msrs(self, indices: tuple[int, ...]) -> dict[int, int]:
        return dict.fromkeys(indices, 1000)

    def set_msrs(self, values: Iterable[tuple[int, int]]) -> None:
        self.told += values


class Host:
    """VM, the thread of vCPU 1, I/O loop, clock and alarms in one; nothing runs by itself."""

    memory_slots = 509

    def __init__(self) -> None:
        self.vcpu = Vcpu(1)
        self.interrupts: list[tuple[int, int]] = []
        self.fails_with = 0
        self.loop_ended = False
        self.queue: list[Callable[[], None]] = []
        self.soon: list[Callable[..., object]] = []
        self.later: list[tuple[float, Callable[..., object], tuple[Any, ...]]] = []
        self.armed: list[int] = []

    def check_extension(self, cap: int) -> int:
        return 0

    def add_reader(self, fd: int, callback: Callable[[], object], *, edge: bool = False) -> SimpleNamespace:
        return SimpleNamespace(remove=lambda: None)

    def set_user_memory_region(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        if gpa >> 52:
            raise KvmIoctlError(errno.EINVAL, "KVM_SET_USER_MEMORY_REGION", "vm")

    def signal_msi(self, address: int, data: int) -> int:
        if self.fails_with:
            raise KvmIoctlError(self.fails_with, "KVM_SIGNAL_MSI", "vm")
        self.interrupts.append((address, data))
        return 1

    def submit(self, fn: Callable[[], None], *, cancelled: Callable[[], None]) -> None:
        self.queue.append(fn)

    def run_vp(self) -> None:
        taken, self.queue = self.queue, []
        for fn in taken:
            fn()

    def call_soon(self, fn: Callable[..., object]) -> None:
        if self.loop_ended:
            raise Stopped("ended")
        self.soon.append(fn)

    def call_later(self, seconds: float, fn: Callable[..., object], *args: Any) -> None:
        if self.loop_ended:
            raise Stopped("ended")
        self.later.append((seconds, fn, args))

    def run_later(self) -> None:
        taken, self.later = self.later, []
        for _seconds, fn, args in taken:
            fn(*args)

    def now(self) -> int:
        return 1000

    def make(self, callback: Callable[[], None]) -> Host:
        return self

    def arm(self, nanoseconds: int) -> None:
        self.armed.append(nanoseconds)

    def disarm(self) -> None:
        self.armed.clear()

    def close(self) -> None:
        pass
