"""Guest writes without an exit: ioeventfds and the coalesced ring, on KVM."""

from __future__ import annotations

import errno
import os

import pytest

from hvkvm.abi import kvm as k
from hvkvm.errors import CapabilityMissing, KvmIoctlError
from hvkvm.kvm.coalesced import CoalescedPio, CoalescedRing
from hvkvm.kvm.doorbell import IoEventFd


class Bells:
    """A VM's ioeventfd and coalesced_zone, recorded; `check_extension` says yes or no."""

    closed = False

    def __init__(self, caps: int = 2) -> None:
        self.calls = []
        self.caps = caps
        self.fail = False

    def check_extension(self, cap):
        return self.caps

    def ioeventfd(self, address, size, fd, flags, datamatch=0):
        if self.fail:
            raise KvmIoctlError(errno.EEXIST, "KVM_IOEVENTFD", "vm")
        os.fstat(fd)
        self.calls.append((address, size, flags, datamatch))

    def coalesced_zone(self, address, size, *, pio, register):
        self.calls.append((address, size, pio, register))


def test_ioeventfd_ends_as_it_began_and_while_open(open_fds):
    before = open_fds()
    vm = Bells()
    bell = IoEventFd(vm, 0x500, 2, datamatch=0, pio=True)
    bell.close()
    bell.close()
    assert vm.calls == [(0x500, 2, 3, 0), (0x500, 2, 7, 0)]
    assert open_fds() == before


def test_refused_ioeventfd_leaks_no_fd(open_fds):
    before = open_fds()
    vm = Bells()
    vm.fail = True
    with pytest.raises(KvmIoctlError):
        IoEventFd(vm, 0x500, 2)
    assert open_fds() == before


def test_refused_deassign_still_closes_the_eventfd(open_fds):
    before = open_fds()
    vm = Bells()
    bell = IoEventFd(vm, 0x500, 2)
    vm.fail = True
    with pytest.raises(KvmIoctlError):
        bell.close()
    bell.close()
    assert open_fds() == before


def test_coalesced_pio_needs_its_capability():
    vm = Bells(caps=0)
    with pytest.raises(CapabilityMissing, match="KVM_CAP_COALESCED_PIO"):
        CoalescedPio(vm, 0x3F8, 1)
    assert vm.calls == []


def test_coalesced_pio_unregisters_once():
    vm = Bells()
    with CoalescedPio(vm, 0x3F8, 1) as zone:
        pass
    zone.close()
    assert vm.calls == [(0x3F8, 1, True, True), (0x3F8, 1, True, False)]


# mov cx,N; mov dx,0x500; l: out dx,al; inc al; loop l; out 0x80,al; hlt
def burst(count: int) -> bytes:
    return b"\xb9" + count.to_bytes(2, "little") + bytes.fromhex("ba0005 b000 ee fec0 e2fb e680 f4")


@pytest.mark.kvm
def test_ioeventfd_counts_writes_without_an_exit(tiny_guest):
    guest = tiny_guest(burst(100))
    with IoEventFd(guest.vm, 0x500, 1, pio=True) as bell:
        assert guest.outs(1) == [100]  # the first exit of all
        assert bell.eventfd.drain() == 100


@pytest.mark.kvm
def test_datamatch_lets_the_others_exit(tiny_guest):
    guest = tiny_guest(burst(5))
    with IoEventFd(guest.vm, 0x500, 1, datamatch=3, pio=True) as bell:
        assert guest.outs(4, port=0x500) == [0, 1, 2, 4]
        assert bell.eventfd.drain() == 1


@pytest.mark.kvm
def test_a_closed_doorbell_exits_again(tiny_guest):
    guest = tiny_guest(burst(2))
    IoEventFd(guest.vm, 0x500, 1, pio=True).close()
    assert guest.outs(2, port=0x500) == [0, 1]


@pytest.mark.kvm
def test_same_doorbell_twice_is_refused(tiny_guest, open_fds):
    guest = tiny_guest(b"\xf4")
    with IoEventFd(guest.vm, 0x500, 1, pio=True):
        before = open_fds()
        with pytest.raises(KvmIoctlError) as caught:
            IoEventFd(guest.vm, 0x500, 1, pio=True)
        assert caught.value.errno == errno.EEXIST
        assert open_fds() == before


@pytest.mark.kvm
def test_coalesced_writes_wait_in_order(tiny_guest, kvm):
    if not kvm.check_extension(k.KVM_CAP_COALESCED_PIO):
        pytest.skip("needs KVM_CAP_COALESCED_PIO")
    guest = tiny_guest(burst(80))  # older kernels take 85 at most
    with CoalescedPio(guest.vm, 0x500, 1):
        assert guest.outs(1) == [80]
        ring = CoalescedRing(guest.vm, guest.vcpu)
        writes = ring.take_writes()
        assert [write.data for write in writes] == [bytes([n]) for n in range(80)]
        assert {(write.address, write.pio) for write in writes} == {(0x500, True)}
        assert ring.take_writes() == []


@pytest.mark.kvm
def test_a_full_ring_exits_and_nothing_is_lost(tiny_guest):
    guest = tiny_guest(burst(1000))
    got = []
    with CoalescedPio(guest.vm, 0x500, 1):
        ring = CoalescedRing(guest.vm, guest.vcpu)
        while True:
            assert guest.vcpu.enter() == k.KVM_EXIT_IO
            got += [write.data[0] for write in ring.take_writes()]
            io = guest.vcpu.run.io
            if io.port == 0x80:
                break
            got.append(guest.vcpu.data[io.data_offset])
    assert got == [n % 256 for n in range(1000)]
