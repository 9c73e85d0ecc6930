"""Eventfds and irqfds: order, faults at every step, and interrupts that arrive."""

from __future__ import annotations

import errno
import os
import select
import time

import pytest

from hvkvm.abi.kvm import KVM_CAP_SPLIT_IRQCHIP
from hvkvm.errors import KvmIoctlError
from hvkvm.kvm.gsi import GsiTable
from hvkvm.kvm.irqfd import EventFd, Irqfd

# Real mode: IVT entry 0x24 -> handler; PIC master at 0x20, only IRQ 4 open; out 0x80,'R'; sti;
# then write port 0x81 for ever, so that the host can look in without a second thread.
PIC_GUEST = bytes.fromhex(
    "fa 31c0 8ed8 8ed0 bc0080"  # cli; xor ax,ax; mov ds,ax; mov ss,ax; mov sp,0x8000
    "c70690004010 c70692000000"  # mov word [0x90],0x1040; mov word [0x92],0
    "b011e620 b020e621 b004e621 b001e621 b0efe621"  # ICW1-4, mask 0xef
    "b052e680 fb e681 ebfc"  # mov al,'R'; out 0x80,al; sti; l: out 0x81,al; jmp l
).ljust(0x40, b"\x90") + bytes.fromhex("b048e680 b020e620 cf")  # 'H' to 0x80; EOI; iret


class Lines:
    """A VM's irqfd method, recorded."""

    closed = False

    def __init__(self) -> None:
        self.calls = []

    def irqfd(self, fd, gsi, flags=0, resamplefd=0):
        os.fstat(fd)  # must be open at this moment
        if resamplefd:
            os.fstat(resamplefd)
        self.calls.append((gsi, flags))


def test_eventfd_counts_and_drains():
    with EventFd() as event:
        assert event.drain() == 0
        event.signal()
        event.signal(4)
        assert select.select([event], [], [], 0)[0] == [event]
        assert event.drain() == 5
        assert event.drain() == 0
        event.signal(2**64 - 2)
        event.signal()  # full: as good as signalled, and no block
        assert event.drain() == 2**64 - 2
        assert not os.get_inheritable(event.fd)
    event.close()
    assert event.fd == -1
    for late in (event.signal, event.drain):
        with pytest.raises(OSError, match="Bad file") as caught:
            late()
        assert caught.value.errno == errno.EBADF


def test_deassign_comes_before_any_close_s18(open_fds):
    before = open_fds()
    vm = Lines()
    line = Irqfd(vm, 24, resample=True)
    ack = line.resamplefd
    line.deassign()
    assert vm.calls == [(24, 2), (24, 1)]
    assert ack.fd >= 0  # the owner stops watching it between deassign and close
    assert line.eventfd.fd >= 0
    line.close()
    line.close()
    assert vm.calls == [(24, 2), (24, 1)]
    assert (ack.fd, line.eventfd.fd) == (-1, -1)
    assert open_fds() == before


def test_close_alone_deassigns_while_the_fds_are_open_s18(open_fds):
    before = open_fds()
    vm = Lines()
    with Irqfd(vm, 30):
        pass
    assert vm.calls == [(30, 0), (30, 1)]  # Lines saw open fds both times
    assert open_fds() == before


def test_the_ack_fd_is_closed_before_the_set_fd_s18(monkeypatch):
    line = Irqfd(Lines(), 24, resample=True)
    wanted = [line.resamplefd.fd, line.eventfd.fd]
    closed = []
    real = os.close
    monkeypatch.setattr("os.close", lambda fd: (closed.append(fd), real(fd)))
    line.close()
    assert closed == wanted


def test_a_refused_deassign_still_closes_the_fds(open_fds):
    before = open_fds()
    vm = Lines()
    line = Irqfd(vm, 24, resample=True)

    def refuse(*_):
        raise KvmIoctlError(errno.EINVAL, "KVM_IRQFD", "vm")

    vm.irqfd = refuse
    with pytest.raises(KvmIoctlError):
        line.close()
    assert open_fds() == before


def test_only_acks_have_a_resamplefd_s13():
    with Irqfd(Lines(), 24) as line:
        assert line.resamplefd is None


@pytest.mark.parametrize("resample", [False, True])
@pytest.mark.parametrize("step", [0, 1])
def test_out_of_eventfds_at_each_step_leaks_nothing_s14(monkeypatch, open_fds, resample, step):
    if step == 1 and not resample:
        return  # that one makes a single eventfd
    real, left = os.eventfd, [step]

    def eventfd(*args):
        if left[0] == 0:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        left[0] -= 1
        return real(*args)

    monkeypatch.setattr("os.eventfd", eventfd)
    before = open_fds()
    with pytest.raises(OSError, match="Too many open files"):
        Irqfd(Lines(), 24, resample=resample)
    assert open_fds() == before


@pytest.mark.kvm
@pytest.mark.parametrize("resample", [False, True])
def test_refused_irqfd_leaks_neither_fd_nor_gsi_s14(kvm, break_ioctl, open_fds, resample):
    with kvm.create_vm() as vm:
        vm.create_irqchip()
        table = GsiTable(vm)
        before = open_fds()

        def line():
            gsi = table.add_msi(0xFEE00000, 0x41)
            try:
                return Irqfd(vm, gsi, resample=resample)
            except KvmIoctlError:
                table.release(gsi)
                raise

        for request in ("KVM_SET_GSI_ROUTING", "KVM_IRQFD"):
            break_ioctl(request, errno.ENOMEM)
            with pytest.raises(KvmIoctlError) as caught:
                line()
            assert (caught.value.request, caught.value.errno) == (request, errno.ENOMEM)
            break_ioctl.mend()
            assert open_fds() == before
            assert table.gsis() == []
        # and afterwards everything still works
        with line():
            pass


