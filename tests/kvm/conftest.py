"""Tiny real-mode guests for the tests of hvkvm.kvm, and a way to make single ioctls fail."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

import pytest

from hvkvm.abi.kvm import KVM_CAP_HYPERV_SYNIC2
from hvkvm.abi.kvm_structs import kvm_regs
from hvkvm.errors import KvmIoctlError
from hvkvm.kvm import ioctl as door

RAM_SIZE = 0x10000
ENTRY = 0x1000


class TinyGuest:
    """A VM with 64 KiB of RAM at 0 and one vCPU about to run `code` at 0x1000 in real mode."""

    def __init__(self, kvm, code: bytes, *, irqchip: bool) -> None:
        self.vm = kvm.create_vm()
        self.vm.set_tss_addr(0xFFFBD000)
        if irqchip:
            self.vm.create_irqchip()
        self.ram = mmap.mmap(-1, RAM_SIZE)
        self.ram[ENTRY : ENTRY + len(code)] = code
        hva = ctypes.addressof(ctypes.c_char.from_buffer(self.ram))
        self.vm.set_user_memory_region(0, 0, RAM_SIZE, hva)
        self.vcpu = self.vm.create_vcpu(0)
        sregs = self.vcpu.sregs()
        sregs.cs.base = sregs.cs.selector = 0
        self.vcpu.set_sregs(sregs)
        self.vcpu.set_regs(kvm_regs(rip=ENTRY, rflags=2, rsp=0x8000))

    def protected_mode(self) -> None:
        """Flat 32-bit protected mode instead, CPL 0: where hypercalls are allowed."""
        sregs = self.vcpu.sregs()
        sregs.cr0 |= 1
        for name in ("cs", "ds", "es", "fs", "gs", "ss"):
            segment = getattr(sregs, name)
            segment.base, segment.limit, segment.selector = 0, 0xFFFFFFFF, 8 if name == "cs" else 16
            segment.type, segment.s, segment.present = 11 if name == "cs" else 3, 1, 1
            segment.db = segment.g = 1
        self.vcpu.set_sregs(sregs)

    def enlighten(self, kvm) -> None:
        """Hyper-V CPUID and an active SynIC."""
        leaves = [e for e in kvm.supported_cpuid() if e.function >> 16 != 0x4000] + kvm.supported_hv_cpuid()
        self.vcpu.set_cpuid2(leaves)
        self.vcpu.enable_cap(KVM_CAP_HYPERV_SYNIC2)

    def answer(self, value: int) -> None:
        """Let the guest's `in` give `value`."""
        assert self.vcpu.enter() == 2
        io = self.vcpu.run.io
        assert io.direction == 0
        self.vcpu.io_data(io.data_offset, io.size)[:] = value.to_bytes(io.size, "little")

    def outs(self, count: int, port: int = 0x80) -> list[int]:
        """Run to the next `count` writes to `port` and give what was written; other exits are errors."""
        written = []
        for _ in range(count):
            reason = self.vcpu.enter()
            io = self.vcpu.run.io
            assert (reason, io.direction, io.port) == (2, 1, port), (reason, self.vcpu.regs().rip)
            written.append(int.from_bytes(self.vcpu.io_data(io.data_offset, io.size), "little"))
        return written


@pytest.fixture
def tiny_guest(kvm):
    made = []

    def make(code: bytes, *, irqchip: bool = False) -> TinyGuest:
        made.append(TinyGuest(kvm, code, irqchip=irqchip))
        return made[-1]

    yield make
    for guest in made:
        guest.vm.close()


@pytest.fixture
def break_ioctl(monkeypatch):
    """`break_ioctl("KVM_IRQFD", errno.ENOMEM, skip=1)`: that request fails from its second call on."""
    real = door.ioctl
    broken: dict[str, list[int]] = {}

    def ioctl(fd, request, arg=0, detail=""):
        plan = broken.get(request.name)
        if plan:
            plan[1] -= 1
            if plan[1] < 0:
                raise KvmIoctlError(plan[0], request.name, request.scope, detail)
        return real(fd, request, arg, detail)

    monkeypatch.setattr("hvkvm.kvm.ioctl.ioctl", ioctl)

    def arrange(name: str, number: int = errno.ENOMEM, skip: int = 0) -> None:
        broken[name] = [number, skip]

    arrange.mend = broken.clear
    return arrange


@pytest.fixture
def open_fds():
    """How many fds this process has open, as a function."""
    return lambda: len(os.listdir("/proc/self/fd"))
