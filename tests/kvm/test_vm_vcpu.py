"""VMs and vCPUs on real KVM: run, state in and out, lifetime."""

from __future__ import annotations

import errno
import gc
import time

import pytest

from hvkvm.abi import kvm as k
from hvkvm.abi.kvm_structs import kvm_cpuid_entry2, kvm_regs
from hvkvm.errors import KvmIoctlError
from hvkvm.kvm.exits import HltExit, IoExit, decode
from hvkvm.kvm.system import Kvm
from hvkvm.kvm.vm import MsrRange

pytestmark = pytest.mark.kvm

IN_OUT_HLT = bytes.fromhex("e410 0407 e680 f4")  # in al,0x10; add al,7; out 0x80,al; hlt


def test_in_out_hlt(tiny_guest):
    guest = tiny_guest(IN_OUT_HLT)
    vcpu = guest.vcpu
    assert vcpu.enter() == k.KVM_EXIT_IO
    assert decode(vcpu.run, vcpu.data) == IoExit(2, False, 0x10, 1, 1, b"")
    vcpu.io_data(vcpu.run.io.data_offset, 1)[0] = 35
    assert vcpu.enter() == k.KVM_EXIT_IO
    assert decode(vcpu.run, vcpu.data) == IoExit(2, True, 0x80, 1, 1, bytes([42]))
    assert vcpu.enter() == k.KVM_EXIT_HLT
    assert decode(vcpu.run) == HltExit(5)


def test_immediate_exit_completes_the_in_and_runs_nothing(tiny_guest):
    guest = tiny_guest(IN_OUT_HLT)
    guest.vcpu.enter()
    guest.vcpu.io_data(guest.vcpu.run.io.data_offset, 1)[0] = 35
    guest.vcpu.complete_exit()
    assert guest.vcpu.regs().rax & 0xFF == 35
    assert guest.vcpu.enter() == k.KVM_EXIT_INTR  # still asked to come back: a kick is never lost
    guest.vcpu.run.immediate_exit = 0
    assert guest.outs(1) == [42]


def test_enter_says_intr_by_errno_not_by_a_stale_reason(tiny_guest):
    guest = tiny_guest(IN_OUT_HLT)
    guest.vcpu.run.immediate_exit = 1
    guest.vcpu.run.exit_reason = k.KVM_EXIT_SHUTDOWN
    assert guest.vcpu.enter() == k.KVM_EXIT_INTR


def test_an_ap_waits_for_its_sipi_and_enter_says_intr(kvm):
    with kvm.create_vm() as vm:
        vm.create_irqchip()
        vm.create_vcpu(0)
        ap = vm.create_vcpu(1)
        assert ap.mp_state() == k.KVM_MP_STATE_UNINITIALIZED
        ap.run.immediate_exit = 1
        assert ap.enter() == k.KVM_EXIT_INTR
        ap.set_mp_state(k.KVM_MP_STATE_RUNNABLE)
        assert ap.mp_state() == k.KVM_MP_STATE_RUNNABLE


def test_registers_come_back_as_set(tiny_guest):
    vcpu = tiny_guest(b"\xf4").vcpu
    regs = kvm_regs(rax=1, r15=0xFFFF_FFFF_FFFF_FFFF, rip=0x1234, rflags=2)
    vcpu.set_regs(regs)
    assert bytes(vcpu.regs()) == bytes(regs)
    sregs = vcpu.sregs()
    sregs.gdt.base, sregs.gdt.limit, sregs.cr3 = 0x5000, 0x17, 0x6000
    vcpu.set_sregs(sregs)
    assert bytes(vcpu.sregs()) == bytes(sregs)


@pytest.mark.parametrize("kind", ["debugregs", "xcrs", "xsave", "vcpu_events", "lapic", "mp_state"])
def test_saved_state_is_taken_back(kvm, kind):
    with kvm.create_vm() as vm:
        vm.create_irqchip()
        vcpu = vm.create_vcpu(0)
        vcpu.set_cpuid2(kvm.supported_cpuid())
        state = getattr(vcpu, kind)()
        getattr(vcpu, f"set_{kind}")(state)
        again = getattr(vcpu, kind)()
        assert (state if isinstance(state, int | bytes) else bytes(state)) == (
            again if isinstance(again, int | bytes) else bytes(again)
        )


def test_debug_registers_hold_what_is_set(kvm):
    with kvm.create_vm() as vm:
        vcpu = vm.create_vcpu(0)
        debug = vcpu.debugregs()
        debug.db[2] = 0x1234
        vcpu.set_debugregs(debug)
        assert vcpu.debugregs().db[2] == 0x1234
        with pytest.raises(ValueError, match="XSAVE"):
            vcpu.set_xsave(b"\0" * 100)


