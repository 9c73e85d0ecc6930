"""What KVM's in-kernel Hyper-V does with routes, acknowledgements and event connections.

These hold the facts that hvkvm.hyperv relies on (S11, S12, S15, S20, S41, S43) to
the running kernel; on a KVM without Hyper-V the first tests say how it refuses.
"""

from __future__ import annotations

import errno
import os
import time

import pytest

from hvkvm.abi import kvm as k
from hvkvm.abi import tlfs
from hvkvm.abi.kvm_structs import kvm_irq_routing_entry
from hvkvm.errors import CapabilityMissing, KvmIoctlError
from hvkvm.kvm.exits import HypervHcallExit, decode
from hvkvm.kvm.gsi import GsiTable
from hvkvm.kvm.irqfd import EventFd, Irqfd

SINT = 2
VECTOR = 0x50

# 32-bit: GUEST_OS_ID; hypercall page at 0x2000; for ever: in eax,0x10 -> connection; HvSignalEvent, fast;
# out 0x80,eax (the status).
SIGNAL_GUEST = bytes.fromhex(
    "b900000040 b801000000 ba00000081 0f30"
    "b901000040 b801200000 31d2 0f30"
    "e510 89c1 31db 31d2 31ff 31f6 b85d000100 bd00200000 ffd5 e780 ebe4"
)
# 32-bit: for ever: in al,0x10; wrmsr EOM = 0; out 0x80,al
EOM_GUEST = bytes.fromhex("bc00800000 b984000040 e410 31c0 31d2 0f30 e680 ebf4")


def without_hyperv(kvm):
    if kvm.check_extension(k.KVM_CAP_HYPERV_SYNIC2):
        pytest.skip("this KVM has in-kernel Hyper-V")


@pytest.mark.kvm
def test_a_kvm_without_hyperv_refuses_each_part_by_name(kvm):
    without_hyperv(kvm)
    with kvm.create_vm() as vm, EventFd() as event:
        vm.create_irqchip()
        vcpu = vm.create_vcpu(0)
        with pytest.raises(KvmIoctlError) as caught:
            vm.hyperv_eventfd(1, event.fd)
        assert (caught.value.request, caught.value.errno) == ("KVM_HYPERV_EVENTFD", errno.ENOTTY)
        with pytest.raises(KvmIoctlError) as caught:
            vcpu.enable_cap(k.KVM_CAP_HYPERV_SYNIC2)
        assert caught.value.errno == errno.EINVAL
        with pytest.raises(CapabilityMissing):
            vcpu.supported_hv_cpuid()


@pytest.mark.kvm
def test_a_refused_sint_route_leaves_the_table_usable_s14(kvm):
    without_hyperv(kvm)
    with kvm.create_vm() as vm:
        vm.create_irqchip()
        table = GsiTable(vm)
        with pytest.raises(KvmIoctlError) as caught:
            table.add_hv_sint(0, SINT)
        assert (caught.value.request, caught.value.errno) == ("KVM_SET_GSI_ROUTING", errno.EINVAL)
        assert table.gsis() == []
        assert table.add_msi(0xFEE00000, 0x41) == 24


@pytest.fixture
def enlightened(kvm, tiny_guest):
    """A guest with an active SynIC, software-enabled LAPIC and SINT2 unmasked; it is about to run `code`."""

    def make(code: bytes = b"\xf4", *, synic: bool = True):
        guest = tiny_guest(code, irqchip=True)
        guest.protected_mode()
        if synic:
            activate(kvm, guest)
        return guest

    return make


def activate(kvm, guest) -> None:
    guest.enlighten(kvm)
    lapic = guest.vcpu.lapic()
    lapic.regs[0xF0:0xF4] = [0xFF, 1, 0, 0]
    guest.vcpu.set_lapic(lapic)
    guest.vcpu.set_msrs({tlfs.HV_X64_MSR_SCONTROL: 1, tlfs.HV_X64_MSR_SINT0 + SINT: VECTOR})


