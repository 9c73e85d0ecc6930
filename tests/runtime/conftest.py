"""Fixtures for the runtime room: forced thread switches, and small real-mode guests on a real KVM."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest
from at_once import at_once

from hvkvm.kvm.irqfd import EventFd
from hvkvm.kvm.system import Kvm
from hvkvm.kvm.vcpu import Vcpu
from hvkvm.kvm.vm import Vm
from hvkvm.memory.guest import GuestMemory
from hvkvm.runtime.io_loop import IoLoop
from hvkvm.runtime.vcpu_thread import Handler, VcpuThread

CODE = 0x1000


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """The test must leave no fd and no thread behind."""
    gc.collect()  # or what an earlier test dropped in a cycle is closed in the middle of this one
    threads = set(threading.enumerate())
    fds = set(os.listdir("/proc/self/fd"))
    yield
    assert set(threading.enumerate()) <= threads  # another test's may have ended meanwhile
    assert set(os.listdir("/proc/self/fd")) == fds


class Bench:
    """A VM with the in-kernel interrupt chips, real-mode vCPUs at CODE, and their threads."""

    def __init__(self, kvm: Kvm, stack: ExitStack) -> None:
        self.stack = stack
        self.vm: Vm = stack.enter_context(kvm.create_vm())
        self.vm.set_tss_addr(0xFFFBD000)
        self.vm.create_irqchip()  # so that HLT blocks inside KVM_RUN, and APs wait for INIT there
        self.memory = stack.enter_context(GuestMemory(self.vm, 0x10000))
        self.faults: list[BaseException] = []

    def vcpu(self, code: bytes = b"") -> Vcpu:
        """The next vCPU. The first is the boot processor; the others wait for INIT."""
        if code:
            self.memory.write(CODE, code)
        vcpu = self.vm.create_vcpu(len(self.vm.vcpus))
        sregs = vcpu.sregs()
        sregs.cs.base = sregs.cs.selector = 0
        vcpu.set_sregs(sregs)
        regs = vcpu.regs()
        regs.rip, regs.rflags, regs.rsp = CODE, 2, 0x8000
        vcpu.set_regs(regs)
        return vcpu

    def thread(self, vcpu: Vcpu, handlers: dict[int, Handler] | None = None) -> VcpuThread:
        """A thread for it, not started; stopped at the end of the test."""
        if handlers is None:
            handlers = {}
        thread = VcpuThread(vcpu, handlers, on_fault=lambda _thread, error: self.faults.append(error))
        self.stack.callback(thread.join, 10)
        self.stack.callback(thread.stop)
        return thread


@pytest.fixture
def bench(kvm: Kvm) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(kvm, stack)


@pytest.fixture
def in_threads() -> Callable[..., None]:
    """Run several functions at once, each in a thread of its own; the first error is raised here."""
    return at_once


@pytest.fixture
def pulse() -> Iterator[EventFd]:
    """An eventfd."""
    with closing(EventFd()) as pulse:
        yield pulse


@pytest.fixture
def faults() -> list[BaseException]:
    """What the loop reported."""
    return []


@pytest.fixture
def loop(no_leaks: None, faults: list[BaseException]) -> Iterator[IoLoop]:
    """A running I/O loop."""
    loop = IoLoop(on_fault=faults.append)
    loop.start()
    yield loop
    loop.stop()


@pytest.fixture
def settle() -> Callable[[IoLoop], None]:
    """`settle(loop)` returns when the loop has gone through a whole round that began after the call."""

    def wait(loop: IoLoop) -> None:
        for _ in range(2):
            done = threading.Event()
            loop.call_soon(done.set)
            assert done.wait(100), loop.state

    return wait