def test_irqchip_pit_and_clock_state(kvm):
    with kvm.create_vm() as vm:
        vm.create_irqchip()
        vm.create_pit2(k.KVM_PIT_SPEAKER_DUMMY)
        chip = vm.get_irqchip(k.KVM_IRQCHIP_IOAPIC)
        assert all(entry & 1 << 16 for entry in chip.chip.ioapic.redirtbl)  # masked at reset
        chip.chip.ioapic.redirtbl[3] = 1 << 16 | 0x55
        vm.set_irqchip(chip)
        assert vm.get_irqchip(k.KVM_IRQCHIP_IOAPIC).chip.ioapic.redirtbl[3] == 1 << 16 | 0x55
        vm.set_pit2(vm.get_pit2())
        clock = vm.get_clock()
        clock.flags, clock.clock = 0, 10**15
        vm.set_clock(clock)
        assert vm.get_clock().clock >= 10**15


# KVM keeps these in step with the guest's registers, with what its host can do, or with the CPU underneath.
REWRITTEN = {1, 7, 0xD, 0x12, 0x14, 0x1D, 0x1E, 0x24, 0x40000001, 0x80000001, 0x80000007, 0x80000008}


def test_cpuid_comes_back_as_set(kvm):
    """What says something comes back, in order; KVM may drop empty leaves and add or rewrite its own."""
    with kvm.create_vm() as vm:
        vcpu = vm.create_vcpu(0)
        entries = kvm.supported_cpuid()
        entries.append(kvm_cpuid_entry2(function=0x40000003, eax=0x66, ebx=0x30))
        vcpu.set_cpuid2(entries)
        got = {(e.function, e.index): e for e in vcpu.cpuid2()}
        said = [e for e in entries if e.eax or e.ebx or e.ecx or e.edx]
        order = [place for place in got if place in {(e.function, e.index) for e in said}]
        assert order == [(e.function, e.index) for e in said if (e.function, e.index) in got]
        for entry in said:
            if entry.function not in REWRITTEN:
                assert bytes(got[entry.function, entry.index]) == bytes(entry)
        assert {1, 7} <= {function for function, _ in got}


def test_cpuid_leaves_that_say_nothing_may_be_dropped(kvm):
    """The kernels of AMX hosts without AMX do: leaves 0x1d and 0x1e."""
    with kvm.create_vm() as vm:
        vcpu = vm.create_vcpu(0)
        vcpu.set_cpuid2([*kvm.supported_cpuid(), kvm_cpuid_entry2(function=0x40000005)])
        empty = [e for e in vcpu.cpuid2() if e.function == 0x40000005]
        assert [bytes(e) for e in empty] in ([], [bytes(kvm_cpuid_entry2(function=0x40000005))])


def test_msrs_read_and_written_in_order(kvm):
    with kvm.create_vm() as vm:
        vcpu = vm.create_vcpu(0)
        vcpu.set_msrs({0xC0000081: 0x23 << 48, 0xC0000082: 0x1000})  # STAR, LSTAR
        assert vcpu.msrs([0xC0000082, 0xC0000081]) == {0xC0000082: 0x1000, 0xC0000081: 0x23 << 48}
        vcpu.set_msrs([(0xC0000082, 1), (0xC0000082, 2)])
        assert vcpu.msrs([0xC0000082]) == {0xC0000082: 2}
        vcpu.set_msrs({})
        assert vcpu.msrs([]) == {}


def test_more_msrs_than_kvm_takes_at_once(kvm):
    with kvm.create_vm() as vm:
        vcpu = vm.create_vcpu(0)
        vcpu.set_msrs([(0xC0000082, n) for n in range(600)])
        assert vcpu.msrs([0xC0000082] * 600) == {0xC0000082: 599}


def test_the_refused_msr_is_named(kvm):
    with kvm.create_vm() as vm:
        vcpu = vm.create_vcpu(0)
        with pytest.raises(KvmIoctlError) as caught:
            vcpu.set_msrs([(0xC0000082, 0x1000), (0x1B0BAD, 5), (0xC0000081, 1)])
        assert caught.value.request == "KVM_SET_MSRS"
        assert "refused MSR 0x1b0bad = 0x5" in str(caught.value)
        assert vcpu.msrs([0xC0000082, 0xC0000081]) == {0xC0000082: 0x1000, 0xC0000081: 0}
        with pytest.raises(KvmIoctlError, match="refused MSR 0x1b0bad"):
            vcpu.msrs([0xC0000082, 0x1B0BAD])