@pytest.mark.kvm
def test_irqfd_needs_an_irqchip_and_resample_the_full_one(kvm, open_fds):
    before = open_fds()
    with kvm.create_vm() as vm, pytest.raises(KvmIoctlError) as caught:
        Irqfd(vm, 4)
    assert caught.value.errno in (errno.EINVAL, errno.EAGAIN)
    with kvm.create_vm() as vm:
        vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24)
        table = GsiTable(vm, full_irqchip=False)
        gsi = table.add_msi(0xFEE00000, 0x41)
        with Irqfd(vm, gsi):
            pass
        with pytest.raises(KvmIoctlError) as caught:
            Irqfd(vm, gsi, resample=True)
        assert caught.value.errno == errno.EINVAL
    assert open_fds() == before


@pytest.mark.kvm
def test_closing_after_the_vm_is_quiet(kvm, open_fds):
    before = open_fds()
    vm = kvm.create_vm()
    vm.create_irqchip()
    line = Irqfd(vm, 4)
    vm.close()
    line.close()
    assert open_fds() == before


@pytest.mark.kvm
def test_one_eventfd_drives_one_gsi_s15(kvm):
    with kvm.create_vm() as vm:
        vm.create_irqchip()
        with Irqfd(vm, 4) as line:
            with pytest.raises(KvmIoctlError) as caught:
                vm.irqfd(line.eventfd.fd, 5)
            assert caught.value.errno == errno.EBUSY
            vm.irqfd(line.eventfd.fd, 4, 1)  # deassign without RESAMPLE works
            vm.irqfd(line.eventfd.fd, 5)
            vm.irqfd(line.eventfd.fd, 5, 1)
            line._assigned = False


@pytest.mark.kvm
def test_a_gsi_without_route_is_accepted_and_does_nothing_s15(kvm):
    with kvm.create_vm() as vm:
        vm.create_irqchip()
        vm.create_vcpu(0)
        with Irqfd(vm, 30) as line:
            line.signal()


@pytest.mark.kvm
def test_each_signal_is_one_edge_at_the_guest(tiny_guest):
    guest = tiny_guest(PIC_GUEST, irqchip=True)
    assert guest.outs(1) == [ord("R")]
    with Irqfd(guest.vm, 4) as line:
        for _ in range(3):
            line.signal()
            assert interrupts(guest) == 1
        line.deassign()
        line.signal()
        assert interrupts(guest, at_least=0) == 0


@pytest.mark.kvm
def test_resamplefd_fires_when_the_guest_ends_the_interrupt(tiny_guest):
    guest = tiny_guest(PIC_GUEST, irqchip=True)
    assert guest.outs(1) == [ord("R")]
    with Irqfd(guest.vm, 4, resample=True) as line:
        for _ in range(3):
            assert line.resamplefd.drain() == 0
            line.pulse()
            assert interrupts(guest) == 1
            assert line.resamplefd.drain() == 1
    assert line.resamplefd.fd == -1


@pytest.mark.kvm
def test_irq_line_reaches_the_same_handler(tiny_guest):
    guest = tiny_guest(PIC_GUEST, irqchip=True)
    assert guest.outs(1) == [ord("R")]
    guest.vm.irq_line(4, 1)
    guest.vm.irq_line(4, 0)
    assert interrupts(guest) == 1


@pytest.mark.kvm
def test_an_msi_route_carries_a_signal_to_the_lapic(kvm):
    with kvm.create_vm() as vm:
        vm.create_irqchip()
        vcpu = vm.create_vcpu(0)
        lapic = vcpu.lapic()
        lapic.regs[0xF0:0xF4] = [0xFF, 1, 0, 0]
        vcpu.set_lapic(lapic)
        table = GsiTable(vm)
        gsi = table.add_msi(0xFEE00000, 0x41)
        with Irqfd(vm, gsi) as line:
            table.update_msi(gsi, 0xFEE00000, 0x42)
            line.signal()
            deadline = time.monotonic() + 100
            while not bytes(vcpu.lapic().regs)[0x220]:  # injected from a kernel worker, maybe
                assert time.monotonic() < deadline
            assert bytes(vcpu.lapic().regs)[0x220] == 1 << 2


def handler_ran(guest) -> bool:
    """One turn of the guest: did its handler write 'H'?"""
    guest.vcpu.enter()
    io = guest.vcpu.run.io
    if io.port != 0x80:
        return False
    assert guest.vcpu.data[io.data_offset] == ord("H")
    return True


def interrupts(guest, at_least: int = 1) -> int:
    """Run the guest until its handler ran `at_least` times, then a while for more; how often did it in all?

    KVM injects pin interrupts of an irqfd from a worker: when, nobody promises.
    """
    seen = 0
    deadline = time.monotonic() + 60
    while seen < at_least and time.monotonic() < deadline:
        seen += handler_ran(guest)
    return seen + sum(handler_ran(guest) for _ in range(50))
