"""KVM's SynIC on a real KVM, without a guest: what the kernel takes, refuses and lets go of."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from hvkvm.abi.kvm import KVM_CAP_HYPERV_SYNIC2
from hvkvm.abi.tlfs import (
    HV_X64_MSR_CRASH_CTL,
    HV_X64_MSR_SCONTROL,
    HV_X64_MSR_SIMP,
    HV_X64_MSR_SINT0,
    HV_X64_MSR_SVERSION,
)
from hvkvm.errors import KvmIoctlError, RouteError
from hvkvm.hyperv.cpuid import hyperv_leaves, prepare_vcpu
from hvkvm.hyperv.features import HostFeatures, parse_features, resolve
from hvkvm.hyperv.partition import Partition
from hvkvm.kvm.gsi import GsiTable
from hvkvm.kvm.irqfd import EventFd
from hvkvm.kvm.system import Kvm
from hvkvm.kvm.vm import Vm
from hvkvm.memory.guest import GuestMemory
from hvkvm.runtime.io_loop import IoLoop
from hvkvm.runtime.vcpu_thread import VcpuThread

CPUS = 2


class Bench:
    """A machine that never runs: irqchip, RAM, vCPUs with their enlightenments, I/O loop, partition."""

    def __init__(self, kvm: Kvm, stack: ExitStack) -> None:
        self.features = resolve(parse_features("host-model"), HostFeatures.probe(kvm))
        self.vm: Vm = stack.enter_context(kvm.create_vm())
        self.vm.create_irqchip()
        self.memory = stack.enter_context(GuestMemory(self.vm, 4 << 20))
        self.vcpus = [self.vm.create_vcpu(index) for index in range(CPUS)]
        for vcpu in self.vcpus:
            vcpu.set_cpuid2(kvm.supported_cpuid() + hyperv_leaves(self.features, CPUS))
            prepare_vcpu(vcpu, self.features)
        self.gsi = GsiTable(self.vm)
        self.io = IoLoop()
        stack.callback(self.io.stop)
        self.io.start()
        self.threads = [VcpuThread(vcpu, {}, on_fault=lambda thread, error: None) for vcpu in self.vcpus]
        self.partition = Partition(
            self.vm, self.gsi, self.memory, self.io, self.threads, features=self.features
        )
        stack.callback(self.partition.close)


@pytest.fixture
def bench(kvm: Kvm) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(kvm, stack)


@pytest.mark.kvm
def test_s14_routes_on_a_real_vm_leave_nothing_behind(bench: Bench, open_fds: Callable[[], int]) -> None:
    """With in-kernel Hyper-V they open; without it KVM refuses the GSI. Either way every fd is gone again."""
    synic = bool(bench.vm.check_extension(KVM_CAP_HYPERV_SYNIC2))
    if synic:
        bench.partition.activate()
    else:
        for vp_index in range(CPUS):
            vp = bench.partition.synic.vp(vp_index)
            assert vp is not None
            vp.active = True  # type: ignore[attr-defined]
    fds = open_fds()
    for on_complete in (None, lambda status: None):
        if synic:
            route = bench.partition.open_route(1, 2, on_complete)
            assert route.pulse() == 0
            route.close()
        else:
            with pytest.raises(RouteError, match="KVM_SET_GSI_ROUTING"):
                bench.partition.open_route(1, 2, on_complete)
        assert open_fds() == fds
        assert bench.gsi.gsis() == []


@pytest.mark.hyperv
def test_activation_writes_the_reset_values(bench: Bench) -> None:
    bench.partition.activate()
    for vcpu in bench.vcpus:
        wanted = [HV_X64_MSR_SVERSION, HV_X64_MSR_SCONTROL, HV_X64_MSR_SIMP]
        wanted += [HV_X64_MSR_SINT0 + sint for sint in range(16)]
        values = vcpu.msrs(wanted)
        assert [values[index] for index in wanted] == [1, 0, 0, *[0x10000] * 16]
        if "crash" in bench.features:
            assert vcpu.msrs([HV_X64_MSR_CRASH_CTL])[HV_X64_MSR_CRASH_CTL] >> 63 == 1
    bench.partition.reset()


@pytest.mark.hyperv
def test_s16_lines_opened_before_activation_work_after_it(bench: Bench) -> None:
    early = bench.partition.open_route(0, 2, lambda status: None)
    assert early.pulse() == -errno.ENXIO
    assert bench.gsi.gsis() == []
    bench.partition.activate()
    assert early.pulse() == 0
    assert bench.gsi.gsis() == [24]


@pytest.mark.hyperv
def test_s13_a_line_learns_acks_on_its_gsi(bench: Bench) -> None:
    bench.partition.activate()
    plain = bench.partition.open_route(0, 2)
    sender = bench.partition.open_route(0, 2, lambda status: None)
    assert plain.pulse() == sender.pulse() == 0
    assert bench.gsi.gsis() == [24]


@pytest.mark.hyperv
def test_s41_kvm_hyperv_eventfd_answers(bench: Bench) -> None:
    connections = bench.partition.connections
    assert connections.add_event(5, lambda: None) == 0
    with EventFd() as other:
        with pytest.raises(KvmIoctlError) as caught:
            bench.vm.hyperv_eventfd(5, other.fd)
        assert caught.value.errno == errno.EEXIST
        with pytest.raises(KvmIoctlError) as caught:
            bench.vm.hyperv_eventfd(0x1000000, other.fd)
        assert caught.value.errno == errno.EINVAL
        # Somebody else's connection in KVM: told, and nothing stays.
        bench.vm.hyperv_eventfd(6, other.fd)
        assert connections.add_event(6, lambda: None) == -errno.EEXIST
        bench.vm.hyperv_eventfd(6, -1, deassign=True)
        assert connections.add_event(6, lambda: None) == 0
    assert connections.remove_event(5) == 0
    with pytest.raises(KvmIoctlError) as caught:
        bench.vm.hyperv_eventfd(5, -1, deassign=True)
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(KvmIoctlError) as caught:
        bench.vm.hyperv_eventfd(7, 1 << 20)
    assert caught.value.errno == errno.EBADF