def requested(vcpu, vector: int) -> bool:
    """Is `vector` in the LAPIC's IRR? Waits a little: an irqfd may inject from a kernel worker."""
    return any(in_irr(vcpu, vector) for _ in range(2000))


def in_irr(vcpu, vector: int) -> bool:
    return bool(bytes(vcpu.lapic().regs)[0x200 + vector // 32 * 16 + vector % 32 // 8] & 1 << vector % 8)


def await_request(vcpu, vector: int) -> None:
    """Until `vector` is in the LAPIC's IRR."""
    deadline = time.monotonic() + 100
    while not in_irr(vcpu, vector):
        assert time.monotonic() < deadline


@pytest.mark.hyperv
@pytest.mark.parametrize(("vp_index", "sint"), [(0, 99), (9, 2), (9, 99)])
def test_kvm_checks_neither_vp_nor_sint_so_we_must_s11(enlightened, vp_index, sint):
    vm = enlightened().vm
    entry = kvm_irq_routing_entry(gsi=24, type=k.KVM_IRQ_ROUTING_HV_SINT)
    entry.u.hv_sint.vcpu, entry.u.hv_sint.sint = vp_index, sint
    vm.set_gsi_routing([entry])


@pytest.mark.hyperv
def test_a_signal_on_a_sint_route_raises_the_vector_s15(enlightened):
    guest = enlightened()
    table = GsiTable(guest.vm)
    with Irqfd(guest.vm, table.add_hv_sint(0, SINT), resample=True) as line:
        assert not requested(guest.vcpu, VECTOR)
        line.signal()
        await_request(guest.vcpu, VECTOR)


@pytest.mark.hyperv
def test_a_masked_sint_drops_the_signal_silently_s20(enlightened):
    guest = enlightened()
    guest.vcpu.set_msrs({tlfs.HV_X64_MSR_SINT0 + SINT: 1 << 16 | VECTOR})
    with Irqfd(guest.vm, GsiTable(guest.vm).add_hv_sint(0, SINT)) as line:
        line.signal()
        assert not requested(guest.vcpu, VECTOR)


@pytest.mark.hyperv
def test_a_released_route_no_longer_delivers_s15(enlightened):
    guest = enlightened()
    table = GsiTable(guest.vm)
    gsi = table.add_hv_sint(0, SINT)
    with Irqfd(guest.vm, gsi) as line:
        table.release(gsi)
        line.signal()
        assert not requested(guest.vcpu, VECTOR)


@pytest.mark.hyperv
def test_eom_reaches_the_resamplefd_s29(enlightened):
    guest = enlightened(EOM_GUEST)
    table = GsiTable(guest.vm)
    with Irqfd(guest.vm, table.add_hv_sint(0, SINT), resample=True) as line:
        for _ in range(3):
            guest.answer(0)
            guest.outs(1)
            assert line.resamplefd.drain() == 1


@pytest.mark.hyperv
def test_a_route_set_before_the_synic_hears_no_eom_until_recommit_s15(kvm, enlightened):
    guest = enlightened(EOM_GUEST, synic=False)
    table = GsiTable(guest.vm)
    gsi = table.add_hv_sint(0, SINT)
    activate(kvm, guest)
    with Irqfd(guest.vm, gsi, resample=True) as line:
        guest.answer(0)
        guest.outs(1)
        assert line.resamplefd.drain() == 0
        table.recommit()
        guest.answer(0)
        guest.outs(1)
        assert line.resamplefd.drain() == 1


@pytest.mark.hyperv
def test_of_two_gsis_on_one_sint_only_the_last_hears_eom_s12(enlightened):
    guest = enlightened(EOM_GUEST)
    table = GsiTable(guest.vm)
    with (
        Irqfd(guest.vm, table.add_hv_sint(0, SINT), resample=True) as first,
        Irqfd(guest.vm, table.add_hv_sint(0, SINT), resample=True) as last,
    ):
        guest.answer(0)
        guest.outs(1)
        assert (first.resamplefd.drain(), last.resamplefd.drain()) == (0, 1)


@pytest.mark.hyperv
def test_hyperv_eventfd_errnos_s41(enlightened):
    vm = enlightened().vm

    def refused(*args, **kwargs) -> int:
        with pytest.raises(KvmIoctlError) as caught:
            vm.hyperv_eventfd(*args, **kwargs)
        assert caught.value.request == "KVM_HYPERV_EVENTFD"
        return caught.value.errno

    with EventFd() as event:
        vm.hyperv_eventfd(1, event.fd)
        assert refused(1, event.fd) == errno.EEXIST
        assert refused(2, event.fd, deassign=True) == errno.ENOENT
        assert refused(0x1000000, event.fd) == errno.EINVAL
        assert refused(2, 1 << 20) == errno.EBADF
        vm.hyperv_eventfd(0xFFFFFF, event.fd)
        vm.hyperv_eventfd(1, -1, deassign=True)  # the fd is not looked at
        vm.hyperv_eventfd(1, event.fd)


@pytest.mark.hyperv
def test_hyperv_eventfd_takes_no_other_flag_s41(enlightened):
    from hvkvm.abi.kvm_requests import KVM_HYPERV_EVENTFD
    from hvkvm.abi.kvm_structs import kvm_hyperv_eventfd
    from hvkvm.kvm.ioctl import ioctl

    vm = enlightened().vm
    with EventFd() as event, pytest.raises(KvmIoctlError) as caught:
        ioctl(vm.fd, KVM_HYPERV_EVENTFD, kvm_hyperv_eventfd(1, event.fd, 2))
    assert caught.value.errno == errno.EINVAL


@pytest.mark.hyperv
def test_signals_land_until_deassign_even_after_close_s43(enlightened):
    guest = enlightened(SIGNAL_GUEST)
    with EventFd() as event:
        kept = os.dup(event.fd)
        guest.vm.hyperv_eventfd(0x1234, event.fd)
    try:
        for _ in range(2):
            guest.answer(0x1234)
            assert guest.outs(1) == [tlfs.HvStatus.SUCCESS]  # and no exit in between
        assert os.eventfd_read(kept) == 2  # they coalesce (S54), and closing our fd changed nothing
        guest.vm.hyperv_eventfd(0x1234, -1, deassign=True)
        guest.answer(0x1234)
        assert guest.vcpu.enter() == k.KVM_EXIT_HYPERV
        exit_ = decode(guest.vcpu.run)
        assert isinstance(exit_, HypervHcallExit)
        assert (exit_.input, exit_.params[0]) == (0x1005D, 0x1234)
        guest.vcpu.run.hyperv.u.hcall.result = tlfs.HvStatus.INVALID_CONNECTION_ID
        assert guest.outs(1) == [tlfs.HvStatus.INVALID_CONNECTION_ID]
        with pytest.raises(BlockingIOError):
            os.eventfd_read(kept)
    finally:
        os.close(kept)


@pytest.mark.hyperv
def test_an_unknown_connection_exits_with_the_event_itself_s52(enlightened):
    guest = enlightened(SIGNAL_GUEST)
    guest.answer(0x42)
    assert guest.vcpu.enter() == k.KVM_EXIT_HYPERV
    assert decode(guest.vcpu.run) == HypervHcallExit(k.KVM_EXIT_HYPERV, 0x1005D, (0x42, 0))


@pytest.mark.hyperv
def test_the_vcpu_and_the_system_offer_the_same_leaves(kvm, enlightened):
    guest = enlightened()
    assert [e.function for e in guest.vcpu.supported_hv_cpuid()] == [
        e.function for e in kvm.supported_hv_cpuid()
    ]
