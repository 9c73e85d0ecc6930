"""Typed errors from the one door, and what opening KVM says when it cannot."""

from __future__ import annotations

import errno
import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from hvkvm.abi import kvm_requests as rq
from hvkvm.abi.kvm import KVM_CAP_SYS_HYPERV_CPUID
from hvkvm.abi.kvm_structs import kvm_regs
from hvkvm.errors import CapabilityMissing, HvkvmError, KvmIoctlError, KvmUnavailable
from hvkvm.kvm import ioctl as door
from hvkvm.kvm.cpuid import get_cpuid
from hvkvm.kvm.system import Kvm


def test_a_failed_ioctl_names_request_scope_and_errno():
    with pytest.raises(KvmIoctlError) as caught:
        door.ioctl(-1, rq.KVM_GET_REGS, kvm_regs(), "vCPU 3")
    error = caught.value
    assert (error.errno, error.request, error.scope) == (errno.EBADF, "KVM_GET_REGS", "vcpu")
    assert str(error) == "KVM_GET_REGS on the vcpu fd: Bad file descriptor (vCPU 3)"
    assert isinstance(error, OSError)
    assert isinstance(error, HvkvmError)


def test_every_scope_is_one_of_four():
    assert {request.scope for request in rq.REQUESTS.values()} <= {
        "system",
        "vm",
        "vcpu",
        "vm or vcpu",
        "device",
    }


def test_missing_device_says_what_to_do(tmp_path):
    with pytest.raises(KvmUnavailable, match=r"nothing-here: No such file.*; load the kvm_") as caught:
        Kvm(str(tmp_path / "nothing-here"))
    assert caught.value.exit_status == 69
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open anything")
def test_forbidden_device_says_what_to_do(tmp_path):
    path = tmp_path / "kvm"
    path.touch(mode=0)
    with pytest.raises(KvmUnavailable, match="add yourself to the group"):
        Kvm(str(path))


def test_something_else_than_kvm_is_refused_without_leak(open_fds):
    before = open_fds()
    with pytest.raises(KvmUnavailable, match="does not answer as KVM"):
        Kvm("/dev/null")
    assert open_fds() == before


def test_another_api_version_is_refused_without_leak(monkeypatch, open_fds):
    monkeypatch.setattr("hvkvm.kvm.ioctl.ioctl", lambda *_: 10)
    before = open_fds()
    with pytest.raises(KvmUnavailable, match="speaks KVM API 10, not 12"):
        Kvm("/dev/null")
    assert open_fds() == before


@pytest.mark.kvm
def test_addresses_above_2_gib_and_2_to_the_32_pass_unchanged(kvm):
    with kvm.create_vm() as vm:
        vm.set_tss_addr(0xFFFBD000)
        with pytest.raises(KvmIoctlError) as caught:
            vm.set_tss_addr(0x1_0000_0000)  # KVM refuses it, unless the door cut it to 0
        assert caught.value.errno == errno.EINVAL


@pytest.mark.kvm
def test_errno_and_scope_of_real_refusals(kvm):
    with kvm.create_vm() as vm:
        with pytest.raises(KvmIoctlError) as caught:
            vm.irq_line(5, 1)
        assert (caught.value.request, caught.value.scope) == ("KVM_IRQ_LINE", "vm")
        assert caught.value.errno == errno.ENXIO  # no irqchip
        with pytest.raises(KvmIoctlError) as caught:
            vm.enable_cap(0xFFFF)
        assert (caught.value.scope, caught.value.errno) == ("vm", errno.EINVAL)
        vcpu = vm.create_vcpu(0)
        with pytest.raises(KvmIoctlError) as caught:
            vcpu.enable_cap(0xFFFF)
        assert (caught.value.scope, caught.value.errno) == ("vcpu", errno.EINVAL)
        with pytest.raises(KvmIoctlError) as caught:
            vm.create_vcpu(0)
        assert caught.value.errno == errno.EEXIST
        assert len(vm.vcpus) == 1


@pytest.mark.kvm
def test_cpuid_and_msr_lists_are_complete(kvm):
    whole = [bytes(entry) for entry in kvm.supported_cpuid()]
    assert len(whole) > 10
    grown = get_cpuid(kvm.fd, rq.KVM_GET_SUPPORTED_CPUID, room=1)  # E2BIG several times
    assert [entry.function for entry in grown] == [int.from_bytes(e[:4], "little") for e in whole]
    assert {0xC0000081, 0xC0000082} <= set(kvm.msr_index_list())  # STAR, LSTAR


@pytest.mark.kvm
def test_hv_cpuid_is_given_or_refused_by_name(kvm):
    if kvm.check_extension(KVM_CAP_SYS_HYPERV_CPUID):
        assert {entry.function for entry in kvm.supported_hv_cpuid()} >= set(range(0x40000000, 0x40000006))
    else:
        with pytest.raises(CapabilityMissing, match="KVM_CAP_SYS_HYPERV_CPUID"):
            kvm.supported_hv_cpuid()


@pytest.mark.kvm
def test_kvm_run_releases_the_gil(tiny_guest):
    """While one thread is inside KVM_RUN for good, this one goes on."""
    guest = tiny_guest(b"\xeb\xfe")  # jmp $: never exits by itself
    before = signal.signal(signal.SIGRTMIN, lambda *_: None)
    # If the GIL were held nothing in Python could end this: the watchdog is a C thread and ends the process.
    faulthandler.dump_traceback_later(60, exit=True)
    reasons = []
    thread = threading.Thread(target=lambda: reasons.append(guest.vcpu.enter()))
    thread.start()
    try:
        for _ in range(100):
            time.sleep(0.001)
            assert thread.is_alive()
    finally:
        guest.vcpu.run.immediate_exit = 1
        while thread.is_alive():
            signal.pthread_kill(thread.ident, signal.SIGRTMIN)
            thread.join(0.01)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGRTMIN, before)
    assert reasons == [10]


INTERRUPTED = """
import signal
from hvkvm.kvm.system import Kvm
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
with Kvm() as kvm:
    for _ in range(100):
        kvm.create_vm().close()
signal.setitimer(signal.ITIMER_REAL, 0)
"""


@pytest.mark.kvm
def test_a_vm_is_made_though_signals_come():
    """KVM_CREATE_VM gives EINTR for any signal, a terminal's new size say: one call in seven, here."""
    # In a process of its own: the timer is the one that ends tests which stand.
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