def test_msr_filter_denies_and_exits(tiny_guest):
    # mov ecx,0x40000000; mov eax,0x1234; mov edx,0x8100; wrmsr; rdmsr; out 0x80,eax; hlt
    code = bytes.fromhex("66b900000040 66b834120000 66ba00810000 0f30 0f32 66e780 f4")
    guest = tiny_guest(code, irqchip=True)
    guest.vm.enable_cap(k.KVM_CAP_X86_USER_SPACE_MSR, k.KVM_MSR_EXIT_REASON_FILTER)
    both = k.KVM_MSR_FILTER_READ | k.KVM_MSR_FILTER_WRITE
    guest.vm.set_msr_filter([MsrRange(0x40000000, 0x200, both)])
    vcpu = guest.vcpu
    assert vcpu.enter() == k.KVM_EXIT_X86_WRMSR
    msr = vcpu.run.msr
    assert (msr.index, msr.data, msr.reason) == (0x40000000, 0x8100 << 32 | 0x1234, 4)
    assert vcpu.enter() == k.KVM_EXIT_X86_RDMSR
    vcpu.run.msr.data = 77
    assert guest.outs(1) == [77]


@pytest.mark.parametrize("count", [0, 0x600 * 8 + 1])
def test_msr_filter_ranges_kvm_cannot_take(kvm, count):
    with kvm.create_vm() as vm, pytest.raises(ValueError, match="more than KVM takes"):
        vm.set_msr_filter([MsrRange(0x40000000, count, 3)])


def test_too_many_msr_filter_ranges(kvm):
    with kvm.create_vm() as vm, pytest.raises(ValueError, match="range 16"):
        vm.set_msr_filter([MsrRange(0x40000000 + 64 * n, 64, 3) for n in range(17)])


def test_translate_in_real_mode_is_identity(tiny_guest):
    assert tiny_guest(b"\xf4").vcpu.translate(0x1000) == 0x1000


def test_memory_slot_errors_name_the_slot(kvm):
    with kvm.create_vm() as vm, pytest.raises(KvmIoctlError, match=r"slot 3 at 0x123\+0x1000"):
        vm.set_user_memory_region(3, 0x123, 0x1000, 0x10000)


def test_signal_msi_tells_delivered_from_not(kvm):
    with kvm.create_vm() as vm:
        vm.create_irqchip()
        vcpu = vm.create_vcpu(0)
        lapic = vcpu.lapic()
        lapic.regs[0xF0:0xF4] = [0xFF, 1, 0, 0]  # SPIV: software-enabled
        vcpu.set_lapic(lapic)
        assert vm.signal_msi(0xFEE00000, 0x41) > 0
        irr = bytes(vcpu.lapic().regs)[0x220:0x224]
        assert int.from_bytes(irr, "little") == 1 << (0x41 - 0x40)
        assert vm.signal_msi(0xFEE00000 | 9 << 12, 0x41) == 0  # no such APIC


def test_closing_twice_and_late_use(kvm):
    vm = kvm.create_vm()
    vcpu = vm.create_vcpu(0)
    vcpu.run.exit_reason = 17
    vm.close()
    vm.close()
    vcpu.close()
    assert vm.closed
    assert vcpu.closed
    assert vm.vcpus == []
    for late in (vcpu.enter, vcpu.regs, vm.create_irqchip, lambda: vm.create_vcpu(1)):
        with pytest.raises(KvmIoctlError) as caught:
            late()
        assert caught.value.errno == errno.EBADF
    assert vcpu.run.exit_reason == 17  # a copy: still there to diagnose with
    assert len(vcpu.data) == kvm.vcpu_mmap_size


def test_close_with_a_view_still_held(kvm):
    vm = kvm.create_vm()
    vcpu = vm.create_vcpu(0)
    run, piece = vcpu.run, vcpu.io_data(4096, 8)
    vm.close()
    assert run.exit_reason == 0  # still mapped
    assert bytes(piece) == bytes(8)


def test_a_vm_outlives_kvm():
    with Kvm() as kvm:
        vm = kvm.create_vm()
    with vm:
        assert vm.check_extension(k.KVM_CAP_NR_MEMSLOTS) > 0
        assert vm.create_vcpu(0).mp_state() == k.KVM_MP_STATE_RUNNABLE


def test_a_vcpu_that_cannot_be_mapped_leaves_no_fd(kvm, open_fds, monkeypatch):
    with kvm.create_vm() as vm:
        before = open_fds()
        vm.vcpu_mmap_size = 1 << 60
        with pytest.raises((OSError, OverflowError, ValueError)):
            vm.create_vcpu(0)
        assert open_fds() == before
        assert vm.vcpus == []


def test_a_thousand_cycles_leak_no_fd(open_fds):
    with Kvm() as kvm:
        kvm.create_vm().close()
        before = open_fds()
        enough = time.monotonic() + 20  # a software-emulated host does a hundred in that
        for cycle in range(1000):
            with kvm.create_vm() as vm:
                vm.create_vcpu(0)
            if cycle >= 50 and time.monotonic() > enough:
                break
        gc.collect()
        assert open_fds() == before
    with open("/proc/self/maps") as maps:
        assert not any("kvm-vcpu" in line for line in maps)
